"""Warm start: new heads with the settings and weights of heads in a folder.

Settings that the weights do not depend on may change. The module must not import losses or the training loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.drafters.registry import method
from headstart.formats import TargetInfo, describe, load
from headstart.training.config_file import validate


def warm_start_settings(name: str, changes: Mapping[str, Any], start: str | Path | None, what: str) -> Any:
    """The settings of a method, checked.

    name: of the method.
    changes: settings on top of those of the heads in `start`.
    start: folder of heads; None: the settings are `changes` alone.
    what: is configured, for errors.

    Raises ValueError for an unknown method or setting, and for heads of another method.
    """
    drafter: Any = method(name)
    if start is None:
        return validate(drafter.config_type, changes, what)
    description = describe(start)
    if description.method != name:
        raise ValueError(f"{start} holds {description.method} heads, and {name} heads were asked to go on from it")
    return validate(drafter.config_type, {**description.settings, **changes}, what)


def warm_start(heads: Any, start: str | Path, target_info: TargetInfo) -> None:
    """Copy the weights of the heads in `start` into new heads.

    target_info: description of the target that the new heads are for.

    Raises ValueError if the settings of the two need weights of different shapes.
    """
    trained: Any = load(start, target_info)
    try:
        heads.load_state_dict(trained.state_dict())
    except RuntimeError:
        before, now = trained.config.model_dump(), heads.config.model_dump()
        changed = ", ".join(f"{key} {before[key]} is now {now[key]}" for key in before if before[key] != now[key])
        raise ValueError(f"the heads in {start} cannot go on with other shapes ({changed}); leave these settings out") from None
