"""Planners: how deep and wide to draft in a round (`plan`, on the host), and which drafts to verify (`prune`, on the device).

Under the coupled rule every plan gives the same text; only the speed differs. Must not import sampling, drafters or targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from headstart.speculation.checks import require
from headstart.speculation.tree import ROOT, Drafts


@dataclass(frozen=True)
class Plan:
    """The size of a round's speculation.

    depth: most levels per row.
    width: children per parent.
    beam: most parents expanded per level and row.
    nodes: most drafts verified, over all rows.
    parents: paths of ranks of the nodes to expand, for a static tree; empty: expand the most probable nodes.
    min_gain: expected kept tokens that another level must add, or the row's tree ends there; 0: no limit.
    level_prices: tokens that the time of another level would give otherwise, where one, two, ... rows go deeper; (): no limit.
        On CPU only, as `min_gain`.
    """

    depth: int
    width: int
    beam: int
    nodes: int
    parents: frozenset[tuple[int, ...]] = frozenset()
    min_gain: float = 0.0
    level_prices: tuple[float, ...] = ()


NO_DRAFTS = Plan(depth=0, width=0, beam=0, nodes=0)  # of a round in which no row drafts


class Planner(Protocol):
    """Decides the size of each round's speculation."""

    def headroom(self, max_rows: int) -> int:
        """Most KV cache slots that the drafts of one row take, when up to `max_rows` rows draft."""
        ...

    def plan(self, depths: Sequence[int]) -> Plan:
        """The size of the next round's speculation.

        depths: per row, how deep it may draft (limited by context, max_tokens and free slots); 0: it does not draft.
        """
        ...

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        """The drafts to verify, sorted by row (`Drafts.by_row`).

        Under `rejection`, which drafts are verified must not depend on the drawn tokens: there, chances depend on ranks only.
        """
        ...


@dataclass(frozen=True)
class Chain:
    """One draft per level: the classic chain of speculative decoding (Leviathan et al. 2023).

    depth: drafts per row. Raises ValueError below 1.
    """

    depth: int = 5

    def __post_init__(self) -> None:
        require(self.depth >= 1, "depth", self.depth, "at least 1")

    def headroom(self, max_rows: int) -> int:
        return self.depth + 1

    def plan(self, depths: Sequence[int]) -> Plan:
        return Plan(self.depth, 1, 1, self.depth * len(depths))

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        return drafts.by_row(num_rows)


@dataclass(frozen=True)
class Best:
    """The most probable candidates over all rows together, as EAGLE-2 selects them (Li et al. 2024).

    nodes: drafts verified, per drafting row on average.
    depth: most levels per row.
    width: children per parent.
    beam: parents expanded per level and row.
    floor: candidates of a lower chance are dropped; 0: none. On a GPU this costs one more host synchronisation per round.
    min_gain: expected kept tokens that another level must add, or the row's tree ends there; 0: no limit. A good value is the
        cost of a level in target forwards. On CPU only: on a GPU this would cost a host synchronisation.
    Raises ValueError for a number of nodes, depth, width or beam below 1, and for a floor or min_gain outside [0, 1).
    """

    nodes: int = 15
    depth: int = 6
    width: int = 4
    beam: int = 4
    floor: float = 0.0
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        for name in ("nodes", "depth", "width", "beam"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor is {self.floor}; the chance below which drafts are dropped must be in [0, 1)")
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"min_gain is {self.min_gain}; the expected tokens that another level must add must be in [0, 1)")

    def headroom(self, max_rows: int) -> int:
        drafted = self.width * (1 + (self.depth - 1) * self.beam)
        return 1 + max(min(drafted, self.nodes * max_rows), self.beam * (self.depth - 1))  # slots of the target, of the drafter

    def plan(self, depths: Sequence[int]) -> Plan:
        num_drafting = sum(depth > 0 for depth in depths)
        return Plan(self.depth, self.width, self.beam, self.nodes * num_drafting, min_gain=self.min_gain)

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        if len(drafts) > plan.nodes:
            # No child has a higher chance than its parent, and a stable sort keeps the order of equals: no parent is missing.
            best = torch.sort(drafts.chances, descending=True, stable=True).indices[: plan.nodes]
            drafts = drafts.take(best.sort().values, num_rows)
        if self.floor and len(drafts):  # under `rejection`, chances depend on ranks only, not on the drawn tokens
            kept = (drafts.chances >= self.floor).nonzero().squeeze(-1)
            drafts = drafts if len(kept) == len(drafts) else drafts.take(kept, num_rows)
        return drafts.by_row(num_rows)


