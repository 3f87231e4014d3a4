"""Prefixes: texts whose keys and values are kept after their request has ended, for requests that begin with the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SHORTEST = 16  # tokens for which copying keys and values is worth its while


@dataclass(frozen=True)
class Prefix:
    """A text whose keys and values are in a seat.

    tokens: those that the seat holds.
    seat: their seat, of which no request is the owner.
    is_drafted: whether the drafter holds them, too.
    """

    tokens: tuple[int, ...]
    seat: int
    is_drafted: bool


class Prefixes:
    """Texts that were kept, least recently used first.

    most: how many are kept; 0: none.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: tuple[Prefix, ...] = ()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._kept)

    def keep(self, prefix: Prefix) -> None:
        """Keep a text, as the one used last."""
        self._kept = (*self._kept, prefix)

    def drop(self, prefix: Prefix) -> None:
        """Keep a text no longer."""
        self._kept = tuple(kept for kept in self._kept if kept is not prefix)

    def use(self, prefix: Prefix) -> None:
        """Note that a text was used."""
        self.drop(prefix)
        self.keep(prefix)

    def oldest(self, spared: Prefix | None = None) -> Prefix | None:
        """The text to drop first: the one least recently used; `spared` only where it is the last."""
        return next((kept for kept in self._kept if kept is not spared), self._kept[0] if self._kept else None)

    def clear(self) -> list[int]:
        """Keep none any longer. Returns their seats."""
        seats = [prefix.seat for prefix in self._kept]
        self._kept = ()
        return seats


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at their beginning two texts have in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # one[:low] are equal, one[:high + 1] are not
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
