"""JSON of others: whole files, and lines in files, packed or not: prompts, conversations, texts.

Every JSON that this package reads is read by `parsed`. This file knows lines, their numbers, and under which names published
files keep what they say. It refuses to know tokens.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

ENCODING = "utf-8-sig"  # a byte order mark, as some editors write it, is no part of the text
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
PROMPTS = ("turns", "prompt", "instruction", "Instruction", "question")
DEEPEST = 64  # lists and objects inside one another
SURROGATE = re.compile("[\ud800-\udfff]")  # one half of a pair, which stands for no character
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON may write one


def parsed(text: str | bytes, where: object) -> Any:
    """The content of a JSON text. Raises ValueError, in one sentence that names `where`, for what is not JSON, not UTF-8, nested
    more than `DEEPEST` deep, or a string with half of a surrogate pair."""
    try:
        text = text if isinstance(text, str) else text.decode(ENCODING)
        found = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not valid UTF-8 ({error.reason}); convert it, for example with iconv") from None
    except RecursionError:
        raise ValueError(_too_deep(where)) from None
    except ValueError as error:  # of the grammar, or a number with thousands of digits
        raise ValueError(f"{where} is not JSON: {error}") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(found) > DEEPEST:
        raise ValueError(_too_deep(where))
    if _ESCAPED.search(text) and SURROGATE.search(json.dumps(found, ensure_ascii=False)):
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character; write the whole pair, or leave it out")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError as `parsed` does, for what is no object, and for a file that cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    found = parsed(content, path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, and must hold a JSON object")
    return found


def why(error: Exception) -> str:
    """What an error of a library that reads files says, in one line."""
    said = " ".join(str(error).split())[:300]
    if "trust_remote_code" in str(error):
        return (
            "it comes with Python files of its own, which do not run unless they are allowed to; read them, and if you trust them, "
            "allow them with --trust-remote-code (in Python trust_remote_code=True)"
        )
    if "weights_only" in str(error):
        return "it is a pickle that holds something else than tensors, which is never run; ask its author for safetensors"
    if isinstance(error, RecursionError):
        return "something in it is nested too deeply"
    if isinstance(error, KeyError | AttributeError | TypeError | IndexError | AssertionError) or not said:
        return f"something in its files is missing or of the wrong kind ({type(error).__name__}: {said})"
    return said


def _too_deep(where: object) -> str:
    return f"{where} is nested more than {DEEPEST} deep; nothing that is meant for this is"


def _depth(content: Any) -> int:
    """How many lists and objects stand inside one another, at most one more than `DEEPEST`."""
    level, depth = [content], 0
    while depth <= DEEPEST:
        level = [one for one in level if isinstance(one, list | dict)]
        if not level:
            break
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        depth += 1
    return depth


def is_jsonl(path: Path) -> bool:
    """Whether the name says that each line is a JSON object."""
    return path.name.endswith(SUFFIXES)


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
        fields = parsed(line, f"line {number} of {path}")
        if not isinstance(fields, dict):
            raise ValueError(f"line {number} of {path} is a {type(fields).__name__}; each line must be a JSON object")
        yield number, fields


def read_fields(path: Path, plain: Literal["text", "prompts"] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, fields) of each record in a data file, packed (.gz, .xz) or not.

    plain: what a file without a JSONL name holds: "text", one document (`text`); "prompts", a prompt in each line (`prompt`), blank
    lines left out; None, JSON lines whatever its name.
    Raises ValueError as `read_records` and `read_lines` do.
    """
    if plain is None or is_jsonl(path):
        yield from read_records(path)
    elif plain == "text":
        yield 1, {"text": "".join(line for _, line in read_lines(path))}
    else:
        yield from ((number, {"prompt": line.rstrip("\n")}) for number, line in read_lines(path) if line.strip())


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
    instances = fields.get("instances")
    held = [fields, *(instances if isinstance(instances, list) else ())]
    found = (one["input"] for one in held if isinstance(one, dict) and isinstance(one.get("input"), str))
    given = next(filter(None, found), "")
    return f"\n\n{given}" if given else ""


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=ENCODING)
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding=ENCODING)
    return path.open(encoding=ENCODING)
