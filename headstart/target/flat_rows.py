"""The rows of a forward before their mask is made: a few integers per row, uploaded once, and tensors that the device has.

Their `flat_mask` is made of tensor operations only, without a loop over rows, nodes or context and without a host
synchronisation, so that a graph can capture it. This module must not import models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headstart.speculation.tree import Forest
from headstart.target.cache import KVCache
from headstart.target.flat_mask import FlatMask
from headstart.target.row_mask import RowMask


@dataclass(frozen=True)
class Buffer:
    """The shape of a graph's static input, and what fills it where a forward has less; a tuple: one filling per line."""

    shape: tuple[int, ...]
    filling: int | bool | tuple[int, ...] = 0


@dataclass(frozen=True, eq=False)
class ForestRows:
    """The rows of a forest in a forward, each a stem and the drafts behind it.

    table: [3, rows] int64: first slot of the seat, committed slots, stem nodes.
    positions: [nodes] int64, positions in the texts.
    draft_rows: [drafts] int64 ascending, the row of each draft; the number of rows for one that does not exist.
    lineage: [drafts, drafts] bool, see `lineage`.
    span: upper bound of a row's nodes. context: upper bound of its committed slots and nodes together. sink: the sink slot.
    seat: as in `FlatMask`.
    """

    table: Tensor
    positions: Tensor
    draft_rows: Tensor
    lineage: Tensor
    span: int
    context: int
    sink: int
    seat: slice | None = None

    @classmethod
    def of_forest(cls, forest: Forest, cache: KVCache, seats: Sequence[int]) -> ForestRows:
        """The rows of a forest. seats: the seat of each row."""
        most_drafts = len(forest.drafts) if forest.counts is None else max(forest.counts, default=0)
        tables = zip(seats, forest.stems, forest.counts or [0] * len(seats), strict=True)
        for seat, stem, count in tables:
            _check_room(cache, seat, stem + count)
        table = _table(cache, seats, forest.stems)
        span = max(forest.stems) + most_drafts
        rows = forest.drafts.rows
        context = max(cache.lengths[seat] for seat in seats) + span
        only = _only_seat(cache, seats, context)
        return cls(_send(table, rows.device), forest.positions, rows, forest.lineage, span, context, _sink(cache), only)

    @classmethod
    def of_texts(cls, cache: KVCache, seats: Sequence[int], lengths: Sequence[int], positions: Tensor) -> ForestRows:
        """Rows of known tokens only. lengths: nodes of each row. positions: [nodes], slots of the seats."""
        for seat, length in zip(seats, lengths, strict=True):
            _check_room(cache, seat, length)
        none = torch.empty(0, dtype=torch.int64, device=positions.device)
        context = max(cache.lengths[seat] + length for seat, length in zip(seats, lengths, strict=True))
        table, no_lineage = _send(_table(cache, seats, lengths), positions.device), none.new_empty(0, 0, dtype=torch.bool)
        only = _only_seat(cache, seats, context)
        return cls(table, positions, none, no_lineage, max(lengths), context, _sink(cache), only)

    def tensors(self) -> dict[str, Tensor]:
        """What differs from forward to forward, for a graph's buffers."""
        return {"table": self.table, "positions": self.positions, "draft_rows": self.draft_rows, "lineage": self.lineage}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ForestRows:
        """The same with other tensors, as `tensors` names them."""
        return replace(
            self,
            table=tensors["table"],
            positions=tensors["positions"],
            draft_rows=tensors["draft_rows"],
            lineage=tensors["lineage"],
        )

    def bucketed(self, context: int) -> Bucketed:
        """The static shape of a graph for rows like these. context: bound of its rows' context, in slots."""
        num_nodes, num_rows = node_bucket(len(self.positions)), bucket(self.table.shape[1])
        num_drafts = num_nodes if len(self.draft_rows) else 0
        buffers: dict[str, Buffer] = {
            "table": Buffer((3, num_rows), (self.sink, 0, 0)),
            "positions": Buffer((num_nodes,)),
            "draft_rows": Buffer((num_drafts,), num_rows),
            "lineage": Buffer((num_drafts, num_drafts), False),
        }
        return Bucketed(replace(self, span=num_nodes, context=context, seat=None), num_nodes, buffers)

    def flat_mask(self) -> FlatMask:
        """The mask of this forward. Tensor operations only."""
        starts, committed, stems = _with_sink_row(self.table, (self.sink, 0, 0))
        num_rows, device = self.table.shape[1], self.table.device
        first_drafts = torch.searchsorted(self.draft_rows, torch.arange(num_rows + 1, device=device))
        firsts = stems.cumsum(0) - stems + first_drafts
        nodes, span = torch.arange(len(self.positions), device=device), torch.arange(self.span, device=device)
        rows = torch.searchsorted(firsts, nodes, right=True) - 1
        columns = (nodes - firsts[rows]).masked_fill(rows == num_rows, 0)
        positions = self.positions[(firsts[:, None] + span).clamp(max=len(nodes) - 1)]
        tree = self._tree(rows, columns, stems, first_drafts, span)
        return FlatMask(starts, committed, firsts, rows, columns, tree, positions, self.span, self.context, self.sink, self.seat)

    def _tree(self, rows: Tensor, columns: Tensor, stems: Tensor, first_drafts: Tensor, span: Tensor) -> Tensor:
        """[nodes, span] bool: stem nodes see the stem up to themselves, drafts the stem and their ancestors."""
        columns = columns[:, None]
        if not len(self.draft_rows):
            return span <= columns
        stem = stems[rows][:, None]
        shift = first_drafts[rows][:, None] - stem  # from a column to the index of its draft
        last = len(self.draft_rows) - 1
        draft, ancestor = ((column + shift).clamp(0, last) for column in (columns, span))
        in_row = (span >= stem) & (columns >= stem) & (self.draft_rows[ancestor] == rows[:, None]) & (span + shift <= last)
        return torch.where(span < stem, span <= columns, in_row & self.lineage[draft, ancestor])


