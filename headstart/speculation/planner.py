"""How much to speculate: how deep and wide to draft, and which candidates are worth verifying now.

A planner answers before drafting (`plan`, on the host: depth, width, how many nodes) and after it (`prune`, on the device: which
nodes). Under the coupled rule any answer gives the same text; only its speed depends on it.
This file knows chances and costs. It refuses to know drafters, targets and tokens.
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
    """depth: levels per row at most; width: children per parent; beam: parents expanded per level and row;
    nodes: drafts verified in all, over all rows. parents: the paths of ranks to expand, where a shape names them; empty: the
    likeliest. min_gain: kept tokens that the nodes of another level must promise together, or a row ends there."""

    depth: int
    width: int
    beam: int
    nodes: int
    parents: frozenset[tuple[int, ...]] = frozenset()
    min_gain: float = 0.0


NO_DRAFTS = Plan(depth=0, width=0, beam=0, nodes=0)  # of a round in which no row drafts


class Planner(Protocol):
    """Decides the size of a round's speculation."""

    def headroom(self, max_rows: int) -> int:
        """Slots that one row's drafts may take, beyond its text."""
        ...

    def plan(self, depths: Sequence[int]) -> Plan:
        """depths: per row, how deep it may draft at all (context, max_tokens and slots left; 0 for a row that does not draft)."""
        ...

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        """The drafts worth verifying, row after row (`Drafts.by_row`).

        Under a rule that forbids looking at what was drawn, chances are those of the ranks: no planner can peek."""
        ...


@dataclass(frozen=True)
class Chain:
    """One guess after another, `depth` of them: what most engines do."""

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
    """The `nodes` candidates of highest chance per drafting row, at most `depth` deep: EAGLE-2's rule (Li et al. 2024), over all
    rows at once.

    floor: candidates of a smaller chance are dropped, where a node costs more than it earns (one more synchronisation per round
    on a
        GPU).
    min_gain: kept tokens that the nodes of another level must promise together, or a row goes no deeper: about what a level
    costs, in
        forwards of the target. On a CPU only: on a GPU this would cost a host synchronisation.
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
            raise ValueError(f"floor is {self.floor}; a chance below which drafts are dropped must be in [0, 1)")
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"min_gain is {self.min_gain}; the tokens that another level must promise must be in [0, 1)")

    def headroom(self, max_rows: int) -> int:
        drafted = self.width * (1 + (self.depth - 1) * self.beam)
        return 1 + max(min(drafted, self.nodes * max_rows), self.beam * (self.depth - 1))  # verified, or run by the drafter

    def plan(self, depths: Sequence[int]) -> Plan:
        drafting = sum(depth > 0 for depth in depths)
        return Plan(self.depth, self.width, self.beam, self.nodes * drafting, min_gain=self.min_gain)

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        if len(drafts) > plan.nodes:
            # A child never beats its parent, and a stable sort keeps the earlier of equals: the choice is closed under parents.
            best = torch.sort(drafts.chances, descending=True, stable=True).indices[: plan.nodes]
            drafts = drafts.take(best.sort().values, num_rows)
        if self.floor and len(drafts):  # under a fixed rule chances are those of the ranks, so this peeks at nothing
            kept = (drafts.chances >= self.floor).nonzero().squeeze(-1)
            drafts = drafts if len(kept) == len(drafts) else drafts.take(kept, num_rows)
        return drafts.by_row(num_rows)


@dataclass(frozen=True)
class StaticTree:
    """A fixed tree, given by its paths of ranks: `((0,), (1,), (0, 0))` is the best child, the second best, the best's best.

    Medusa's and EAGLE-1's static trees, and what `rejection` needs. Every prefix of a path must be a path.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        known = set(self.paths)
        for path in self.paths:
            if not path or min(path) < 0:
                raise ValueError(f"path {path} of a tree shape is not a tuple of ranks from 0")
            if len(path) > 1 and path[:-1] not in known:
                raise ValueError(f"path {path} of a tree shape lacks its parent {path[:-1]}")
        if not self.paths:
            raise ValueError("a tree shape needs at least one path")

    @classmethod
    def full(cls, *widths: int) -> StaticTree:
        """Every node of level `i` has `widths[i]` children: `StaticTree.full(2, 1)` has four nodes."""
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
        wanted = set(self.paths)
        ranks = rank_paths(drafts)
        chosen = [index for index, path in enumerate(ranks) if path in wanted]
        order = torch.tensor(chosen, dtype=torch.int64).to(drafts.tokens.device, non_blocking=True)
        return drafts.take(order, num_rows).by_row(num_rows)


@dataclass(frozen=True)
class CalibratedTree:
    """The static tree of `nodes` drafts that was measured to be a drafter's best: not yet a planner.

    It depends on the drafter and on the temperature; `headstart.engine.drafter_loading.resolve_planner` makes it a `StaticTree`.
    """

    nodes: int

    def __post_init__(self) -> None:
        require(self.nodes >= 1, "nodes", self.nodes, "at least 1")


def rank_paths(drafts: Drafts) -> list[tuple[int, ...]]:
    """Each draft's path of ranks (which child of its parent, in the order proposed), on the host."""
    parents, rows = drafts.parents.tolist(), drafts.rows.tolist()
    siblings: dict[tuple[int, int], int] = {}
    paths: list[tuple[int, ...]] = []
    for parent, row in zip(parents, rows, strict=True):
        place = (row, parent)
        rank = siblings.get(place, 0)
        siblings[place] = rank + 1
        paths.append((*(() if parent == ROOT else paths[parent]), rank))
    return paths


def parse(spec: str) -> Planner | CalibratedTree:
    """The planner that a line of text names: `chain:5`, `best:nodes=15,depth=6,width=4,beam=4`, `full:3,2,1`, `tree:32`.

    Whatever follows the colon may be left out, except for `full` and `tree`. Raises ValueError for anything else.
    """
    name, _, argument = spec.partition(":")
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


_SYNTAX = "write chain:DEPTH, best:nodes=15,depth=6,width=4,beam=4, full:3,2,1 (children per level) or tree:32 (calibrated)"
