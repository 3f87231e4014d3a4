"""Lines of JSON in files, packed or not: prompts, conversations, texts.

This file knows lines, their numbers, and under which names published files keep what they say. It refuses to know tokens.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
PROMPTS = ("turns", "prompt", "instruction", "Instruction", "question")


def is_jsonl(path: Path) -> bool:
    """Whether the name says that each line is a JSON object."""
    return path.name.endswith(SUFFIXES)


def read_text(path: Path) -> str:
    """A whole text file. Raises ValueError as `read_lines` does."""
    return "".join(line for _, line in read_lines(path))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a text file, which may be packed (.gz, .xz).

    Raises ValueError if there is no such file, or its bytes are no text.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    try:
        with _open(path) as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 ({error.reason}); convert it, for example with iconv") from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from None


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of a JSONL file, blank lines left out. Raises ValueError, naming the line, for what is none."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error.msg}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"line {number} of {path} is a {type(fields).__name__}; each line must be a JSON object")
        yield number, fields


def first_text(fields: dict[str, Any], names: Sequence[str]) -> str | None:
    """The first of these fields that holds a text; of a list (turns, references) its first one."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value
    return None


def applied_to(fields: dict[str, Any]) -> str:
    """What an instruction is applied to, where a file keeps it apart; to be put behind the instruction."""
    given = fields.get("input") or next((one.get("input") for one in fields.get("instances", [])), None)
    return f"\n\n{given}" if given else ""


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
