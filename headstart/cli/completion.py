"""Shell completion: names of drafters, planners and engines, and folders.

Shells call it at every press of the tab key, so it must not import torch. The names of the package's drafters and engines are
repeated here; a test compares them.
"""

from collections.abc import Iterator
from pathlib import Path

METHODS = ("eagle", "eagle3", "hydra", "hydra++", "medusa", "mtp", "mtp-parallel")
DRAFTERS = ("auto", "lookup", "model:", "none")
ENGINES = ("vllm", "speculators", "sglang", "tgi", "gguf", "hf")
PLANNERS = ("auto", "chain:5", "full:3,2,1", "best:nodes=15,depth=6,width=4,beam=4", "tree:8", "tree:16", "tree:32", "tree:64")


def methods(incomplete: str) -> list[str]:
    """Methods that can be trained."""
    return _starting_with(METHODS, incomplete)


def drafters(incomplete: str) -> list[str]:
    """What `--drafter` accepts: names of this package, names that other packages install, and folders, but no hub ids."""
    from importlib.metadata import entry_points

    if incomplete.startswith("model:"):
        return [f"model:{folder}" for folder in folders(incomplete.removeprefix("model:"))]
    installed = [entry.name for entry in entry_points(group="headstart.drafters")]
    return [*_starting_with((*DRAFTERS, *METHODS, *installed), incomplete), *folders(incomplete)]


def planners(incomplete: str) -> list[str]:
    """One planner of each kind."""
    return _starting_with(PLANNERS, incomplete)


def engines(incomplete: str) -> list[str]:
    """Engines that heads can be exported to."""
    return _starting_with(ENGINES, incomplete)


def folders(incomplete: str) -> list[str]:
    """Folders that begin with `incomplete`; one without a config.json ends in a slash, as models or heads may lie deeper."""
    head, slash, prefix = incomplete.rpartition("/")
    try:
        return sorted(_folders(f"{head}{slash}", prefix))
    except OSError:
        return []


def _folders(parent: str, prefix: str) -> Iterator[str]:
    for path in Path(parent or ".").expanduser().iterdir():
        if path.name.startswith(prefix) and (prefix or not path.name.startswith(".")) and path.is_dir():
            yield parent + path.name + ("" if (path / "config.json").is_file() else "/")


def _starting_with(names: tuple[str, ...], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
