"""Reading JSON and JSONL files, compressed or not, and the field names of published prompt files. Must not know tokenizers.

Every JSON text that this package reads goes through `parsed`.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

ENCODING = "utf-8-sig"  # drops the byte order mark that some editors write
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
PROMPTS = ("turns", "prompt", "instruction", "Instruction", "question")
DEEPEST = 64  # levels of nested lists and objects
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which is no character
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")  # its escape in JSON


def parsed(text: str | bytes, where: object) -> Any:
    """The content of a JSON text.

    where: the text's name in error messages, as a path.
    Raises ValueError, in one sentence, for text that is not JSON, not UTF-8, nested more than `DEEPEST` deep, or has a string with
    half of a surrogate pair.
    """
    try:
        text = text if isinstance(text, str) else text.decode(ENCODING)
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not valid UTF-8 ({error.reason}); convert it, for example with iconv") from None
    except RecursionError:
        raise ValueError(_too_deep(where)) from None
    except ValueError as error:  # a syntax error, or a number with thousands of digits
        raise ValueError(f"{where} is not JSON: {error}") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(content) > DEEPEST:
        raise ValueError(_too_deep(where))
    if _ESCAPED.search(text) and SURROGATE.search(json.dumps(content, ensure_ascii=False)):
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character; write the whole pair, or leave it out")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError as `parsed` does, for other JSON values, and for a file that cannot be read."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    content = parsed(text, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and must hold a JSON object")
    return content


def why(error: Exception) -> str:
    """The reason for an error of a library that reads files, in one line. error: as the library raised it."""
    message = " ".join(str(error).split())[:300]
    if "trust_remote_code" in str(error):
        return (
            "it comes with Python files of its own, which do not run unless they are allowed to; read them, and if you trust them, "
            "allow them with --trust-remote-code (in Python trust_remote_code=True)"
        )
    if "weights_only" in str(error):
        return "it is a pickle that holds something else than tensors, which is never run; ask its author for safetensors"
    if isinstance(error, RecursionError):
        return "something in it is nested too deeply"
    if isinstance(error, KeyError | AttributeError | TypeError | IndexError | AssertionError) or not message:
        return f"something in its files is missing or of the wrong kind ({type(error).__name__}: {message})"
    return message


def _too_deep(where: object) -> str:
    return f"{where} is nested more than {DEEPEST} deep; no valid file is"


def _depth(content: Any) -> int:
    """The depth to which lists and objects are nested, at most one more than `DEEPEST`."""
    level, depth = [content], 0
    while depth <= DEEPEST:
        level = [value for value in level if isinstance(value, list | dict)]
        if not level:
            break
        level = [item for value in level for item in (value.values() if isinstance(value, dict) else value)]
        depth += 1
    return depth


def is_jsonl(path: Path) -> bool:
    """Whether a file has the name of a JSONL file, compressed or not."""
    return path.name.endswith(SUFFIXES)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end) of a text file, which may be compressed (.gz, .xz).

    Raises ValueError if there is no such file, it is not UTF-8, or it cannot be decompressed.
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
    """Yield (line number, JSON object) of a JSONL file, without blank lines.

    Raises ValueError as `read_lines` and `parsed` do, and, naming the line, for other JSON values.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        fields = parsed(line, f"line {number} of {path}")
        if not isinstance(fields, dict):
            raise ValueError(f"line {number} of {path} is a {type(fields).__name__}; each line must be a JSON object")
        yield number, fields


def read_fields(path: Path, plain: Literal["text", "prompts"] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, fields) of each record in a data file, which may be compressed (.gz, .xz).

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
    """The first of these fields that holds a text, or the first text of a list (turns, references); None where none does.

    names: of the fields, in order of preference.
    """
    for name in names:
        value = fields.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value
    return None


def applied_to(fields: dict[str, Any]) -> str:
    """The input that an instruction applies to, where a file stores it in a separate field; empty where it does not.

    It begins with a blank line, for appending it to the instruction.
    """
    instances = fields.get("instances")
    records = [fields, *(instances if isinstance(instances, list) else ())]
    inputs = (record["input"] for record in records if isinstance(record, dict) and isinstance(record.get("input"), str))
    first = next(filter(None, inputs), "")
    return f"\n\n{first}" if first else ""


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=ENCODING)
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding=ENCODING)
    return path.open(encoding=ENCODING)
