"""The tree of a row in a round, for pages that draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headstart.speculation.tree import ROOT, Forest
from headstart.speculation.verify import Verdict


@dataclass(frozen=True)
class DrawnTree:
    """The drafts of one row in one round. One entry per draft, parents first.

    root: the token that they follow.
    tokens: token ids.
    parents: indices into this list; -1: the root.
    chances: estimated acceptance probabilities, each the product along the path.
    kept: whether it became part of the text.
    sources: the number of the drafter that proposed it.
    """

    root: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    chances: tuple[float, ...]
    kept: tuple[bool, ...]
    sources: tuple[int, ...]


def drawn_trees(forest: Forest, verdict: Verdict, roots: Sequence[int]) -> list[DrawnTree]:
    """The trees of all rows. roots: per row, its root. Costs a host synchronisation on a GPU."""
    drafts = forest.drafts
    tokens, parents, sources = torch.stack([drafts.tokens, drafts.parents, drafts.sources]).tolist()
    chances, first, trees = drafts.chances.tolist(), 0, []
    for row, count in enumerate(verdict.counts):
        own, kept = slice(first, first + count), set(verdict.kept[row])
        trees.append(
            DrawnTree(
                root=roots[row],
                tokens=tuple(tokens[own]),
                parents=tuple(parent if parent == ROOT else parent - first for parent in parents[own]),
                chances=tuple(chances[own]),
                kept=tuple(draft in kept for draft in range(count)),
                sources=tuple(sources[own]),
            )
        )
        first += count
    return trees
