"""The `config.json` of native heads: its fields, and how it is parsed and written about in errors.

Must not import drafters: which settings a method has, `headstart.formats.native` asks the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from headstart.formats.target_info import TargetInfo
from headstart.text.jsonl import parsed

CONFIG = "config.json"


class Description(BaseModel):
    """The content of a native `config.json`.

    format, version: what marks the file as native; this package reads version 1.
    method: name of a trainable method, as "medusa".
    settings: fields of the method's `config_type`.
    target: the model that the heads were made for.
    training: whatever the trainer records, free of form.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headstart"] = "headstart"
    version: Literal[1] = 1
    method: str
    settings: dict[str, Any]
    target: TargetInfo
    training: dict[str, Any] = {}


def is_native(config: object) -> bool:
    """Whether the content of a `config.json` is that of native heads, of any version."""
    return isinstance(config, Mapping) and config.get("format") == "headstart"


def parse(text: str | bytes, folder: Path) -> Description:
    """The description that a JSON text holds.

    folder: of the heads, for error messages.
    Raises ValueError for JSON that is not native, of another version, or with a key that is unknown, missing or of the wrong type.
    """
    where = folder / CONFIG
    content = parsed(text, where)
    if not is_native(content):
        raise ValueError(f"{folder} holds no native heads; `headstart inspect {folder}` says what it is")
    if content.get("version") != 1:
        raise ValueError(f"{where} is of format version {content.get('version')!r}, and this headstart reads version 1; update it")
    try:
        return Description.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_error(error, where)) from None


def first_error(error: ValidationError, where: Path) -> str:
    """The first error of a validation in one sentence, with the key's name. where: the file."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"])) or "its content"
    if first["type"] == "extra_forbidden":
        return f"{where} has an unknown key {key}; remove it, or update headstart"
    if first["type"] == "missing":
        return f"{where} lacks the key {key}"
    return f"{where}: {key} is {first['input']!r}: {first['msg']}"
