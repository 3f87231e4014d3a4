"""Sequoia (Chen et al. 2024): the static tree of given size and depth with the largest expected tau, and the best size and depth.

Everything follows from acceptance rates by rank and from measured seconds. Must not import sampling, models or drafters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headstart.speculation.calibration import Ranks, Table
from headstart.speculation.checks import require

Array = NDArray[np.float64]
_BLOCK = 128  # results of a convolution that are computed together: so many lines are in a processor's cache


@dataclass(frozen=True)
class SequoiaChoice:
    """The size and depth of a tree with the most expected tokens per second.

    paths: the tree, as in `StaticTree`; empty where plain decoding is the fastest.
    depth: levels that are drafted.
    tau: expected acceptance length (tokens per target forward); 1 without drafts.
    tokens_per_second: expected.
    """

    paths: tuple[Ranks, ...]
    depth: int
    tau: float
    tokens_per_second: float


class Sequoia:
    """Sequoia's dynamic programme over the size and depth of a tree, for all sizes and depths up to a limit at once.

    The children of a kept node are filled from the last rank to the first: with a subtree of `a` nodes, itself included, the child
    of rank `k` adds `p_k (1 + best(a - 1 nodes, one level less))`, and the nodes that are left go to the ranks behind it. This is
    the paper's recurrence without the root, and with a table's row in addition to its level where acceptance differs by depth.

    Assumes that a child's acceptance depends on its rank and depth only, and that a node's children are its first ones, without
    gaps: under the rejection rule, a child is tried only after all children before it. `calibration.sparse_tree` assumes the same
    of acceptance, but lets a node have any of its children, as the coupled rule does; then the most probable paths are optimal.
    Where no share exceeds that of the rank before it, both trees have the same tau; elsewhere the sparse tree's is at least as
    large.

    table: [depth][rank] how often the child of that rank is the decided token, given that its parent is kept. The paper's vector by
        rank is a table of one depth, because levels beyond the table have the shares of its last one.
    max_nodes: most drafts of a tree; the root is not counted.
    max_depth: most levels of a tree.
    The time is proportional to max_depth * depths and ranks of the table * max_nodes ** 2.
    Raises ValueError for an empty table, for shares outside [0, 1], and for a limit below 1.

    Attributes:
    taus: [max_depth + 1, max_nodes + 1] the largest expected tau of a tree of at most so many levels and drafts.
    """

    def __init__(self, table: Table, max_nodes: int, max_depth: int) -> None:
        require(len(table) > 0 and all(map(len, table)), "table", table, "given for at least one depth and rank")
        require(all(0 <= share <= 1 for row in table for share in row), "table", table, "shares in [0, 1]")
        require(max_nodes >= 1, "max_nodes", max_nodes, "at least 1")
        require(max_depth >= 1, "max_depth", max_depth, "at least 1")
        self._table, self._last = table, len(table) - 1
        self.max_nodes, self.max_depth = max_nodes, max_depth
        self._gains: dict[tuple[int, int], list[Array]] = {}
        for levels in range(max_depth + 1):
            for row in range(min(self._last, max_depth - levels) + 1):
                self._gains[row, levels] = self._solve(row, levels)
        self.taus: Array = 1 + np.stack([self._gains[0, levels][0] for levels in range(max_depth + 1)])

    def tree(self, nodes: int, depth: int) -> tuple[Ranks, ...]:
        """The tree of at most `nodes` drafts and `depth` levels with the largest expected tau: its paths, level by level.

        It has fewer drafts where more of them would add nothing. Raises ValueError for more than the limits.
        """
        require(0 <= nodes <= self.max_nodes, "nodes", nodes, f"at least 0 and at most max_nodes, {self.max_nodes}")
        require(0 <= depth <= self.max_depth, "depth", depth, f"at least 0 and at most max_depth, {self.max_depth}")
        paths: list[Ranks] = []
        parents: list[tuple[Ranks, int]] = [((), nodes)]  # and how many drafts are below each
        while parents:
            path, below = parents.pop()
            sizes = self._split(len(path), depth - len(path), below)
            children = [((*path, rank), size - 1) for rank, size in enumerate(sizes)]
            paths += [child for child, _ in children]
            parents += children
        return tuple(sorted(paths, key=lambda path: (len(path), path)))

    def choose(self, forward_seconds: Sequence[float], draft_seconds: Sequence[float]) -> SequoiaChoice:
        """The size and depth with the most expected tokens per second, as in the paper's hardware-aware search.

        forward_seconds: [drafts + 1] of a target forward that verifies 0, 1, 2, ... drafts.
        draft_seconds: [depth + 1] of drafting 0, 1, 2, ... levels.
        Sizes and depths beyond these lists or beyond the limits are not considered.
        Raises ValueError for an empty list, a forward without time and a negative time.
        """
        forward = np.asarray(forward_seconds, dtype=np.float64)[: self.max_nodes + 1]
        drafting = np.asarray(draft_seconds, dtype=np.float64)[: self.max_depth + 1]
        require(forward.size > 0 and bool((forward > 0).all()), "forward_seconds", forward_seconds, "positive, at least one")
        require(drafting.size > 0 and bool((drafting >= 0).all()), "draft_seconds", draft_seconds, "0 or positive, at least one")
        taus = self.taus[: drafting.size, : forward.size]
        rates = taus / (drafting[:, None] + forward)
        depth, nodes = map(int, np.unravel_index(np.argmax(rates), rates.shape))  # of equal rates the first: the smallest tree
        return SequoiaChoice(self.tree(nodes, depth), depth, float(taus[depth, nodes]), float(rates[depth, nodes]))

    def _solve(self, row: int, levels: int) -> list[Array]:
        """[ranks + 1] of [max_nodes + 1]: the most expected kept tokens among a kept node's children from each rank on.

        row: of the table, for these children.
        levels: most levels below the node.
        """
        gains = [np.zeros(self.max_nodes + 1)]
        for rank in reversed(range(len(self._table[row]) if levels else 0)):
            with_child = _max_plus(self._child(row, levels, rank), gains[0])
            gains.insert(0, np.maximum(with_child, 0))
        return gains

    def _child(self, row: int, levels: int, rank: int) -> Array:
        """[max_nodes + 1] expected kept tokens of a child and its subtree, by the number of drafts in both; -inf for no draft."""
        below = self._gains[min(row + 1, self._last), levels - 1][0]
        return np.concatenate([[-np.inf], self._table[row][rank] * (1 + below[:-1])])

    def _split(self, depth: int, levels: int, nodes: int) -> list[int]:
        """How many drafts each child of a node of this depth has in its subtree, itself included."""
        row = min(depth, self._last)
        gains, sizes = self._gains[row, levels], []
        for rank, gain in enumerate(gains[:-1]):
            if gain[nodes] <= 0:  # neither this child nor those behind it add anything
                break
            sums = self._child(row, levels, rank)[: nodes + 1] + gains[rank + 1][nodes::-1]
            sizes.append(int(np.argmax(sums)))
            nodes -= sizes[-1]
        return sizes


def _max_plus(first: Array, second: Array) -> Array:
    """The (max, +) convolution: `result[m]` is the largest `first[a] + second[m - a]`. All are [n]."""
    size = len(first)
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([np.full(size - 1, -np.inf), second]), size)
    reverse = first[::-1].copy()  # windows[m, i] is second[m - a] for a = size - 1 - i, and -inf where a > m
    result = np.empty(size)
    for start in range(0, size, _BLOCK):
        end = min(size, start + _BLOCK)
        result[start:end] = (windows[start:end, size - end :] + reverse[size - end :]).max(-1)
    return result
