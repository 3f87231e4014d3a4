"""What the playground page asks of the server: the drafters that are loaded, what they reached so far, and how to load others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headstart.engine.drafter_loading import is_embedded
from headstart.serve.lanes import NONE

if TYPE_CHECKING:
    from headstart.serve.lanes import Lane
    from headstart.serve.service import Service

TRAINED = ("medusa", "hydra", "eagle", "eagle3", "mtp")  # variants that the page explains and that are trained
_FAMILIES = {"hydra++": "hydra", "mtp-parallel": "mtp", "generate": "model"}  # methods explained with another one


def page_info(service: Service) -> dict[str, Any]:
    """The content of `/playground/info`. Names no path."""
    target = service.lanes[0].engine.target
    return {
        "model": service.settings.model,
        "has_chat": service.preparer.tokenizer.chat_template is not None,
        "is_exact": target.is_exact,
        "max_tokens": service.lanes[0].most_tokens,
        "lanes": [_lane(lane) for lane in _by_drafter(service.lanes) if lane.drafter != NONE],
        "commands": _commands(service.settings.model, is_embedded(target.name)),
    }


def _by_drafter(lanes: Sequence[Lane]) -> list[Lane]:
    """The first lane of each drafter."""
    return list({lane.drafter: lane for lane in reversed(lanes)}.values())[::-1]


def _lane(lane: Lane) -> dict[str, Any]:
    stats, drafter = lane.engine.stats, lane.engine.drafter
    parts = getattr(drafter, "parts", ())
    names = [part.name for part in (parts if isinstance(parts, tuple) and parts else (drafter,)) if part is not None]
    return {
        "name": lane.drafter,
        "methods": [_FAMILIES.get(name, name) for name in names],
        "rounds": stats.row_rounds,
        "tau": stats.tau,
        "acceptance": stats.acceptance,
    }


def _commands(model: str, is_embedded_model: bool) -> dict[str, list[str]]:
    """How to load each variant, as commands."""
    commands = {
        "lookup": [f"headstart serve --model {model} --drafter lookup"],
        "model": [f"headstart serve --model {model} --drafter model:SMALLER_MODEL"],
    }
    for name in TRAINED:
        train = f"headstart train {name} --target {model} --data DATA.jsonl --out HEADS"
        commands[name] = [train, f"headstart serve --model {model} --drafter HEADS"]
    if is_embedded_model:
        for name in ("lookup", *TRAINED):
            commands[name] = [f"headstart serve --drafter {name}"]
    return commands
