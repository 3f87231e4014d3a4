"""Chains of drafts: how long they should be, from acceptance rates and what rounds cost; no model runs here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from headstart.speculation.calibration import Ranks, Table, expected_tau
from headstart.speculation.cost import CostModel


def chain(depth: int) -> tuple[Ranks, ...]:
    """The chain of first children."""
    return tuple((0,) * level for level in range(1, depth + 1))


def chain_lengths(table: Table, cost: CostModel, most_rows: int, length: float) -> tuple[int, ...]:
    """For 1, 2, ... rows, the length of the chain with the most expected tokens per second; 0: plain decoding.

    table: [depth][rank] acceptance rates.
    length: mean length of a text while it is answered, in tokens.
    """
    chains = [chain(depth) for depth in range(len(table) + 1)]
    taus = [expected_tau(paths, table) for paths in chains]

    def rate(depth: int, rows: int) -> float:
        return taus[depth] / round_seconds(cost, chains[depth], rows, length)

    return tuple(max(range(len(chains)), key=lambda depth: rate(depth, rows)) for rows in range(1, most_rows + 1))


def round_seconds(cost: CostModel, paths: tuple[Ranks, ...], rows: int, length: float) -> float:
    """Seconds of a round in which every row has this static tree. length: as of `chain_lengths`."""
    size, context = rows * (1 + len(paths)), round(rows * length)
    return cost.forward(size, rows, context) + cost.host(size, rows) + drafting_seconds(cost, paths, rows)


def drafting_seconds(cost: CostModel, paths: Iterable[Ranks], rows: int) -> float:
    """Seconds of drafting a static tree in every row: after the first level, each runs the nodes that have children."""
    parents = Counter(len(path) for path in {path[:-1] for path in paths})
    levels = (cost.draft.level(count * rows, rows) for depth, count in parents.items() if depth) if cost.draft else ()
    return (cost.drafting(1, 1, rows) if parents else 0.0) + sum(levels)
