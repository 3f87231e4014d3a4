"""Reading the configuration of a run: a YAML file with options on top, or one sentence that says what is wrong with it."""

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
    """The configuration of a run: the keys of a YAML file with `options` on top.

    path: of the file; None: no file.
    options: an option that is a mapping is merged with that of the file; one of several alternatives, such as a budget, replaces
    the file's.
    default_target: returns the target where neither file nor options name one.
    kind: class of the configuration.

    Raises ValueError, in one sentence, for a file that cannot be read and for wrong keys and values.
    """
    keys = {} if path is None else _read(path)
    for names in kind.alternatives:
        if any(name in options for name in names):
            keys = {name: value for name, value in keys.items() if name not in names}
    merged = {name: _merged(keys.get(name), value) for name, value in options.items()}
    keys = {**keys, **merged}
    if default_target is not None and "target" not in keys:
        keys["target"] = default_target()
    return validate(kind, keys, "a training run" if path is None else str(path))


def validate(kind: type[Kind], keys: Mapping[str, Any], what: str) -> Kind:
    """An instance of `kind` with these keys. what: is configured, for errors.

    Raises ValueError with one sentence about the first thing that is wrong.
    """
    unknown = [str(key) for key in keys if key not in kind.model_fields]
    if unknown:
        raise ValueError(f"{what} has no key {', '.join(sorted(unknown))}; there are {', '.join(_own_keys_first(kind))}")
    try:
        return kind.model_validate(dict(keys))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{what}: {_sentence(first)}") from None


def _merged(of_file: object, option: object) -> object:
    """The file's mapping updated with the option's; anything else is replaced by the option."""
    return {**of_file, **option} if isinstance(of_file, Mapping) and isinstance(option, Mapping) else option


def _own_keys_first(kind: type[BaseModel]) -> list[str]:
    """The keys of a configuration; those inherited from a base class come last."""
    inherited = {name for parent in kind.__mro__[1:] for name in getattr(parent, "model_fields", {})}
    return sorted(kind.model_fields, key=lambda name: name in inherited)


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"] if not (isinstance(part, str) and "[" in part))
    if error["type"] == "missing":
        return f"{name} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{name} is {error['input']!r}: {message}" if name else message


def _read(path: Path) -> dict[str, Any]:
    try:
        keys = yaml.safe_load(path.read_text(encoding=ENCODING))
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"config {path} is nested too deeply; write lines of `key: value`") from None
    except (yaml.YAMLError, ValueError) as error:  # wrong YAML, wrong UTF-8, or an impossible date or number
        raise ValueError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if keys is not None and not isinstance(keys, dict):
        raise ValueError(f"config {path} holds a {type(keys).__name__}; write lines of `key: value`")
    return keys or {}