@dataclass(frozen=True)
class StaticTree:
    """A static tree, as in Medusa (Cai et al. 2024) and EAGLE-1.

    paths: one path of ranks per node: `((0,), (1,), (0, 0))` are the root's best child, its second best child, and the best
        child of its best child.
    Raises ValueError for no path, a negative rank, and a path whose parent's path is missing.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        known = set(self.paths)
        for path in self.paths:
            if not path or min(path) < 0:
                raise ValueError(f"path {path} of a static tree is not a tuple of ranks from 0")
            if len(path) > 1 and path[:-1] not in known:
                raise ValueError(f"path {path} of a static tree lacks its parent {path[:-1]}")
        if not self.paths:
            raise ValueError("a static tree needs at least one path")

    @classmethod
    def full(cls, *widths: int) -> StaticTree:
        """The tree in which every node of level `i` has `widths[i]` children: `StaticTree.full(2, 1)` has four nodes."""
        paths: list[tuple[int, ...]] = []
        level: list[tuple[int, ...]] = [()]
        for width in widths:
            require(width >= 1, "width", width, "at least 1")
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return cls(tuple(paths))

    def headroom(self, max_rows: int) -> int:
        plan = self.plan([1])
        return 1 + plan.width * (1 + (plan.depth - 1) * plan.beam)

    def plan(self, depths: Sequence[int]) -> Plan:
        depth = max(map(len, self.paths))
        parents = frozenset(path[:-1] for path in self.paths if len(path) > 1)
        beam = max(sum(len(path) == level for path in parents) for level in range(1, depth + 1))
        width = 1 + max(path[-1] for path in self.paths)
        return Plan(depth, width, max(1, beam), len(self.paths) * sum(d > 0 for d in depths), parents)

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        paths = set(self.paths)
        kept = [index for index, path in enumerate(rank_paths(drafts)) if path in paths]
        order = torch.tensor(kept, dtype=torch.int64).to(drafts.tokens.device, non_blocking=True)
        return drafts.take(order, num_rows).by_row(num_rows)


@dataclass(frozen=True)
class CalibratedTree:
    """Stands for the best static tree of `nodes` drafts in a drafter's calibration; not a planner itself.

    The tree depends on the drafter and the temperature: `headstart.engine.drafter_loading.resolve_planner` looks it up.
    nodes: number of drafts. Raises ValueError below 1.
    """

    nodes: int

    def __post_init__(self) -> None:
        require(self.nodes >= 1, "nodes", self.nodes, "at least 1")


@dataclass(frozen=True)
class Auto:
    """Stands for `headstart.speculation.adaptive.Adaptive`, which needs the cost of rounds; not a planner itself."""


def paying_rows(gains: Sequence[float], prices: Sequence[float]) -> list[int]:
    """The rows for which another level is run: those that are worth most together, beyond its price; ascending.

    gains: per row, the kept tokens that the level promises.
    prices: of a level with one, two, ... rows.
    """
    order = sorted(range(len(gains)), key=lambda row: -gains[row])
    best, best_value, gain = 0, 0.0, 0.0
    for count, row in enumerate(order, 1):
        gain += gains[row]
        value = gain - prices[min(count, len(prices)) - 1]
        if value > best_value:
            best, best_value = count, value
    return sorted(order[:best])


def rank_paths(drafts: Drafts) -> list[tuple[int, ...]]:
    """Per draft, its path of ranks: which child of which child of the root it is, in the order proposed. On the host."""
    if drafts.rank_paths is not None:
        return list(drafts.rank_paths)
    parents, rows = drafts.parents.tolist(), drafts.rows.tolist()
    num_children: dict[tuple[int, int], int] = {}  # by row and parent, so far
    paths: list[tuple[int, ...]] = []
    for parent, row in zip(parents, rows, strict=True):
        rank = num_children.get((row, parent), 0)
        num_children[row, parent] = rank + 1
        paths.append((*(() if parent == ROOT else paths[parent]), rank))
    return paths


def parse(spec: str) -> Planner | CalibratedTree | Auto:
    """The planner that a text describes: `auto`, `chain:5`, `best:nodes=15,depth=6,width=4,beam=4`, `full:3,2,1` or `tree:32`.

    Settings not given have their defaults; `full` and `tree` need theirs. Raises ValueError for any other text.
    """
    name, _, argument = spec.partition(":")
    if spec == "auto":
        return Auto()
    try:
        if name == "chain":
            return Chain(int(argument)) if argument else Chain()
        if name == "full":
            return StaticTree.full(*map(int, argument.split(",")))
        if name == "tree":
            return CalibratedTree(int(argument))
        if name == "best":
            if "worth=" in argument:
                raise ValueError("the setting worth must be written min_gain")
            settings = dict(item.split("=") for item in argument.split(",")) if argument else {}
            return Best(**{key: float(value) if key in ("floor", "min_gain") else int(value) for key, value in settings.items()})  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"planner {spec!r} has a setting that is none of nodes, depth, width, beam, floor, min_gain") from None
    except ValueError as error:
        why = f": {error}" if "must be" in str(error) else ""
        raise ValueError(f"planner {spec!r} cannot be read{why}; {_SYNTAX}") from None
    raise ValueError(f"planner {spec!r} is unknown; {_SYNTAX}")


_SYNTAX = "write auto, chain:DEPTH, best:nodes=15,depth=6,width=4,beam=4, full:3,2,1 (children per level) or tree:32 (calibrated)"
