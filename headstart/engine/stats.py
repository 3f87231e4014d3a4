"""Statistics of rounds: time, tokens, drafts and acceptance rates, of an engine or of one request."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from headstart.speculation.tree import Forest
    from headstart.speculation.verify import Verdict


@contextmanager
def clock(seconds: dict[str, float], share: str) -> Iterator[None]:
    """Add the time that the block takes to a share of `seconds`."""
    began = time.perf_counter()
    yield
    seconds[share] += time.perf_counter() - began


class Part(NamedTuple):
    """One row's part in a round.

    nodes: how many were scored, its stem and its drafts.
    drafts: how many were scored.
    tried: depth of its deepest draft.
    held: depth of its deepest kept draft.
    tokens: how many were emitted.
    seconds: its share of the round's seconds, by phase.
    """

    nodes: int
    drafts: int
    tried: int
    held: int
    tokens: int
    seconds: dict[str, float]


def parts_of(forest: Forest, verdict: Verdict, emitted: Sequence[int], seconds: dict[str, float]) -> list[Part]:
    """Each row's part in a round.

    emitted: per row, how many tokens it emitted.
    seconds: of the round, by phase; each row gets an equal share.
    """
    share = seconds if len(emitted) == 1 else {name: spent / len(emitted) for name, spent in seconds.items()}
    rows = zip(forest.stems, verdict.counts, verdict.tried, verdict.kept, emitted, strict=True)
    return [Part(stem + drafts, drafts, tried, len(kept), tokens, share) for stem, drafts, tried, kept, tokens in rows]


@dataclass
class Stats:
    """Statistics of an engine or of one request.

    Of an engine: over all rounds that counted. Of a request: over the rounds in which it had a row, its own nodes, drafts and
    tokens only.

    rounds: target forwards.
    row_rounds: rounds in which a row emitted something, summed over rows.
    tokens: emitted.
    nodes: scored by the target: stems (prefill included) and drafts.
    drafts: scored by the target.
    seconds: by phase: draft, score, verify, commit, host (all the rest of a round). Of a request, its share: a round's seconds
        divided by the rows of that round, so that the requests' seconds sum to the engine's.
    tried: per depth, in how many row rounds a draft there was verified.
    held: per depth, in how many row rounds a draft there was kept.
    """

    rounds: int = 0
    row_rounds: int = 0
    tokens: int = 0
    nodes: int = 0
    drafts: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("draft", "score", "verify", "commit", "host"), 0.0))
    tried: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def __repr__(self) -> str:
        acceptance = " ".join(f"{share:.2f}" for share in self.acceptance[:6]) + (" ..." if len(self.acceptance) > 6 else "")
        by_depth = f", acceptance by depth {acceptance}" if acceptance else ""
        return f"<Stats {self.tokens} tokens in {self.rounds} rounds, tau {self.tau:.2f}{by_depth}>"

    @property
    def tau(self) -> float:
        """Acceptance length: tokens emitted per target forward and row; plain decoding has 1."""
        return self.tokens / self.row_rounds if self.row_rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Acceptance rate by depth: of the row rounds with a draft there, the share that kept one."""
        return [held / tried if tried else 0.0 for held, tried in zip(self.held, self.tried, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """The fields, tau and acceptance as a dictionary for JSON."""
        return asdict(self) | {"tau": self.tau, "acceptance": self.acceptance}

    def copy(self) -> Stats:
        """An independent copy."""
        return copy.deepcopy(self)

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            rounds=self.rounds + other.rounds,
            row_rounds=self.row_rounds + other.row_rounds,
            tokens=self.tokens + other.tokens,
            nodes=self.nodes + other.nodes,
            drafts=self.drafts + other.drafts,
            seconds={share: spent + other.seconds[share] for share, spent in self.seconds.items()},
            tried=[a + b for a, b in zip_longest(self.tried, other.tried, fillvalue=0)],
            held=[a + b for a, b in zip_longest(self.held, other.held, fillvalue=0)],
        )

    @classmethod
    def of_round(cls, forest: Forest, verdict: Verdict, emitted: Sequence[int], seconds: dict[str, float]) -> Stats:
        """The statistics of one round of an engine.

        emitted: per row, how many tokens it emitted.
        seconds: of the round, by phase.
        """
        result = cls(rounds=1, nodes=len(forest), drafts=len(forest.drafts), seconds=seconds)
        for tried, kept, tokens in zip(verdict.tried, verdict.kept, emitted, strict=True):
            if tokens:
                result.count(tried, len(kept), tokens)
        return result

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Stats:
        """The statistics of one request, from its parts in rounds."""
        result = cls()
        for part in parts:
            result.rounds += 1
            result.nodes += part.nodes
            result.drafts += part.drafts
            for name, spent in part.seconds.items():
                result.seconds[name] += spent
            if part.tokens:
                result.count(part.tried, part.held, part.tokens)
        return result

    @classmethod
    def total(cls, parts: Iterable[Stats]) -> Stats:
        """The sum of several."""
        return sum(parts, cls())

    def since(self, before: Stats) -> Stats:
        """What was added since the copy `before` was made."""
        more = self.copy()
        for name in ("rounds", "row_rounds", "tokens", "nodes", "drafts"):
            setattr(more, name, getattr(self, name) - getattr(before, name))
        more.seconds = {share: spent - before.seconds[share] for share, spent in self.seconds.items()}
        for counts, old in ((more.tried, before.tried), (more.held, before.held)):
            counts[: len(old)] = [now - then for now, then in zip(counts, old, strict=False)]
        return more

    def count(self, tried: int, held: int, emitted: int) -> None:
        """Add one row of a round in place: depths of its deepest draft and its deepest kept draft, and its tokens."""
        self.row_rounds += 1
        self.tokens += emitted
        while len(self.tried) < tried:
            self.tried.append(0)
            self.held.append(0)
        for depth in range(tried):
            self.tried[depth] += 1
            self.held[depth] += depth < held
