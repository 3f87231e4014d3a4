"""`conformance.json`, which lies in every export: what was written, for people, for checks and for importing it again.

Must not import an exporter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headstart.text.jsonl import read_object

CONFORMANCE = "conformance.json"
FORMAT, VERSION = "headstart-export", 1
FILES = "files"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of an export's `conformance.json`; None for a folder without one, or with one of another origin.

    Raises ValueError for one of a later version, and for a file that is no JSON object.
    """
    path = folder / CONFORMANCE
    if not path.is_file():
        return None
    content = read_object(path)
    if content.get("format") != FORMAT:
        return None
    if content.get("version") != VERSION:
        raise ValueError(f"{path} is of version {content.get('version')!r}, and this headstart reads version {VERSION}; update it")
    return content


def is_export(folder: Path) -> bool:
    """Whether a folder is an export of ours, of any version."""
    try:
        return read_object(folder / CONFORMANCE).get("format") == FORMAT
    except ValueError:
        return False
