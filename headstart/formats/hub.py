"""Downloads of heads from the Hugging Face hub, by their id `owner/name`, into the hub's own cache.

No downloaded code is run. Must not read what is in the files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "plan.json", "conformance.json", "README.md")
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth")  # read as tensors only


def is_id(name: str) -> bool:
    """Whether a name is an id on the hub: it has the form `owner/name`, and there is no local file or folder of that name."""
    return ID.fullmatch(name) is not None and not Path(name).exists()


def fetched(name: str) -> Path:
    """The local folder with a repository's native heads: configuration, safetensors, plan and model card.

    name: `owner/name`.
    Raises ValueError where the repository cannot be downloaded.
    """
    return _fetched(name, FILES)


def fetched_of_others(name: str) -> Path:
    """The same for published heads of any format: pickles are downloaded too, where there are no safetensors."""
    folder = _fetched(name, FILES)
    return folder if any(folder.rglob("*.safetensors")) else _fetched(name, (*FILES, *PICKLES))


def _fetched(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name} is no folder here, and the hub has no repository of that name that you may see; check the name, or log in "
            "with `hf auth login`"
        ) from None
    except Exception as error:  # errors of the hub, of the connection and of the disk share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        raise ValueError(
            f"{name} is no folder here, and it cannot be fetched from the hub: {reason}; check the connection, or name a folder"
        ) from error
