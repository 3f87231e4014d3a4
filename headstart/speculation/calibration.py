"""Calibration: how a drafter's scores become chances (acceptance probabilities), and its best static trees.

A rank says which child of its parent the decided token was; static trees and their tau (acceptance length) follow from ranks
alone. Must not import sampling, models or drafters.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from headstart.speculation.checks import require

T = TypeVar("T")
_RANK_DECAY = 0.4  # beyond the measured ranks, the chance of each is this share of the one before (docs/log.md)
_KEY = "warmth"  # of the calibration temperature in plan.json, and so in error messages

Ranks = tuple[int, ...]  # the path of a node of a static tree: which child of which child ... of the root
Table = Sequence[Sequence[float]]  # [depth][rank]: how often that child is the decided token, given that its parent is kept


@dataclass(frozen=True)
class Calibration:
    """What was measured of a drafter, by sampling temperature. Values between two measured temperatures are interpolated.

    temperatures: [temperature] the measured sampling temperatures, ascending.
    calibration_temperature: [temperature][depth] c_d in a child's chance, softmax((z_draft + T g) / c_d) over the candidates
        (temperature scaling, Guo et al. 2017); `warmth` in plan.json.
    ranks: [temperature][depth][rank] how often the child of that rank is the decided token, given that its parent is kept.
    Deeper levels have the values of the deepest measured one.
    Raises ValueError where a number is out of bounds.
    """

    temperatures: tuple[float, ...]
    calibration_temperature: tuple[tuple[float, ...], ...]
    ranks: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        temperatures, count = self.temperatures, len(self.temperatures)
        require(count > 0 and list(temperatures) == sorted({*temperatures}), "temperatures", temperatures, "ascending")
        require(temperatures[0] >= 0 and temperatures[-1] < math.inf, "temperatures", temperatures, "0 or positive")
        for name, by_temperature in ((_KEY, self.calibration_temperature), ("ranks", self.ranks)):
            require(len(by_temperature) == count, name, by_temperature, f"given for each of {count} temperatures")
            require(all(map(len, by_temperature)), name, by_temperature, "given for at least one depth")
        is_positive = all(0 < value < math.inf for by_depth in self.calibration_temperature for value in by_depth)
        require(is_positive, _KEY, self.calibration_temperature, "positive")
        shares = [row for by_depth in self.ranks for row in by_depth]
        require(all(row and all(0 <= share <= 1 for share in row) for row in shares), "ranks", self.ranks, "shares in [0, 1]")

    def calibration_temperature_at(self, temperature: Tensor, level: int) -> Tensor:
        """The calibration temperature c_d of children of depth `level`, [n], without a host synchronisation.

        temperature: [n] sampling temperatures, of the dtype of the result.
        level: depth of the children; a root's children have 1.
        """
        values = [torch.full_like(temperature, _at_level(by_depth, level)) for by_depth in self.calibration_temperature]
        return _interpolated(temperature, self.temperatures, values)

    def of_ranks(self, temperature: Tensor, level: int, k: int) -> Tensor:
        """Chances of the first `k` ranks at depth `level`, [n, k] float32, for rules under which drawn tokens must not matter.

        temperature: [n] sampling temperatures.
        """
        lines = [torch.tensor(_extended(_at_level(by_depth, level), k)) for by_depth in self.ranks]
        values = [line.to(temperature.device, non_blocking=True).expand(len(temperature), k) for line in lines]
        return _interpolated(temperature.float()[:, None], self.temperatures, values)

    def table(self, temperature: float, depth: int, width: int) -> list[list[float]]:
        """[depth][rank < width] chances of the ranks at one sampling temperature, on the host."""
        at = torch.tensor([temperature])
        return [self.of_ranks(at, level, width)[0].tolist() for level in range(1, depth + 1)]

    def as_dict(self) -> dict[str, Any]:
        """The calibration as a dict for JSON, which `from_dict` reads."""
        return {"temperatures": self.temperatures, _KEY: self.calibration_temperature, "ranks": self.ranks}

    @classmethod
    def from_dict(cls, content: Any) -> Calibration:
        """The calibration that `as_dict` wrote. Raises ValueError for anything else."""
        values = object_of(content, "calibration", {"temperatures", _KEY, "ranks"})
        return cls(_tuples(values["temperatures"], 1), _tuples(values[_KEY], 2), _tuples(values["ranks"], 3))


def _at_level(by_depth: Sequence[T], level: int) -> T:
    return by_depth[min(level, len(by_depth)) - 1]


def _extended(measured: Sequence[float], k: int) -> list[float]:
    """The chances of the first `k` ranks: those measured, then decreasing ones."""
    return [*measured[:k], *(measured[-1] * _RANK_DECAY**number for number in range(1, 1 + k - len(measured)))]


def _interpolated(x: Tensor, knots: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Piecewise linear through (knot, value), constant outside. One ramp per piece, so that no branch depends on `x`."""
    result = values[0]
    for index in range(1, len(knots)):
        ramp = ((x - knots[index - 1]) / (knots[index] - knots[index - 1])).clamp(0, 1)
        result = result + ramp * (values[index] - values[index - 1])
    return result


