"""How reliable chances (acceptance probabilities) are: of the drafts that were given a chance, how many were kept.

A draft counts where its parent was kept, with its chance given the parent. Must not import models or drafters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BINS = 10  # of equal width


class Compared(NamedTuple):
    """A draft whose parent was kept. source: number of its drafter. chance: given the parent. is_kept: what became of it."""

    source: int
    chance: float
    is_kept: bool


@dataclass
class Reliability:
    """Drafts by their chance, in `BINS` bins.

    counts: [bin] drafts. expected: [bin] sum of their chances. kept: [bin] how many of them were kept.
    """

    counts: list[int] = field(default_factory=lambda: [0] * BINS)
    expected: list[float] = field(default_factory=lambda: [0.0] * BINS)
    kept: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, chance: float, is_kept: bool) -> None:
        """Count a draft."""
        place = min(BINS - 1, int(chance * BINS))
        self.counts[place] += 1
        self.expected[place] += chance
        self.kept[place] += is_kept

    def __add__(self, other: Reliability) -> Reliability:
        names = ("counts", "expected", "kept")
        return Reliability(*([a + b for a, b in zip(getattr(self, n), getattr(other, n), strict=True)] for n in names))

    @property
    def error(self) -> float | None:
        """Expected calibration error (Guo et al. 2017): mean of |mean chance - frequency| over bins, weighted by their sizes.

        None without drafts.
        """
        total = sum(self.counts)
        gaps = (abs(expected - kept) for expected, kept in zip(self.expected, self.kept, strict=True))
        return sum(gaps) / total if total else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the error, and of each bin that has drafts the mean chance, the share that was kept, and the count."""
        bins = zip(self.counts, self.expected, self.kept, strict=True)
        points = [{"chance": expected / count, "kept": kept / count, "count": count} for count, expected, kept in bins if count]
        return {"error": self.error, "bins": points}


def count_all(records: dict[int, Reliability], compared: Iterable[Compared]) -> None:
    """Count drafts in the records of their sources."""
    for source, chance, is_kept in compared:
        if source not in records:
            records[source] = Reliability()
        records[source].add(chance, is_kept)


def by_name(records: Mapping[int, Reliability], names: Sequence[str]) -> dict[str, Reliability]:
    """The records by the name of the source, and of several sources first that of all drafts together.

    names: of the sources, by number.
    """
    named = {names[source]: record for source, record in sorted(records.items())}
    return {"all": sum(named.values(), Reliability()), **named} if len(named) > 1 else named
