"""Flushing files and folders to the disk, so that after a power cut no file is half written."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk.

    Windows flushes only files that are open for writing, and no folders: there a rename relies on the file system's journal.
    Raises OSError where the disk refuses.
    """
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
