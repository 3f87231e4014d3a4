"""How likely a draft is kept: what was measured of a drafter, the trees that follow from it, and how to check both.

A calibration turns scores into chances, by depth and temperature. From ranks alone (which child of its parent the decided token
was) follow static trees and their tau. This file knows chances, ranks and paths of ranks. It refuses to know logits' origin,
models and drafters.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from headstart.speculation.checks import require
from headstart.speculation.planner import StaticTree
from headstart.text.jsonl import read_object

T = TypeVar("T")
PLAN = "plan.json"
_FALL = 0.4  # beyond the ranks that were measured, each has this share of the one before (docs/log.md)

Ranks = tuple[int, ...]  # a node of a static tree: which child, of which child, ... of the root
Table = Sequence[Sequence[float]]  # [depth][rank]: how often that child is the decided token, given that its parent is kept


@dataclass(frozen=True)
class Calibration:
    """What was measured of a drafter, by the request's temperature; between two measured ones it is interpolated.

    temperatures: ascending. warmth: [temperature][depth] the tau_d of a child's chance, softmax over the candidates of
    (z_draft + T g) / tau_d. ranks: [temperature][depth][rank] how often the child of that rank is the decided token, given that
    its parent is kept. Beyond the deepest measured depth its values go on. Raises ValueError where a number is out of bounds.
    """

    temperatures: tuple[float, ...]
    calibration_temperature: tuple[tuple[float, ...], ...]
    ranks: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        temperatures, count = self.temperatures, len(self.temperatures)
        require(count > 0 and list(temperatures) == sorted({*temperatures}), "temperatures", temperatures, "ascending")
        require(temperatures[0] >= 0 and temperatures[-1] < math.inf, "temperatures", temperatures, "0 or positive")
        for name, by_temperature in (("warmth", self.calibration_temperature), ("ranks", self.ranks)):
            require(len(by_temperature) == count, name, by_temperature, f"given for each of {count} temperatures")
            require(all(map(len, by_temperature)), name, by_temperature, "given for at least one depth")
        require(
            all(0 < tau < math.inf for line in self.calibration_temperature for tau in line),
            "warmth",
            self.calibration_temperature,
            "positive",
        )
        shares = [row for by_depth in self.ranks for row in by_depth]
        require(all(row and all(0 <= share <= 1 for share in row) for row in shares), "ranks", self.ranks, "shares in [0, 1]")

    def calibration_temperature_at(self, temperature: Tensor, level: int) -> Tensor:
        """tau_d for children of depth `level` (a root's: 1), [n] of the dtype of `temperature` [n]. No host synchronisation."""
        values = [torch.full_like(temperature, _at(by_depth, level)) for by_depth in self.calibration_temperature]
        return _interpolated(temperature, self.temperatures, values)

    def of_ranks(self, temperature: Tensor, level: int, k: int) -> Tensor:
        """Chances of the first `k` ranks at depth `level`, [n, k] float32: for a rule under which nobody may look at what was
        drawn. temperature: [n]."""
        lines = [torch.tensor(_ranked(_at(by_depth, level), k)) for by_depth in self.ranks]
        values = [line.to(temperature.device, non_blocking=True).expand(len(temperature), k) for line in lines]
        return _interpolated(temperature.float()[:, None], self.temperatures, values)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` gives the calibration back."""
        return {"temperatures": self.temperatures, "warmth": self.calibration_temperature, "ranks": self.ranks}

    @classmethod
    def from_dict(cls, given: Any) -> Calibration:
        """Raises ValueError for anything that `as_dict` does not write."""
        found = _object(given, "calibration", {"temperatures", "warmth", "ranks"})
        return cls(_tuples(found["temperatures"], 1), _tuples(found["warmth"], 2), _tuples(found["ranks"], 3))


def _at(by_depth: Sequence[T], level: int) -> T:
    return by_depth[min(level, len(by_depth)) - 1]


def _ranked(measured: Sequence[float], k: int) -> list[float]:
    return [*measured[:k], *(measured[-1] * _FALL ** (1 + more) for more in range(k - len(measured)))]


def _interpolated(x: Tensor, knots: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Piecewise linear through (knot, value), constant outside: one ramp per piece, so that the device decides which holds."""
    result = values[0]
    for place in range(1, len(knots)):
        ramp = ((x - knots[place - 1]) / (knots[place] - knots[place - 1])).clamp(0, 1)
        result = result + ramp * (values[place] - values[place - 1])
    return result


UNFITTED = Calibration((0.0,), ((0.6,),), (((0.6,),),))  # what a drafter goes by until it is measured (docs/log.md)


# -- static trees -----------------------------------------------------------------------------------------------------------


def sparse_tree(table: Table, nodes: int) -> tuple[Ranks, ...]:
    """The tree of at most `nodes` drafts with the largest expected tau, parents before children (Medusa, Cai et al. 2024).

    A path is worth the product of its shares. No child is worth more than its parent, so the most valuable paths are a tree.
    Fewer than `nodes` where all others are worth nothing. Raises ValueError for a size below 1 and for a table of nothing.
    """
    require(nodes >= 1, "nodes", nodes, "at least 1")
    waiting: list[tuple[float, int, Ranks]] = [(-1.0, 0, ())]  # worst last; equals: shorter first, then lower ranks
    chosen: list[Ranks] = []
    while waiting and len(chosen) <= nodes:
        value, depth, path = heapq.heappop(waiting)
        chosen.append(path)
        for rank, share in enumerate(table[depth] if depth < len(table) else ()):
            if share > 0:
                heapq.heappush(waiting, (value * share, depth + 1, (*path, rank)))
    require(len(chosen) > 1, "table", table, "more than nothing somewhere in its first depth")
    return tuple(chosen[1:])


def expected_tau(paths: Iterable[Ranks], table: Table) -> float:
    """Tokens per round of a static tree, the root's included, if shares of different depths were independent."""
    return 1 + sum(math.prod(table[depth][rank] for depth, rank in enumerate(path)) for path in paths)


def acceptance(ranks: Tensor, width: int) -> tuple[tuple[float, ...], ...]:
    """[depth][rank < width] how often the decided token had that rank, where all its ancestors were among the first `width`.

    ranks: [positions, depth] int64, rank of the decided token among its parent's children. Nothing where no parent was kept.
    """
    kept = torch.ones(len(ranks), dtype=torch.bool)
    table: list[tuple[float, ...]] = []
    for column in ranks.T:
        counts = torch.bincount(column[kept].clamp(max=width), minlength=width + 1)
        table.append(tuple((counts[:width] / counts.sum().clamp(min=1)).tolist()))
        kept &= column < width
    return tuple(table)


def walk(texts: Iterable[Tensor], paths: Iterable[Ranks]) -> float:
    """The tau that a static tree has on recorded answers: every round replayed, as the engine would run it.

    texts: per answer [tokens - 1, depth] int64; line `p` belongs to the round whose root is output token `p`: the rank of each
    following token among the children of the one before. Exact, for an answer does not depend on drafts. A rank that no path
    has stands for a token that was not among the children, or for the end of the answer.
    """
    tree = set(paths)
    tokens = rounds = 0
    for ranks in texts:
        lines, root = ranks.tolist(), 0
        tokens += len(lines) + 1
        rounds += 1  # the prompt's last round gives the first token, without drafts
        while root < len(lines):
            root += 1 + _kept(lines[root], tree)
            rounds += 1
    return tokens / rounds


def _kept(ranks: Sequence[int], tree: set[Ranks]) -> int:
    depth = 0
    while depth < len(ranks) and tuple(ranks[: depth + 1]) in tree:
        depth += 1
    return depth


# -- are chances true -------------------------------------------------------------------------------------------------------


def expected_calibration_error(chances: Tensor, happened: Tensor, bins: int = 10) -> float:
    """How far chances are from what happened: mean over equal bins of |mean chance - frequency|, by how full a bin is
    (Guo et al. 2017). chances: [n] in [0, 1]; happened: [n] bool."""
    require(bins >= 1, "bins", bins, "at least 1")
    place = (chances * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=chances.device)
    gap.index_add_(0, place, chances.double() - happened.double())
    return float(gap.abs().sum() / max(1, len(chances)))


# -- the file beside the heads ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """A static tree and the tau it had on the texts it was measured on."""

    paths: tuple[Ranks, ...]
    tau: float

    def __post_init__(self) -> None:
        StaticTree(self.paths)  # which refuses what is no tree
        require(1 <= self.tau < math.inf, "tau", self.tau, "at least 1, what plain decoding has")


@dataclass(frozen=True)
class HeadsPlan:
    """What `plan.json` holds: the calibration of some heads, and for each temperature their best static trees by size."""

    calibration: Calibration
    trees: Mapping[float, Mapping[int, Tree]]

    def shape(self, nodes: int, temperature: float) -> StaticTree:
        """The tree of `nodes` drafts measured nearest to a temperature. Raises ValueError for a size that was not measured."""
        nearest = min(self.trees, key=lambda measured: abs(measured - temperature), default=None)
        by_size = {} if nearest is None else self.trees[nearest]
        if nodes not in by_size:
            there = ", ".join(f"tree:{size}" for size in sorted(by_size))
            raise ValueError(f"no tree of {nodes} drafts was measured; there are {there or 'none, so calibrate the heads again'}")
        return StaticTree(by_size[nodes].paths)


def save_plan(folder: Path, plan: HeadsPlan) -> None:
    """Write `plan.json`, whole or not at all. Raises ValueError where that cannot be."""
    trees = {
        f"{temperature:g}": {str(nodes): {"paths": tree.paths, "tau": tree.tau} for nodes, tree in by_size.items()}
        for temperature, by_size in plan.trees.items()
    }
    content = {"format": "headstart-plan", "version": 1, "calibration": plan.calibration.as_dict(), "trees": trees}
    part = folder / f"{PLAN}.part"
    try:
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(folder / PLAN)
    except OSError as error:
        raise ValueError(f"{folder / PLAN} cannot be written: {error.strerror}; a plan that was there is untouched") from None


def load_plan(folder: Path) -> HeadsPlan | None:
    """The plan beside some heads, None where there is none. Raises ValueError, naming the file, for one that is not ours."""
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        return _plan(read_object(path))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be used: {error}; measure the heads again, or delete the file") from None


def _plan(content: Any) -> HeadsPlan:
    found = _object(content, "the plan", {"format", "version", "calibration", "trees"})
    require(found["format"] == "headstart-plan", "format", found["format"], "headstart-plan")
    require(found["version"] == 1, "version", found["version"], "1")
    trees = {
        float(temperature): {int(nodes): _tree(tree) for nodes, tree in _object(by_size, "trees").items()}
        for temperature, by_size in _object(found["trees"], "trees").items()
    }
    return HeadsPlan(Calibration.from_dict(found["calibration"]), trees)


def _tree(given: Any) -> Tree:
    found = _object(given, "a tree", {"paths", "tau"})
    paths = tuple(tuple(int(rank) for rank in path) for path in found["paths"])
    return Tree(paths, float(found["tau"]))


def _object(given: Any, name: str, keys: set[str] | None = None) -> dict[str, Any]:
    require(isinstance(given, dict), name, given, "an object")
    assert isinstance(given, dict)
    require(keys is None or set(given) == keys, f"{name}'s keys", sorted(given), f"exactly {', '.join(sorted(keys or ()))}")
    return given


def _tuples(given: Any, depth: int) -> Any:
    """Lists of lists of numbers as tuples of tuples of floats, `depth` deep."""
    if depth:
        require(isinstance(given, list | tuple), "a table", given, "a list")
        return tuple(_tuples(item, depth - 1) for item in given)
    require(isinstance(given, int | float) and not isinstance(given, bool), "an entry", given, "a number")
    return float(given)
