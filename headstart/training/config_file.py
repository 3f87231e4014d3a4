"""From a YAML file, with options on top, to the configuration of a run, and one sentence for what is wrong with it.

This file knows mappings of keys. It refuses to know what the keys mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError

from headstart.text.jsonl import ENCODING
from headstart.training.run_config import RunConfig, TrainConfig

Kind = TypeVar("Kind", bound=BaseModel)
AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


@overload
def resolve(path: Path | None, options: Mapping[str, Any], default_target: Callable[[], str] | None = None) -> TrainConfig: ...


@overload
def resolve(
    path: Path | None, options: Mapping[str, Any], default_target: Callable[[], str] | None = None, *, kind: type[AnyConfig]
) -> AnyConfig: ...


def resolve(
    path: Path | None, options: Mapping[str, Any], default_target: Callable[[], str] | None = None, *, kind: Any = TrainConfig
) -> Any:
    """The keys of a YAML file with `options` on top, as a `kind` of run. Options that are mappings join those of the file; one of
    several alternatives, such as a budget, replaces the file's.

    default_target: where neither names a target. Raises ValueError in one sentence.
    """
    keys = {} if path is None else _read(path)
    for names in kind.alternatives:
        if any(name in options for name in names):
            keys = {name: value for name, value in keys.items() if name not in names}
    joined = {name: _joined(keys.get(name), value) for name, value in options.items()}
    keys = {**keys, **joined}
    if default_target is not None and "target" not in keys:
        keys["target"] = default_target()
    return validate(kind, keys, "a training run" if path is None else str(path))


def validate(kind: type[Kind], keys: Mapping[str, Any], what: str) -> Kind:
    """`kind` made from `keys`. Raises ValueError with one sentence about the first thing that is wrong; `what` is being made."""
    strange = [str(key) for key in keys if key not in kind.model_fields]
    if strange:
        raise ValueError(f"{what} has no key {', '.join(sorted(strange))}; there are {', '.join(_own_first(kind))}")
    try:
        return kind.model_validate(dict(keys))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{what}: {_sentence(first)}") from None


def _joined(of_file: object, option: object) -> object:
    """A mapping goes on top of the file's, anything else in its place."""
    return {**of_file, **option} if isinstance(of_file, Mapping) and isinstance(option, Mapping) else option


def _own_first(kind: type[BaseModel]) -> list[str]:
    """Its keys; those that other kinds have too, last."""
    inherited = {name for parent in kind.__mro__[1:] for name in getattr(parent, "model_fields", {})}
    return sorted(kind.model_fields, key=lambda name: name in inherited)


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"] if not (isinstance(part, str) and "[" in part))
    if error["type"] == "missing":
        return f"{name} is missing"
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"{name} is {error['input']!r}: {said}" if name else said


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding=ENCODING))
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"config {path} is nested too deeply; write lines of `key: value`") from None
    except (yaml.YAMLError, ValueError) as error:  # of the grammar, of UTF-8, or a date or number that cannot be
        raise ValueError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"config {path} holds a {type(found).__name__}; write lines of `key: value`")
    return found or {}
