"""The KV cache: keys and values of every seat, allocated once, moved only by `commit` and `fork`.

    slots of one seat after score(), before commit()
    [0 ............ length) [length .................... length + nodes) .............. capacity)
     committed, slot = position   stem, then drafts in forest order; all but the kept path is garbage after commit

A seat is a row's place in the cache. This module must not import tokens, trees or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seat:
    """A contiguous run of slots: [start, start + capacity).

    start: index of the first slot.
    capacity: number of slots.
    """

    start: int
    capacity: int


class Seating:
    """The allocator of seats: gives out runs of slots and takes them back. Shared by all caches with the same layout.

    num_seats: most seats at a time.
    num_slots: slots of all seats together.
    Raises ValueError where either is less than 1.
    """

    def __init__(self, num_seats: int, num_slots: int) -> None:
        if num_seats < 1 or num_slots < 1:
            raise ValueError(f"a cache of {num_slots} slots for {num_seats} rows holds nothing; allow more memory")
        self.num_seats = num_seats
        self.num_slots = num_slots
        self._seats: dict[int, Seat] = {}
        self._free: list[Seat] = [Seat(0, num_slots)]  # disjoint, ascending, never adjacent

    def __getitem__(self, seat: int) -> Seat:
        return self._seats[seat]

    @property
    def taken(self) -> tuple[int, ...]:
        """Numbers of the seats in use."""
        return tuple(self._seats)

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return sum(run.capacity for run in self._free)

    @property
    def num_used(self) -> int:
        """Number of slots of the seats in use."""
        return sum(run.capacity for run in self._seats.values())

    def find(self, capacity: int) -> Seat | None:
        """The smallest free run of at least `capacity` slots; None where there is none, or no free seat."""
        if len(self._seats) == self.num_seats:
            return None
        fitting = [run for run in self._free if run.capacity >= capacity]
        return min(fitting, key=lambda run: run.capacity) if fitting else None

    def take(self, capacity: int) -> int | None:
        """Take a seat of `capacity` slots. Returns its number, the lowest free one; None where `find` finds no run."""
        run = self.find(capacity)
        if run is None:
            return None
        self._free.remove(run)
        if run.capacity > capacity:
            self._free.append(Seat(run.start + capacity, run.capacity - capacity))
            self._free.sort(key=lambda free: free.start)
        number = next(seat for seat in range(self.num_seats) if seat not in self._seats)
        self._seats[number] = Seat(run.start, capacity)
        return number

    def extend(self, seat: int, capacity: int) -> bool:
        """Enlarge a seat to `capacity` slots by the free run behind it. Returns whether that run was long enough."""
        old = self._seats[seat]
        end, more = old.start + old.capacity, capacity - old.capacity
        behind = next((run for run in self._free if run.start == end and run.capacity >= more), None)
        if behind is None:
            return False
        index = self._free.index(behind)
        self._free[index : index + 1] = [Seat(end + more, behind.capacity - more)] if behind.capacity > more else []
        self._seats[seat] = Seat(old.start, capacity)
        return True

    def shrink(self, seat: int, capacity: int) -> None:
        """Free the slots of a seat beyond its first `capacity` ones."""
        old = self._seats[seat]
        if capacity < old.capacity:
            self._seats[seat] = Seat(old.start, capacity)
            self._release(Seat(old.start + capacity, old.capacity - capacity))

    def give_back(self, seat: int) -> None:
        """Free a seat's slots."""
        self._release(self._seats.pop(seat))

    def _release(self, freed: Seat) -> None:
        """Add a run to the free ones, and merge it with those beside it."""
        runs = sorted([*self._free, freed], key=lambda run: run.start)
        merged = [runs[0]]
        for run in runs[1:]:
            last = merged[-1]
            if last.start + last.capacity == run.start:
                merged[-1] = Seat(last.start, last.capacity + run.capacity)
            else:
                merged.append(run)
        self._free = merged

    def snapshot(self) -> tuple[dict[int, Seat], list[Seat]]:
        """The seats in use and the free runs, for `restore`."""
        return dict(self._seats), list(self._free)

    def restore(self, snapshot: tuple[dict[int, Seat], list[Seat]]) -> None:
        """Return to a snapshot, which is not changed and can be used again."""
        seats, free = snapshot
        self._seats, self._free = dict(seats), list(free)

    def check(self) -> None:
        """Assert that every slot belongs to exactly one free run or seat."""
        runs = sorted([*self._free, *self._seats.values()], key=lambda run: run.start)
        starts = [0, *(run.start + run.capacity for run in runs)]
        assert [run.start for run in runs] == starts[:-1], "slots overlap or are lost"
        assert starts[-1] == self.num_slots, "slots are lost at the end"


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores per token.

    kv_heads: number of key-value heads.
    key_dim, value_dim: width of a head's key and value.
    """

    kv_heads: int
    key_dim: int
    value_dim: int

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values in this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class KVCache:
    """Keys and values of all layers for the seats of a `Seating`.

    Keys and values of equal width share one tensor [kv_heads of all layers, slots, dim], so that a commit is one gather for all
    layers.

    shapes: what each layer stores per token.
    has_sink: whether there is one more slot, for forwards of all rows in one attention call.
    Raises ValueError where the device has no room.

    Attributes:
    seating: the seats.
    lengths: number of committed slots of each seat; in those, slot - start = position.
    bytes: memory of keys and values, without the sink's.
    sink: index of the slot behind those of all seats, which is written for dead nodes and read by no other node; None: without.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        seating: Seating,
        device: torch.device | str,
        dtype: torch.dtype,
        has_sink: bool = False,
    ) -> None:
        self.seating = seating
        self.lengths = [0] * seating.num_seats
        self.sink = seating.num_slots if has_sink else None
        self.bytes = sum(shape.slot_bytes(dtype) for shape in shapes) * seating.num_slots
        num_heads: dict[int, int] = {}  # by width
        ranges: list[list[tuple[int, int, int]]] = []  # per layer: (dim, first, last) of its keys and of its values
        for shape in shapes:
            layer_ranges = []
            for dim in (shape.key_dim, shape.value_dim):
                first = num_heads.get(dim, 0)
                num_heads[dim] = first + shape.kv_heads
                layer_ranges.append((dim, first, num_heads[dim]))
            ranges.append(layer_ranges)
        try:
            self._stores = {
                dim: torch.zeros(heads, seating.num_slots + has_sink, dim, dtype=dtype, device=device)
                for dim, heads in num_heads.items()
            }
        except RuntimeError as error:  # torch's out-of-memory errors on every device
            size = f"a cache of {seating.num_slots} slots takes {self.bytes / 2**30:.2f} GiB, which {device} does not have"
            raise ValueError(f"{size}; give less memory, or fewer rows") from error
        self._layers = [tuple(self._stores[dim][first:last] for dim, first, last in layer_ranges) for layer_ranges in ranges]

    def layer(self, index: int) -> tuple[Tensor, ...]:
        """Keys and values of a layer, each [kv_heads, slots, dim], for the slots of all seats, and the sink if there is one."""
        return self._layers[index]

    def commit(self, seats: Sequence[int], stems: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        """Commit the stem and some drafts of each row, and drop the rest.

        seats: of the rows. stems: number of stem nodes of each row. kept: indices among each row's drafts, ascending.
        """
        sources: list[int] = []
        targets: list[int] = []
        for seat, stem, drafts in zip(seats, stems, kept, strict=True):
            first = self.seating[seat].start + self.lengths[seat] + stem
            moves = [(first + draft, first + rank) for rank, draft in enumerate(drafts) if draft != rank]
            sources += [source for source, _ in moves]
            targets += [target for _, target in moves]
            self.lengths[seat] += stem + len(drafts)
        self._move(sources, targets)

    def fork(self, source: int, seat: int, length: int) -> None:
        """Copy the first `length` committed slots of one seat to another."""
        assert length <= self.lengths[source], "fork beyond what is committed"
        assert length <= self.seating[seat].capacity, "fork into a seat that is too small"
        first, target = self.seating[source].start, self.seating[seat].start
        for store in self._stores.values():
            store[:, target : target + length] = store[:, first : first + length]
        self.lengths[seat] = length

    def free(self, seat: int) -> None:
        """Drop the content of a seat. Its slots are given back by the seating."""
        self.lengths[seat] = 0

    def _move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots to other slots in all stores: all sources are read before a target is written."""
        if not sources:
            return
        for store in self._stores.values():
            slots = torch.tensor([sources, targets]).to(store.device, non_blocking=True)
            store.index_copy_(1, slots[1], store.index_select(1, slots[0]))