UNFITTED = Calibration((0.0,), ((0.6,),), (((0.6,),),))  # of a drafter that was not measured (docs/log.md)


# -- static trees -----------------------------------------------------------------------------------------------------------


def sparse_tree(table: Table, nodes: int) -> tuple[Ranks, ...]:
    """The static tree with the largest expected tau (acceptance length), as in Medusa (Cai et al. 2024).

    The gain of a path is the product of its shares. No child's gain exceeds its parent's, so the paths of largest gain are a tree.
    table: [depth][rank] shares.
    nodes: most drafts of the tree; fewer where all other paths have no gain.
    Returns the paths, parents before children.
    Raises ValueError for less than one node, and for a table without a positive share at depth 1.
    """
    require(nodes >= 1, "nodes", nodes, "at least 1")
    heap: list[tuple[float, int, Ranks]] = [(-1.0, 0, ())]  # minus gain, depth, path: of equal gains, the shorter path first
    chosen: list[Ranks] = []
    while heap and len(chosen) <= nodes:
        minus_gain, depth, path = heapq.heappop(heap)
        chosen.append(path)
        for rank, share in enumerate(table[depth] if depth < len(table) else ()):
            if share > 0:
                heapq.heappush(heap, (minus_gain * share, depth + 1, (*path, rank)))
    require(len(chosen) > 1, "table", table, "positive somewhere in its first depth")
    return tuple(chosen[1:])


def expected_tau(paths: Iterable[Ranks], table: Table) -> float:
    """The tau (tokens per round) of a static tree if shares of different depths were independent. table: [depth][rank] shares."""
    return 1 + sum(math.prod(table[depth][rank] for depth, rank in enumerate(path)) for path in paths)


def acceptance(ranks: Tensor, width: int) -> tuple[tuple[float, ...], ...]:
    """[depth][rank < width] share of the positions whose decided token had that rank: the acceptance rate by depth and rank.

    Only positions count whose ancestors were all among the first `width` children; shares are 0 where there are none.
    ranks: [positions, depth] int64, the rank of the decided token among its parent's children.
    """
    kept = torch.ones(len(ranks), dtype=torch.bool)
    table: list[tuple[float, ...]] = []
    for column in ranks.T:
        counts = torch.bincount(column[kept].clamp(max=width), minlength=width + 1)
        table.append(tuple((counts[:width] / counts.sum().clamp(min=1)).tolist()))
        kept &= column < width
    return tuple(table)


def walk(texts: Iterable[Tensor], paths: Iterable[Ranks]) -> float:
    """The tau (acceptance length) of a static tree on recorded answers, from replaying every round that the engine would run.

    Exact, because an answer does not depend on drafts.
    texts: per answer [tokens - 1, depth] int64. Line `p` is for the round whose root is output token `p`: the rank of each
        following token among the children of the token before it. A rank that is in no path stands for a token that was not
        among the children, or for the end of the answer.
    paths: the static tree.
    """
    tree = set(paths)
    tokens = rounds = 0
    for ranks in texts:
        lines, root = ranks.tolist(), 0
        tokens += len(lines) + 1
        rounds += 1  # the prompt's last round emits the first token, without drafts
        while root < len(lines):
            root += 1 + _num_kept(lines[root], tree)
            rounds += 1
    return tokens / rounds


def _num_kept(ranks: Sequence[int], tree: set[Ranks]) -> int:
    depth = 0
    while depth < len(ranks) and tuple(ranks[: depth + 1]) in tree:
        depth += 1
    return depth


# -- calibration error ------------------------------------------------------------------------------------------------------


def expected_calibration_error(chances: Tensor, happened: Tensor, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017): mean of |mean chance - frequency| over bins, weighted by their sizes.

    chances: [n] in [0, 1].
    happened: [n] bool.
    bins: number of bins, all of one width. Raises ValueError below 1.
    """
    require(bins >= 1, "bins", bins, "at least 1")
    bin_ids = (chances * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=chances.device)
    gap.index_add_(0, bin_ids, chances.double() - happened.double())
    return float(gap.abs().sum() / max(1, len(chances)))


# -- reading JSON -----------------------------------------------------------------------------------------------------------


def object_of(content: Any, name: str, keys: set[str] | None = None) -> dict[str, Any]:
    """`content` as a dict. Raises ValueError for anything else, and for other keys than `keys` (None: any)."""
    require(isinstance(content, dict), name, content, "an object")
    assert isinstance(content, dict)
    require(keys is None or set(content) == keys, f"{name}'s keys", sorted(content), f"exactly {', '.join(sorted(keys or ()))}")
    return content


def _tuples(content: Any, depth: int) -> Any:
    """Nested lists of numbers, `depth` deep, as tuples of floats."""
    if depth:
        require(isinstance(content, list | tuple), "a table", content, "a list")
        return tuple(_tuples(item, depth - 1) for item in content)
    require(isinstance(content, int | float) and not isinstance(content, bool), "an entry", content, "a number")
    return float(content)
