"""`plan.json`, which lies beside heads: their calibration, their best static trees, and what rounds cost on which machine.

Must not import models or drafters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headstart.speculation.calibration import Calibration, Ranks, object_of
from headstart.speculation.checks import require
from headstart.speculation.cost import CostModel
from headstart.speculation.planner import StaticTree
from headstart.text.jsonl import read_object

PLAN = "plan.json"
_KEYS = {1: {"format", "version", "calibration", "trees"}, 2: {"format", "version", "calibration", "trees", "costs"}}


@dataclass(frozen=True)
class Tree:
    """A static tree and its measured tau.

    paths: one path of ranks per draft.
    tau: acceptance length on the answers that it was measured on.
    Raises ValueError for paths that are no tree, and for a tau below 1.
    """

    paths: tuple[Ranks, ...]
    tau: float

    def __post_init__(self) -> None:
        StaticTree(self.paths)  # raises ValueError for paths that are no tree
        require(1 <= self.tau < math.inf, "tau", self.tau, "at least 1, the tau of plain decoding")


@dataclass(frozen=True)
class MachineCost:
    """What rounds cost with the heads on one machine.

    machine: all that the cost depends on, by name: model, dtype, device, threads, kernels, ...
    """

    machine: Mapping[str, str | int]
    cost: CostModel

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.machine.items())


@dataclass(frozen=True)
class HeadsPlan:
    """The content of `plan.json`.

    calibration: of the heads beside the file.
    trees: [temperature][number of drafts] the best static tree measured.
    costs: one per machine on which the heads were measured.
    """

    calibration: Calibration
    trees: Mapping[float, Mapping[int, Tree]]
    costs: tuple[MachineCost, ...] = ()

    def cost_on(self, machine: Mapping[str, str | int]) -> CostModel | None:
        """The cost measured on exactly this machine; None where it was not measured there."""
        return next((measured.cost for measured in self.costs if measured.machine == machine), None)

    def with_cost(self, measured: MachineCost) -> HeadsPlan:
        """The plan with another machine's cost, in place of an earlier one of the same machine."""
        others = tuple(other for other in self.costs if other.machine != measured.machine)
        return replace(self, costs=(*others, measured))

    def static_tree(self, nodes: int, temperature: float) -> StaticTree:
        """The tree of `nodes` drafts, measured at the nearest temperature. Raises ValueError for a size that was not measured."""
        nearest = min(self.trees, key=lambda measured: abs(measured - temperature), default=None)
        by_size = {} if nearest is None else self.trees[nearest]
        if nodes not in by_size:
            sizes = ", ".join(f"tree:{size}" for size in sorted(by_size)) or "none, so measure the heads with `headstart tune`"
            raise ValueError(f"no tree of {nodes} drafts was measured; there are {sizes}")
        return StaticTree(by_size[nodes].paths)


def save_plan(folder: Path, plan: HeadsPlan) -> None:
    """Write `plan.json` atomically. Raises ValueError where it cannot be written."""
    trees = {
        f"{temperature:g}": {str(nodes): {"paths": tree.paths, "tau": tree.tau} for nodes, tree in by_size.items()}
        for temperature, by_size in plan.trees.items()
    }
    costs = [{"machine": {**measured.machine}, "cost": measured.cost.as_dict()} for measured in plan.costs]
    content = {
        "format": "headstart-plan",
        "version": 2,
        "calibration": plan.calibration.as_dict(),
        "trees": trees,
        "costs": costs,
    }
    temporary = folder / f"{PLAN}.part"
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(folder / PLAN)
    except OSError as error:
        raise ValueError(f"{folder / PLAN} cannot be written: {error.strerror}; an earlier plan is unchanged") from None


def load_plan(folder: Path) -> HeadsPlan | None:
    """The plan in a folder of heads, of version 1 or 2; None without the file.

    Raises ValueError, naming the file, for content that is no plan.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        return _plan(read_object(path))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} cannot be used: {error}; measure the heads again, or delete the file") from None


def _plan(content: Any) -> HeadsPlan:
    values = object_of(content, "the plan")
    require(values.get("format") == "headstart-plan", "format", values.get("format"), "headstart-plan")
    version = values.get("version")
    require(version in (1, 2), "version", version, "1 or 2; update headstart for a later one")
    object_of(values, "the plan", _KEYS[int(str(version))])
    trees = {
        float(temperature): {int(nodes): _tree(tree) for nodes, tree in object_of(by_size, "trees").items()}
        for temperature, by_size in object_of(values["trees"], "trees").items()
    }
    costs = values.get("costs", [])
    require(isinstance(costs, list), "costs", costs, "a list")
    return HeadsPlan(Calibration.from_dict(values["calibration"]), trees, tuple(map(_cost, costs)))


def _cost(content: Any) -> MachineCost:
    values = object_of(content, "a cost", {"machine", "cost"})
    machine = object_of(values["machine"], "a machine")
    require(all(isinstance(value, str | int) for value in machine.values()), "a machine", machine, "names and numbers")
    return MachineCost(machine, CostModel.from_dict(object_of(values["cost"], "a cost's numbers")))


def _tree(content: Any) -> Tree:
    values = object_of(content, "a tree", {"paths", "tau"})
    paths = tuple(tuple(int(rank) for rank in path) for path in values["paths"])
    return Tree(paths, float(values["tau"]))
