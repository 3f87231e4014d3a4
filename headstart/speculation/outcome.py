"""What a planner that learns is told of each round. Must not import models or drafters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Load:
    """The rows of the next round.

    stems: per row, the number of stem nodes.
    contexts: per row, the number of tokens in the cache.
    temperature: mean sampling temperature of the rows.
    """

    stems: tuple[int, ...]
    contexts: tuple[int, ...]
    temperature: float

    @property
    def num_stems(self) -> int:
        """Stem nodes of all rows."""
        return sum(self.stems)

    @property
    def context(self) -> int:
        """Tokens in the cache, of all rows."""
        return sum(self.contexts)


@dataclass(frozen=True)
class Outcome:
    """What a round did.

    num_drafting: rows that could draft; 0: the drafter was not asked.
    depth: levels drafted.
    num_drafts: drafts verified.
    gain: sum of their chances: the kept drafts that were expected.
    num_kept: kept drafts.
    draft_seconds, forward_seconds: of drafting, and of the target forward.
    """

    num_drafting: int
    depth: int
    num_drafts: int
    gain: float
    num_kept: int
    draft_seconds: float
    forward_seconds: float


@runtime_checkable
class LearningPlanner(Protocol):
    """A planner that learns from the rounds."""

    def see(self, load: Load) -> None:
        """Take notice of the next round's rows, before `plan`."""
        ...

    def learn(self, outcome: Outcome) -> None:
        """Take notice of the round that `see` announced."""
        ...

    def restart(self) -> None:
        """Forget that drafting did not pay: there is a new request."""
        ...
