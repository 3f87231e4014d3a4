"""What every node of a forward sees, as tensors on the device: the attention mask of all rows at once, for GPUs.

`RowMask` is the reference for one row; `ForestRows` and `LevelRows` make a `FlatMask`. This module must not import models.

    slots of a row   [start ........ start + committed) [ .................. start + committed + span)
    columns           -                                  0 ... scratch, then this forward's nodes ... span - 1
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from headstart.target.row_mask import Window

T = TypeVar("T")


class MaskTensors(NamedTuple):
    """The tensors of a `FlatMask` that decide what a node sees, alone: a compiler follows nothing else of it."""

    starts: Tensor
    committed: Tensor
    rows: Tensor
    columns: Tensor
    tree: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class FlatMask:
    """What the nodes of a forward see. The last row has no nodes of its own: it is that of dead nodes, in the cache's sink slot.

    starts, committed: [rows + 1] int64, first slot of each row's seat, and how many slots all its nodes see; sink and 0 for the
        dead.
    firsts: [rows + 1] int64, index of each row's first node.
    rows, columns: [nodes] int64, the row of each node, and its index behind the row's committed slots; 0 for a dead one.
    tree: [nodes, span] bool, which columns each node sees.
    positions: [rows + 1, span] int64, position of each column in the row's text.
    most_nodes, context: upper bounds, on the host, of a row's nodes and of its committed slots and columns together.
    sink: index of the sink slot.
    seat: where there is one row, and the host knows its place: its slots, committed ones and columns; else None.
    """

    starts: Tensor
    committed: Tensor
    firsts: Tensor
    rows: Tensor
    columns: Tensor
    tree: Tensor
    positions: Tensor
    most_nodes: int
    context: int
    sink: int
    seat: slice | None = None
    _notes: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Number of rows without that of dead nodes."""
        return self.starts.shape[0] - 1

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, computed once per forward."""
        if key not in self._notes:
            self._notes[key] = make()
        made: T = self._notes[key]
        return made

    @property
    def node_slots(self) -> Tensor:
        """[nodes] int64, the slot in which each node's key and value are written."""
        return self.once("node_slots", lambda: self.starts[self.rows] + self.committed[self.rows] + self.columns)

    def tensors(self) -> MaskTensors:
        """What `sees` reads."""
        return MaskTensors(self.starts, self.committed, self.rows, self.columns, self.tree, self.positions)

    def sees(self, nodes: Tensor, slots: Tensor, window: Window) -> Tensor:
        """As the function `sees`."""
        return sees(self.tensors(), nodes, slots, window)

    def lowest(self, window: Window) -> Tensor:
        """[rows + 1] int64, a slot of each row below which none of its nodes sees any."""
        first = torch.zeros_like(self.committed)
        if window.sliding is not None:
            first = torch.maximum(first, self.committed - window.sliding + 1)  # no node's position is below `committed`
        if window.chunk is not None:
            first = torch.maximum(first, self.committed // window.chunk * window.chunk)
        return self.starts + first


def sees(mask: MaskTensors, nodes: Tensor, slots: Tensor, window: Window) -> Tensor:
    """Whether nodes see slots of the KV cache, of any row. nodes, slots: int64 that broadcast. Returns bool in their shape."""
    row = mask.rows[nodes]
    offset = slots - mask.starts[row]  # in the seat
    column = offset - mask.committed[row]
    inside = column.clamp(0, mask.tree.shape[1] - 1)
    visible = (offset >= 0) & (column < mask.tree.shape[1]) & ((column < 0) | mask.tree[nodes, inside])
    if window.sliding is None and window.chunk is None:
        return visible
    query = mask.positions[row, mask.columns[nodes]]
    key = torch.where(column < 0, offset, mask.positions[row, inside])
    if window.sliding is not None:
        visible = visible & (query - key < window.sliding)
    if window.chunk is not None:
        visible = visible & (query // window.chunk == key // window.chunk)
    return visible
