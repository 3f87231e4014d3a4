"""How large a drafted tree should be, by what is expected of it before it is drafted: chances by rank against measured cost.

Must not import models or drafters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headstart.speculation.cost import CostModel

Floats = NDArray[np.float64]
BEAMS = (1, 2, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class Limits:
    """The largest tree that may be grown, per row.

    depth: levels. width: children per parent. beam: parents per level. nodes: drafts verified.
    """

    depth: int
    width: int
    beam: int
    nodes: int


@dataclass(frozen=True)
class Shape:
    """The size of a tree, per row, and what it promises.

    depth: levels; 0: plain decoding.
    beam: parents per level.
    nodes: drafts verified.
    gain: expected kept drafts.
    seconds: of a round over all rows.
    rate: expected tokens per second, over all rows.
    """

    depth: int
    beam: int
    nodes: int
    gain: float
    seconds: float
    rate: float


def level_chances(table: Sequence[Sequence[float]], width: int, beam: int, depth: int) -> Iterator[Floats]:
    """Per level, the chances of its candidates, descending, where the shares of different depths are independent.

    table: [depth][rank] how often that child is the decided token, given that its parent is kept; deeper levels have the values
        of the last one.
    """
    parents = np.ones(1)
    for level in range(depth):
        shares = np.asarray(table[min(level, len(table) - 1)][:width], dtype=np.float64)
        chances = np.sort(np.outer(parents, shares).ravel())[::-1]
        yield chances
        parents = chances[:beam]


def round_seconds(cost: CostModel, base: int, step: int, count: int, rows: int, context: int) -> Floats:
    """[count + 1] seconds of rounds with forwards of `base`, `base + step`, ... nodes, without drafting."""
    sizes = base + step * np.arange(count + 1)
    seconds = np.interp(sizes, cost.nodes, cost.seconds)
    last = cost.nodes[-1]
    if sizes[-1] > last:  # beyond what was measured, in a straight line
        seconds += np.maximum(sizes - last, 0) * (cost.forward(last + 1) - cost.forward(last))
    host = cost.host(base, rows) + cost.host_node_seconds * (sizes - base)
    return seconds + (rows - 1) * cost.row_seconds + context * cost.context_seconds + host


def best_shape(
    cost: CostModel, table: Sequence[Sequence[float]], limits: Limits, rows: int = 1, context: int = 0, rate: float = 0.0
) -> Shape:
    """The shape whose tokens beyond those that its seconds give elsewhere are most: gain - rate * seconds is maximal.

    Plain decoding where nothing pays.
    rows: rows that decode, each with a tree of this shape. context: tokens of context, over all rows.
    rate: tokens per second that a second is worth.
    """
    forward = round_seconds(cost, rows, rows, limits.nodes, rows, context)
    plain = Shape(0, 0, 0, 0.0, float(forward[0]), rows / float(forward[0]))
    best, best_value = plain, rows - rate * plain.seconds
    for beam in (beam for beam in BEAMS if beam <= limits.beam):
        pool = np.empty(0)
        for depth, chances in enumerate(level_chances(table, limits.width, beam, limits.depth), 1):
            pool = np.sort(np.concatenate([pool, chances]))[::-1][: limits.nodes]
            gains = np.concatenate([[0.0], np.cumsum(pool)])
            seconds = forward[: len(gains)] + cost.drafting(depth, beam, rows)
            values = rows * (1 + gains) - rate * seconds
            nodes = int(values.argmax())
            if nodes and values[nodes] > best_value:
                tokens = rows * (1 + float(gains[nodes]))
                best_value = float(values[nodes])
                best = Shape(depth, beam, nodes, float(gains[nodes]), float(seconds[nodes]), tokens / float(seconds[nodes]))
    return best


def fastest_shape(cost: CostModel, table: Sequence[Sequence[float]], limits: Limits, rows: int = 1, context: int = 0) -> Shape:
    """The shape with the most expected tokens per second (Dinkelbach 1967: the best shape at its own rate)."""
    shape = best_shape(cost, table, limits, rows, context, rows / cost.plain(rows, context))
    for _ in range(20):
        better = best_shape(cost, table, limits, rows, context, shape.rate)
        if better.rate <= shape.rate * (1 + 1e-9):
            break
        shape = better
    return shape
