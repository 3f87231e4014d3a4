"""`drafter="auto"`: of the drafters that are there for a target, the one with the highest expected speed, with lookup beside it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from headstart.drafters import Drafter
from headstart.drafters.fused import Fused
from headstart.engine.drafter_loading import EMBEDDED_METHOD, built_in_heads, heads_in, is_embedded, make
from headstart.engine.planning import cost_of, limits_of
from headstart.formats.description import is_native
from headstart.speculation.calibration import UNFITTED, Calibration
from headstart.speculation.shape import fastest_shape
from headstart.speculation.verify import Rule
from headstart.target.target import Target

TEMPERATURE = 0.7  # for which speeds are compared
_LIGHT = 0.03  # part of a plain round that joining with lookup may take


def choose_drafter(model: object, target: Target, rule: Rule, specs: Sequence[str] = ()) -> Drafter:
    """The drafter that `auto` means.

    The heads of highest expected speed, joined with lookup where this takes little of a round; lookup alone where there are none.
    Whether drafting pays, the planner finds out in every round.

    model: as `headstart.load` takes it.
    rule: drafters are joined only where the text does not depend on what is drafted.
    specs: the drafters to choose from, as `make` reads them; (): the heads that come with the target, in its own files or in
        folders beside them.
    Raises ValueError for a drafter of `specs` that cannot be loaded.
    """
    drafters = [make(spec, target) for spec in specs] if specs else list(_found(model, target))
    best = max(drafters, key=lambda drafter: expected_speed(target, drafter)) if len(drafters) > 1 else next(iter(drafters), None)
    if best is None:
        return make("lookup", target)
    if rule.noise != "shared" or best.name == "lookup":
        return best
    fused = Fused([make("lookup", target), best])
    return fused if _is_light(target, fused, best) else best


def _is_light(target: Target, fused: Drafter, best: Drafter) -> bool:
    """Whether looking up and joining takes a small part of a round; for small models it does not."""
    cost, alone = cost_of(target, fused), cost_of(target, best)
    assert cost.draft is not None, "the cost of a drafter has its drafting"
    assert alone.draft is not None, "the cost of a drafter has its drafting"
    return cost.draft.first - alone.draft.first <= _LIGHT * alone.plain()


def _found(model: object, target: Target) -> Iterator[Drafter]:
    """The heads that come with a target. A warning for those that cannot be used."""
    if is_embedded(model):
        yield make(EMBEDDED_METHOD, target)
        return
    try:
        heads = built_in_heads(target)
        if heads is not None:
            yield heads
    except ValueError as error:
        warnings.warn(f"{error}; drafting without them", stacklevel=4)
    for folder in _folders(Path(target.name)):
        try:
            yield heads_in(folder, target)
        except ValueError as error:
            warnings.warn(f"{error}; drafting without them", stacklevel=4)


def _folders(model: Path) -> list[Path]:
    """Folders of heads in a model's folder, or in a folder `heads` in it."""
    places = [*model.glob("*/config.json"), *model.glob("heads/*/config.json")] if model.is_dir() else []
    return sorted(path.parent for path in places if _is_native(path))


def _is_native(path: Path) -> bool:
    try:
        return is_native(json.loads(path.read_text()))
    except (OSError, ValueError):
        return False


def expected_speed(target: Target, drafter: Drafter) -> float:
    """Expected tokens per second of one row, by the measured cost of rounds and the drafter's calibration."""
    cost = cost_of(target, drafter)
    calibration: Calibration = getattr(drafter, "calibration", UNFITTED)
    limits = limits_of(drafter, cost, calibration)
    return fastest_shape(cost, calibration.table(TEMPERATURE, limits.depth, limits.width), limits).rate
