"""The target's memory: keys and values of every seat, allocated once, moved only by `commit` and `fork`.

    slots of one seat after score(), before commit()
    [0 ............ length) [length .................... length + nodes) .............. capacity)
     committed, slot = position   stem, then drafts in forest order; all but the kept path is garbage after commit

This file knows seats and slots. It refuses to know tokens, trees and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seat:
    """A contiguous run of slots: [start, start + capacity)."""

    start: int
    capacity: int


class Seating:
    """Who sits where: hands out runs of slots and takes them back. Plain Python; shared by all caches that mirror each other."""

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
        return tuple(self._seats)

    @property
    def num_free(self) -> int:
        return sum(run.capacity for run in self._free)

    @property
    def num_used(self) -> int:
        return sum(run.capacity for run in self._seats.values())

    def find(self, capacity: int) -> Seat | None:
        """The smallest free run that fits, or None."""
        if len(self._seats) == self.num_seats:
            return None
        fitting = [run for run in self._free if run.capacity >= capacity]
        return min(fitting, key=lambda run: run.capacity) if fitting else None

    def take(self, capacity: int) -> int | None:
        """The lowest free seat number, now holding `capacity` slots; None if no run is long enough."""
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

    def give_back(self, seat: int) -> None:
        runs = sorted([*self._free, self._seats.pop(seat)], key=lambda run: run.start)
        merged = [runs[0]]
        for run in runs[1:]:
            last = merged[-1]
            if last.start + last.capacity == run.start:
                merged[-1] = Seat(last.start, last.capacity + run.capacity)
            else:
                merged.append(run)
        self._free = merged

    def snapshot(self) -> tuple[dict[int, Seat], list[Seat]]:
        """Who sits where now, for `restore`."""
        return dict(self._seats), list(self._free)

    def restore(self, snapshot: tuple[dict[int, Seat], list[Seat]]) -> None:
        """Back to a snapshot, which stays as it is."""
        seats, free = snapshot
        self._seats, self._free = dict(seats), list(free)

    def check(self) -> None:
        """Assert that every slot is free or used, once."""
        runs = sorted([*self._free, *self._seats.values()], key=lambda run: run.start)
        ends = [0, *(run.start + run.capacity for run in runs)]
        assert [run.start for run in runs] == ends[:-1], "slots overlap or are lost"
        assert ends[-1] == self.num_slots, "slots are lost at the end"


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores per token."""

    kv_heads: int
    key_dim: int
    value_dim: int

    def slot_bytes(self, dtype: torch.dtype) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class KVCache:
    """Keys and values of all layers for the seats of a `Seating`.

    Everything of equal width lives in one tensor [stack, slots, dim], so that a commit is one gather for all layers.
    `lengths[seat]` is how many of a seat's slots are committed; slot = position there.
    """

    def __init__(self, shapes: Sequence[LayerShape], seating: Seating, device: torch.device | str, dtype: torch.dtype) -> None:
        self.seating = seating
        self.lengths = [0] * seating.num_seats
        self.bytes = sum(shape.slot_bytes(dtype) for shape in shapes) * seating.num_slots
        heights: dict[int, int] = {}
        places: list[list[tuple[int, int, int]]] = []  # per layer: (dim, first, last) of its keys and of its values
        for shape in shapes:
            place = []
            for dim in (shape.key_dim, shape.value_dim):
                first = heights.get(dim, 0)
                heights[dim] = first + shape.kv_heads
                place.append((dim, first, heights[dim]))
            places.append(place)
        try:
            self._stores = {
                dim: torch.zeros(height, seating.num_slots, dim, dtype=dtype, device=device) for dim, height in heights.items()
            }
        except RuntimeError as error:  # torch's out-of-memory errors on every device
            what = f"a cache of {seating.num_slots} slots takes {self.bytes / 2**30:.2f} GiB, which {device} does not have"
            raise ValueError(f"{what}; give less memory, or fewer rows") from error
        self._layers = [tuple(self._stores[dim][first:last] for dim, first, last in place) for place in places]

    def layer(self, index: int) -> tuple[Tensor, ...]:
        """Keys and values of a layer, each [kv_heads, slots, dim], all seats."""
        return self._layers[index]

    def commit(self, seats: Sequence[int], stems: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        """Keep each row's stem and the drafts `kept` (places in its run of drafts, ascending) and forget the rest."""
        sources: list[int] = []
        targets: list[int] = []
        for seat, stem, drafts in zip(seats, stems, kept, strict=True):
            first = self.seating[seat].start + self.lengths[seat] + stem
            moves = [(first + place, first + rank) for rank, place in enumerate(drafts) if place != rank]
            sources += [source for source, _ in moves]
            targets += [target for _, target in moves]
            self.lengths[seat] += stem + len(drafts)
        self._move(sources, targets)

    def fork(self, source: int, seat: int, length: int) -> None:
        """Copy the first `length` committed slots of one seat to another."""
        assert length <= self.lengths[source], "fork beyond what is committed"
        assert length <= self.seating[seat].capacity, "fork into a seat that is too small"
        start, end = self.seating[source].start, self.seating[seat].start
        for store in self._stores.values():
            store[:, end : end + length] = store[:, start : start + length]
        self.lengths[seat] = length

    def free(self, seat: int) -> None:
        """Forget a seat's content; its slots go back through the seating."""
        self.lengths[seat] = 0

    def _move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Gather, then scatter: a kept path only ever moves towards the front."""
        if not sources:
            return
        for store in self._stores.values():
            places = torch.tensor([sources, targets]).to(store.device, non_blocking=True)
            store.index_copy_(1, places[1], store.index_select(1, places[0]))
