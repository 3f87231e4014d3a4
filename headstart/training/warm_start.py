"""Heads that go on from others: their settings, with some changed that weights do not depend on, and their weights.

This file knows folders of heads. It refuses to know what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.drafters.registry import method
from headstart.formats import TargetInfo, describe, load
from headstart.training.config_file import validate


def warm_start_settings(name: str, given: Mapping[str, Any], start: str | Path | None, what: str) -> Any:
    """The settings of a method, checked: those of the heads in `start`, if any, with what is given on top.

    what: is being made, for errors. Raises ValueError for an unknown method or setting, and for heads of another method.
    """
    kind: Any = method(name)
    if start is None:
        return validate(kind.config_type, given, what)
    first = describe(start)
    if first.method != name:
        raise ValueError(f"{start} holds {first.method} heads, and {name} heads were asked to go on from it")
    return validate(kind.config_type, {**first.settings, **given}, what)


def warm_start(heads: Any, start: str | Path, target_info: TargetInfo) -> None:
    """Give new heads the weights of those in `start`. Raises ValueError where their settings leave no place for them."""
    first: Any = load(start, target_info)
    try:
        heads.load_state_dict(first.state_dict())
    except RuntimeError:
        before, now = first.config.model_dump(), heads.config.model_dump()
        changed = ", ".join(f"{key} {before[key]} is now {now[key]}" for key in before if before[key] != now[key])
        raise ValueError(f"the heads in {start} cannot go on with other shapes ({changed}); leave these settings out") from None