@dataclass(frozen=True, eq=False)
class LevelRows:
    """The rows of one level of a drafter's tree: equally many nodes each, behind the scratch of earlier levels.

    table: [2, rows] int64: first slot of the seat, committed slots.
    tree_mask: [rows, nodes per row, span] bool, which scratch slots and nodes of the level each node sees, itself included.
    positions: [rows, span] int64, positions of scratch and nodes.
    context: upper bound of committed slots and span together. sink: the sink slot. seat: as in `FlatMask`.
    """

    table: Tensor
    tree_mask: Tensor
    positions: Tensor
    context: int
    sink: int
    seat: slice | None = None

    @classmethod
    def of_level(cls, cache: KVCache, seats: Sequence[int], tree_mask: Tensor, positions: Tensor) -> LevelRows:
        """The rows of a level. seats: the seat of each row."""
        span = tree_mask.shape[2]
        for seat in seats:
            _check_room(cache, seat, span)
        context = max(cache.lengths[seat] for seat in seats) + span
        table, only = _send(_table(cache, seats)[:2], positions.device), _only_seat(cache, seats, context)
        return cls(table, tree_mask, positions, context, _sink(cache), only)

    def tensors(self) -> dict[str, Tensor]:
        """What differs from forward to forward, for a graph's buffers."""
        return {"table": self.table, "tree_mask": self.tree_mask, "positions": self.positions}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LevelRows:
        """The same with other tensors, as `tensors` names them."""
        return replace(self, table=tensors["table"], tree_mask=tensors["tree_mask"], positions=tensors["positions"])

    def bucketed(self, context: int) -> Bucketed:
        """The static shape of a graph for rows like these; a row more than there are has the sink as its seat, and dead nodes.

        context: bound of its rows' context, in slots.
        """
        num_rows, (_, width, span) = bucket(self.table.shape[1]), self.tree_mask.shape
        buffers = {
            "table": Buffer((2, num_rows), (self.sink, 0)),
            "tree_mask": Buffer((num_rows, width, span), False),
            "positions": Buffer((num_rows, span)),
        }
        return Bucketed(replace(self, context=context, seat=None), num_rows * width, buffers)

    def flat_mask(self) -> FlatMask:
        """The mask of this forward. Tensor operations only."""
        num_rows, width, span = self.tree_mask.shape
        starts, committed = _with_sink_row(self.table, (self.sink, 0))
        device = starts.device
        nodes = torch.arange(num_rows * width, device=device)
        rows = (nodes // width).masked_fill(starts[nodes // width] == self.sink, num_rows)
        columns = (span - width + nodes % width).masked_fill(rows == num_rows, 0)
        firsts = torch.arange(num_rows + 1, device=device) * width
        positions = torch.cat([self.positions, self.positions[:1]])
        tree = self.tree_mask.reshape(num_rows * width, span)
        return FlatMask(starts, committed, firsts, rows, columns, tree, positions, width, self.context, self.sink, self.seat)


FlatRows = ForestRows | LevelRows


@dataclass(frozen=True, eq=False)
class Bucketed:
    """The static shape of a graph.

    rows: what `with_tensors` turns into the rows of the graph. num_nodes: nodes of the graph. buffers: by name, as in `tensors`.
    """

    rows: FlatRows
    num_nodes: int
    buffers: dict[str, Buffer]


def bucket(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def node_bucket(size: int) -> int:
    """The number of nodes of a graph for `size` nodes: 1, 2, 4, then multiples of 8, of 32 above 64 and of 128 above 256."""
    if size <= 8:
        return bucket(size)
    step = 8 if size <= 64 else 32 if size <= 256 else 128
    return -(-size // step) * step


def text_rows(
    cache: KVCache, seats: Sequence[int], lengths: Sequence[int], positions: Tensor, is_flat: bool
) -> list[RowMask] | ForestRows:
    """The rows of a forward over known tokens, behind what each seat holds.

    lengths: nodes of each row. positions: [nodes], slots of the seats. is_flat: as tensors, else one mask per row.
    """
    if is_flat:
        return ForestRows.of_texts(cache, seats, lengths, positions)
    masks, first = [], 0
    for seat, length in zip(seats, lengths, strict=True):
        part = positions[first : first + length]
        masks.append(RowMask(first, first + length, cache.seating[seat].start, cache.lengths[seat], None, part))
        first += length
    return masks


def level_rows(
    cache: KVCache, seats: Sequence[int], tree_mask: Tensor, positions: Tensor, is_flat: bool
) -> list[RowMask] | LevelRows:
    """The rows of one level of a drafter's tree. Arguments as of `LevelRows`; is_flat: as tensors, else one mask per row."""
    if is_flat:
        return LevelRows.of_level(cache, seats, tree_mask, positions)
    _, width, span = tree_mask.shape
    return [
        RowMask(
            row * width, (row + 1) * width, cache.seating[seat].start, cache.lengths[seat], tree_mask[row], positions[row],
            span - width,
        )
        for row, seat in enumerate(seats)
    ]  # fmt: skip


def _only_seat(cache: KVCache, seats: Sequence[int], context: int) -> slice | None:
    """The slots of the only row, whose context the host knows exactly; None where there are more rows."""
    start = cache.seating[seats[0]].start
    return slice(start, start + context) if len(seats) == 1 else None


def _table(cache: KVCache, seats: Sequence[int], stems: Sequence[int] | None = None) -> list[list[int]]:
    """Per row: first slot of its seat, committed slots, stem nodes."""
    starts, committed = [cache.seating[seat].start for seat in seats], [cache.lengths[seat] for seat in seats]
    return [starts, committed, list(stems or [0] * len(seats))]


def _check_room(cache: KVCache, seat: int, nodes: int) -> None:
    length, capacity = cache.lengths[seat], cache.seating[seat].capacity
    if length + nodes > capacity:
        raise AssertionError(f"row of {nodes} nodes behind {length} exceeds its {capacity} slots")


def _sink(cache: KVCache) -> int:
    assert cache.sink is not None, "a KV cache without a sink; `pad_rows` was set after it was made"
    return cache.sink


def _send(table: list[list[int]], device: torch.device) -> Tensor:
    """A table of integers on the device, without a host synchronisation."""
    return torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)


def _with_sink_row(table: Tensor, sink_row: Sequence[int]) -> tuple[Tensor, ...]:
    """The lines of a table with the row of dead nodes behind them, made on the device: a graph cannot copy from the host."""
    return tuple(torch.cat([line, line.new_full((1,), value)]) for line, value in zip(table, sink_row, strict=True))
