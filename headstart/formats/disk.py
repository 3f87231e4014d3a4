"""Putting what was written onto the disk, so that after a power cut no name stands for half a file.

This file knows files and folders of an operating system. It refuses to know what is in them.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows flushes only what is open for writing, and no folders:
    there a rename is left to its journal. Raises OSError where the disk refuses."""
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
