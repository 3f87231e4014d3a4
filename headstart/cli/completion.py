"""What the tab key completes: names of drafters and planners, and folders.

Shells ask at every press of the key, so nothing heavy is imported: the names of the package's own drafters are written here again,
and a test compares them.
"""

from collections.abc import Iterator
from pathlib import Path

METHODS = ("eagle", "eagle3", "hydra", "hydra++", "medusa", "mtp", "mtp-parallel")
DRAFTERS = ("auto", "lookup", "model:", "none")
PLANNERS = ("chain:5", "full:3,2,1", "best:nodes=15,depth=6,width=4,beam=4", "tree:8", "tree:16", "tree:32", "tree:64")


def methods(incomplete: str) -> list[str]:
    """Methods that can be trained."""
    return _beginning(METHODS, incomplete)


def drafters(incomplete: str) -> list[str]:
    """Whatever `--drafter` takes, but for names on the hub: own, installed by other packages, folders."""
    from importlib.metadata import entry_points

    if incomplete.startswith("model:"):
        return [f"model:{folder}" for folder in folders(incomplete.removeprefix("model:"))]
    installed = [entry.name for entry in entry_points(group="headstart.drafters")]
    return [*_beginning((*DRAFTERS, *METHODS, *installed), incomplete), *folders(incomplete)]


def planners(incomplete: str) -> list[str]:
    """One of each kind, to be changed."""
    return _beginning(PLANNERS, incomplete)


def folders(incomplete: str) -> list[str]:
    """Folders that begin so; those that hold neither model nor heads end in a slash, for there may be some further down."""
    head, slash, begun = incomplete.rpartition("/")
    try:
        return sorted(_folders(f"{head}{slash}", begun))
    except OSError:
        return []


def _folders(before: str, begun: str) -> Iterator[str]:
    for path in Path(before or ".").expanduser().iterdir():
        if path.name.startswith(begun) and (begun or not path.name.startswith(".")) and path.is_dir():
            yield before + path.name + ("" if (path / "config.json").is_file() else "/")


def _beginning(names: tuple[str, ...], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
