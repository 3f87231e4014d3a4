"""Published MTP modules for tests: rewritten folders, and the drafter that is read from one."""

import json
import shutil

from headstart import formats


def rewritten(published, folder, tensors, **config):
    """A copy of a published model with other tensors of modules, and other entries in its configuration."""
    shutil.copytree(published.folder, folder, dirs_exist_ok=True)
    published.write(tensors, folder=folder)
    original = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(original | config))
    return folder


def read(published, folder):
    return formats.inside(folder).read(formats.describe_target(published.model), published.model.config)
