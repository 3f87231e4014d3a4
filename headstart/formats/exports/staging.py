"""Writing an export so that a failure or a kill leaves nothing half written: the folder appears whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from headstart.formats.disk import sync
from headstart.formats.exports.record import CONFORMANCE, FILES, is_export
from headstart.text.jsonl import read_object

README = "README.md"


def require_export_or_empty(folder: Path) -> None:
    """Raise ValueError for a folder that holds something else than an export of ours, whose files would be lost."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the export")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if not files:
        return
    if CONFORMANCE not in files or not is_export(folder):
        raise ValueError(f"{folder} holds something else than an export of headstart; name another folder for the export")
    if others := sorted(files - {CONFORMANCE, *read_object(folder / CONFORMANCE).get(FILES, [])}):
        raise ValueError(
            f"{folder} holds an export and {others[0]}, which is no part of it; name another folder, or move that file"
        )


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that replaces it at the end; on an error it is removed, and `out` is as it was.

    Raises ValueError where the disk refuses to write.
    """
    out = out.absolute()
    staging = f".{out.name}.exporting-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for leftover in out.parent.glob(f"{staging}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=staging, dir=out.parent, ignore_cleanup_errors=True) as temporary:
            staged = Path(temporary) / "new"
            staged.mkdir()
            yield staged
            _flush(staged)
            _replace(out, staged, Path(temporary) / "old")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"the export cannot be written to {out}: {reason}; what was there is unchanged; free space or name another folder"
        ) from error


def _flush(staged: Path) -> None:
    """Make the files readable as the first JSON file is, and wait until they are on the disk."""
    like = min(staged.rglob("*.json"), default=None)
    for path in staged.rglob("*"):
        if path.is_file() and like is not None and path.stat().st_nlink == 1:  # a linked file is somebody else's too
            shutil.copymode(like, path)  # safetensors writes files that only their owner can read
        sync(path)


def _replace(out: Path, staged: Path, old: Path) -> None:
    """Put the staged folder in the place of `out`, which is moved aside first."""
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(staged, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
