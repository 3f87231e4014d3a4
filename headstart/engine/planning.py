"""The planner of a drafter whose user chooses none: `Adaptive`, with the cost of rounds as it was measured on this machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.drafters import Drafter
from headstart.engine.cost_measure import measure_cost
from headstart.engine.machine import Machine, differences, machine_key
from headstart.speculation.adaptive import MOST_NODES, Adaptive
from headstart.speculation.calibration import UNFITTED, Calibration
from headstart.speculation.cost import CostModel
from headstart.speculation.heads_plan import MachineCost
from headstart.speculation.planner import Auto, Planner
from headstart.speculation.shape import Limits, fastest_shape
from headstart.speculation.verify import Rule
from headstart.target.target import Target

SECONDS = 1.5  # that measuring may take where no measurement is kept
_WIDEST = 32  # parents per level, at most


def planner_for(
    target: Target, drafter: Drafter | None, planner: Planner | Auto | None, rule: Rule, longest: float = math.inf
) -> Planner | None:
    """The planner of an engine.

    planner: what the user chose; None: nothing. Then it is `Adaptive` where the text does not depend on what is drafted, and the
        drafter's own elsewhere: the same seed must repeat an answer, whatever was measured.
    longest: seconds that a round of `Adaptive` may take.
    Raises ValueError where `Adaptive` is asked for and the text would depend on it.
    """
    does_fit = rule.noise == "shared"
    if isinstance(planner, Auto) and not does_fit:
        raise ValueError(
            "planner auto depends on measured times, and only with the acceptance rule coupled does the text not depend on the "
            "planner; name another planner such as chain:5, or leave the rule at coupled"
        )
    if drafter is None or not (isinstance(planner, Auto) or (planner is None and does_fit)):
        return None if isinstance(planner, Auto) else planner
    return adaptive(target, drafter, longest=longest)


def adaptive(target: Target, drafter: Drafter, cost: CostModel | None = None, longest: float = math.inf) -> Adaptive:
    """The adaptive planner of a drafter on a target.

    cost: None: the kept one, or measured now.
    longest: seconds that a round may take.
    """
    cost = cost or cost_of(target, drafter)
    calibration: Calibration = getattr(drafter, "calibration", UNFITTED)
    return Adaptive(cost, limits_of(drafter, cost, calibration), calibration, target.device.type == "cpu", longest)


def limits_of(drafter: Drafter, cost: CostModel, calibration: Calibration) -> Limits:
    """The largest trees that a drafter may grow: its own planner's, and more where passes are so expensive that they pay."""
    usual = drafter.planner.plan([2**20])
    depth = int(getattr(drafter, "depth", 2 * usual.depth))
    most = Limits(depth, usual.width, _WIDEST, MOST_NODES)
    table = calibration.table(0.0, depth, most.width)
    beam = max(usual.beam, min(_WIDEST, 2 * fastest_shape(cost, table, most).beam))
    return Limits(depth, usual.width, beam, MOST_NODES)


# -- kept measurements ------------------------------------------------------------------------------------------------------


def cost_of(target: Target, drafter: Drafter | None) -> CostModel:
    """The cost of rounds on this machine: that in the plan of the heads, or measured once for each `machine_key` and kept in the
    user's cache.

    Warns where the plan of the heads was measured on other machines or with another model only.
    """
    key = machine_key(target, drafter)
    costs: Sequence[MachineCost] = getattr(drafter, "costs", ())
    planned = next((measured.cost for measured in costs if measured.machine == key), None)
    if planned is not None:
        return planned
    if costs and drafter is not None:
        _warn_of_others(drafter.name, key, costs)
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "headstart" / "costs"
    path = folder / f"{_name(key)}.json"
    cost = _read(path, key)
    if cost is None:
        cost = measure_cost(target, drafter, SECONDS, cost_of(target, None) if drafter else None)
        _write(path, key, cost)
    return cost


def _warn_of_others(name: str, key: Machine, costs: Sequence[MachineCost]) -> None:
    """Warn that a plan is not this machine's, with what differs from the one that differs least."""
    closest = min((list(differences(key, measured.machine)) for measured in costs), key=len)
    here = ", ".join(f"{what} {value}" for what, value, _ in closest)
    there = ", ".join(f"{what} {value}" for what, _, value in closest)
    warnings.warn(
        f"the costs in the plan of these {name} heads were measured with {there}, and this is {here}; they are measured anew, and "
        "`headstart tune` writes them into the plan",
        stacklevel=4,
    )


def _name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, key: dict[str, Any]) -> CostModel | None:
    """The cost in a file; None where there is none, or one that cannot be read: it is measured anew."""
    try:
        content = json.loads(path.read_text())
        return CostModel.from_dict(content["cost"]) if content["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, key: dict[str, Any], cost: CostModel) -> None:
    """Keep a cost. Where the folder cannot be written, the next process measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"key": key, "cost": cost.as_dict()}, indent=1))
        temporary.replace(path)
    except OSError:
        pass
