"""What a round costs: seconds of a target forward and of drafting, as functions of their sizes, on one machine.

Measured by `headstart.engine.cost_measure`. Must not import models or drafters.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from headstart.speculation.checks import require

_STEP = 0.05  # weight of one timed forward in a refined cost
_DISTURBED = 3.0  # a forward that took so many times its cost says nothing about its size


@dataclass(frozen=True)
class DraftCost:
    """Seconds of drafting.

    first: of the first level, which a round with drafts always has, and of reading what the round before kept.
    widths: ascending numbers of nodes that a further level runs at once, over all rows.
    seconds: of a further level, for each of `widths`.
    row_seconds: of the first level, more for each row after the first.
    level_row_seconds: of a further level, more for each row after the first.
    Raises ValueError where these are no costs.
    """

    first: float
    widths: tuple[int, ...]
    seconds: tuple[float, ...]
    row_seconds: float = 0.0
    level_row_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check(self.widths, self.seconds, "widths")
        for name in ("first", "row_seconds", "level_row_seconds"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "seconds")

    def first_of(self, rows: int) -> float:
        """Seconds of the first level of so many rows."""
        return self.first + (rows - 1) * self.row_seconds

    def level(self, nodes: int, rows: int = 1) -> float:
        """Seconds of a further level that runs `nodes` nodes of so many rows at once."""
        return interpolated(self.widths, self.seconds, nodes) + (rows - 1) * self.level_row_seconds

    def scaled(self, factor: float) -> DraftCost:
        """The same, all of it so many times as long."""
        seconds = tuple(value * factor for value in self.seconds)
        return DraftCost(self.first * factor, self.widths, seconds, self.row_seconds * factor, self.level_row_seconds * factor)

    def seconds_of(self, depth: int, beam: int, rows: int = 1) -> float:
        """Seconds of drafting `depth` levels with `beam` parents per level and row; 0 for none."""
        return self.first_of(rows) + (depth - 1) * self.level(beam * rows, rows) if depth else 0.0


@dataclass(frozen=True)
class CostModel:
    """Seconds of a round's parts.

    nodes: ascending sizes of the measured forests.
    seconds: of a target forward of each size, of one row with a short text.
    context_seconds: more for each token of context, over all rows, where each row has one node.
    context_node_seconds: of these, more for each further node of the row: every node reads the row's context.
    row_seconds: more for each row after the first.
    draft: of drafting; None: without a drafter.
    host_seconds: of a round's remaining parts (verification, commit, host), with one node.
    host_row_seconds: of these, more for each row after the first.
    host_node_seconds: of these, more for each node after the first.
    Raises ValueError where these are no costs.
    """

    nodes: tuple[int, ...]
    seconds: tuple[float, ...]
    context_seconds: float = 0.0
    row_seconds: float = 0.0
    draft: DraftCost | None = None
    host_seconds: float = 0.0
    host_row_seconds: float = 0.0
    host_node_seconds: float = 0.0
    context_node_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check(self.nodes, self.seconds, "nodes")
        parts = ("context_seconds", "context_node_seconds", "row_seconds", "host_seconds", "host_row_seconds", "host_node_seconds")
        for name in parts:
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "seconds")

    def forward(self, nodes: int, rows: int = 1, context: int = 0) -> float:
        """Seconds of a target forward over `nodes` nodes of `rows` rows, whose contexts have `context` tokens in all."""
        reading = self.context_seconds + max(0.0, nodes / rows - 1) * self.context_node_seconds
        return interpolated(self.nodes, self.seconds, nodes) + (rows - 1) * self.row_seconds + context * reading

    def plain(self, rows: int = 1, context: int = 0) -> float:
        """Seconds of a round of plain decoding."""
        return self.forward(rows, rows, context) + self.host(rows, rows)

    def host(self, nodes: int, rows: int = 1) -> float:
        """Seconds of all parts of a round but the forward and drafting."""
        return self.host_seconds + (rows - 1) * self.host_row_seconds + (nodes - 1) * self.host_node_seconds

    def drafting(self, depth: int, beam: int, rows: int = 1) -> float:
        """Seconds of drafting `depth` levels; 0 without a drafter."""
        return self.draft.seconds_of(depth, beam, rows) if self.draft else 0.0

    def refined(self, nodes: int, rows: int, context: int, seconds: float) -> CostModel:
        """The model after another timed forward. One that took `_DISTURBED` times its cost changes nothing."""
        expected = self.forward(nodes, rows, context)
        if not 0 < seconds < _DISTURBED * expected:
            return self
        ratio = seconds / expected
        # A part of the surprise is the machine's at this moment, and holds for every size; the rest is this size's.
        common = 1 + _STEP * (ratio - 1)
        own = (1 + _STEP / 4 * weight * (ratio - 1) for weight in _weights(self.nodes, nodes))
        moved = [value * common * factor for value, factor in zip(self.seconds, own, strict=True)]
        more = {name: getattr(self, name) * common for name in ("context_seconds", "context_node_seconds", "row_seconds")}
        return replace(self, seconds=monotone(moved), **more)

    def as_dict(self) -> dict[str, Any]:
        """The model as a dict for JSON, which `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CostModel:
        """The model that `as_dict` wrote. Raises ValueError or TypeError for anything else."""
        values = {**content}
        draft = values.pop("draft", None)
        if draft is not None:
            widths, levels = tuple(map(int, draft["widths"])), tuple(map(float, draft["seconds"]))
            by_row = (float(draft.get(name, 0)) for name in ("row_seconds", "level_row_seconds"))
            draft = DraftCost(float(draft["first"]), widths, levels, *by_row)
        nodes, seconds = tuple(map(int, values.pop("nodes"))), tuple(map(float, values.pop("seconds")))
        return cls(nodes, seconds, draft=draft, **{name: float(value) for name, value in values.items()})


def _check(sizes: Sequence[int], seconds: Sequence[float], name: str) -> None:
    """Raise ValueError where the sizes are not ascending and positive, or the seconds are not one per size, positive or zero."""
    require(len(sizes) > 0 and sizes[0] >= 1 and list(sizes) == sorted({*sizes}), name, sizes, "ascending from at least 1")
    require(len(seconds) == len(sizes), "seconds", seconds, f"given for each of {len(sizes)} {name}")
    require(all(0 <= value < math.inf for value in seconds), "seconds", seconds, "positive")


def interpolated(sizes: Sequence[int], seconds: Sequence[float], size: float) -> float:
    """Piecewise linear through (size, seconds): constant below the first size, with the last piece's slope above the last.

    A single measured size costs in proportion above it.
    """
    if size <= sizes[0]:
        return seconds[0]
    index = min(bisect_right(sizes, size), len(sizes) - 1)
    if index == 0:
        return seconds[0] * size / sizes[0]
    slope = (seconds[index] - seconds[index - 1]) / (sizes[index] - sizes[index - 1])
    return seconds[index - 1] + slope * (size - sizes[index - 1])


def _weights(sizes: Sequence[int], size: int) -> list[float]:
    """How much each measured size has a part in the cost of `size`; at most two do."""
    weights = [0.0] * len(sizes)
    right = bisect_right(sizes, size)
    if right in (0, len(sizes)):
        weights[min(right, len(sizes) - 1)] = 1.0
        return weights
    weights[right] = (size - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
    weights[right - 1] = 1 - weights[right]
    return weights


def monotone(values: Sequence[float]) -> tuple[float, ...]:
    """The non-decreasing values with the least squared distance: isotonic regression by pooling adjacent violators."""
    blocks: list[tuple[float, int]] = []  # mean, size
    for value in values:
        mean, size = value, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return tuple(mean for mean, size in blocks for _ in range(size))


FREE = DraftCost(0.0, (1,), (0.0,))  # of a drafter that runs no model
