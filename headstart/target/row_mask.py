"""The attention mask of a row in one forward: its nodes see committed slots and their own ancestors, within a window.

This module must not import models.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headstart.speculation.tree import Forest, count_by_row
from headstart.target.cache import KVCache


@dataclass(frozen=True)
class Window:
    """How far back a layer attends.

    Both limits count positions, not slots, because siblings in a tree share a position.

    sliding: size of the sliding window in tokens, the node itself included; None: unlimited.
    chunk: size of the chunks in tokens; a node sees its own chunk only (Llama 4); None: unlimited.
    """

    sliding: int | None = None
    chunk: int | None = None

    def hides(self, length: int) -> bool:
        """Whether any token of a text of `length` tokens is hidden from a later one."""
        return any(limit is not None and length > limit for limit in (self.sliding, self.chunk))


@dataclass(frozen=True, eq=False)
class RowMask:
    """What the nodes of one row see in one forward.

    first, last: the row's nodes are [first, last) of the flat forest.
    start: first slot of the row's seat.
    committed: number of committed slots, which every node sees.
    tree_mask: [nodes, scratch + nodes] bool, which scratch slots and which nodes of this forward each node sees, itself included;
        None: causal.
    positions: [scratch + nodes] int64, in tokens of the text.
    scratch: number of slots behind the committed ones that hold earlier nodes of this row (a drafter's levels).
    notes: values that a kernel computes once for all layers of this forward, under keys of its own.
    """

    first: int
    last: int
    start: int
    committed: int
    tree_mask: Tensor | None
    positions: Tensor
    scratch: int = 0
    _masks: dict[tuple[Window, torch.dtype], Tensor | None] = field(default_factory=dict)
    notes: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """Number of nodes of this row in this forward."""
        return self.last - self.first

    @property
    def context(self) -> int:
        """Number of slots that take part: committed, scratch, and this forward's nodes."""
        return self.committed + self.scratch + self.nodes

    def visible(self, window: Window = Window()) -> Tensor:
        """[nodes, context] bool: which slots each node sees in a layer with this window."""
        device = self.positions.device
        mask = self.tree_mask
        if mask is None:
            mask = torch.ones(self.nodes, self.scratch + self.nodes, dtype=torch.bool, device=device).tril(self.scratch)
        visible = torch.cat([mask.new_ones(self.nodes, self.committed), mask], 1)
        if window.hides(self.context):
            keys = torch.cat([torch.arange(self.committed, device=device), self.positions])
            queries = self.positions[self.scratch :, None]
            if window.sliding is not None:
                visible &= queries - keys < window.sliding
            if window.chunk is not None:
                visible &= queries // window.chunk == keys // window.chunk
        return visible

    def mask(self, window: Window, dtype: torch.dtype) -> Tensor | None:
        """Additive attention mask [nodes, context], or None where every node sees everything; made once per forward."""
        if self.nodes == 1 and self.tree_mask is None and not window.hides(self.context):
            return None
        if (window, dtype) not in self._masks:
            hidden = ~self.visible(window)
            self._masks[window, dtype] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, -torch.inf
            )
        return self._masks[window, dtype]


def row_masks(forest: Forest, cache: KVCache, seats: Sequence[int]) -> list[RowMask]:
    """The mask of each row of a forest. seats: the seat of each row in the KV cache."""
    masks: list[RowMask] = []
    first = draft = 0
    counts = count_by_row(forest.drafts, len(seats)) if forest.counts is None else forest.counts
    for seat, stem, count in zip(seats, forest.stems, counts, strict=True):
        last = first + stem + count
        mask = tree_mask(forest.lineage[draft : draft + count, draft : draft + count], stem) if count else None
        slots, length = cache.seating[seat], cache.lengths[seat]
        if length + last - first > slots.capacity:
            raise AssertionError(f"row of {last - first} nodes behind {length} exceeds its {slots.capacity} slots")
        masks.append(RowMask(first, last, slots.start, length, mask, forest.positions[first:last]))
        first, draft = last, draft + count
    return masks


def tree_mask(lineage: Tensor, stem: int) -> Tensor:
    """[stem + drafts, stem + drafts] bool: stem nodes see the stem up to themselves, drafts the stem and their ancestors.

    lineage: [drafts, drafts] bool, which drafts are ancestors of each draft, itself included.
    stem: number of known tokens before the drafts that are scored in this forward.
    """
    size = stem + lineage.shape[0]
    mask = torch.ones(size, size, dtype=torch.bool, device=lineage.device).tril_()
    mask[stem:, stem:] = lineage
    return mask
