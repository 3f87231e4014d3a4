"""Where time and tokens went, over any number of rounds."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple


class Part(NamedTuple):
    """One row's part in a round.

    nodes: its stem and its drafts.
    tried, held: depth of its deepest draft and of its deepest kept one.
    tokens: how many were emitted.
    seconds: its share.
    """

    nodes: int
    drafts: int
    tried: int
    held: int
    tokens: int
    seconds: dict[str, float]


@dataclass
class Stats:
    """Where time and tokens went, of an engine or of one request.

    Of an engine: all rounds that counted. Of a request: the rounds in which it had a row, with its own nodes, drafts and tokens.
    seconds: draft, score, verify, commit, host (all the rest of a round); of a request, its share: a round's time divided by the
    rows of that round, so that the requests' seconds sum to the engine's.
    """

    rounds: int = 0
    row_rounds: int = 0  # rounds in which a row emitted something, summed over rows
    tokens: int = 0
    nodes: int = 0
    drafts: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("draft", "score", "verify", "commit", "host"), 0.0))
    tried: list[int] = field(default_factory=list)  # per depth: rows that had a draft there
    held: list[int] = field(default_factory=list)  # per depth: rows that kept one

    def __repr__(self) -> str:
        acceptance = " ".join(f"{share:.2f}" for share in self.acceptance[:6]) + (" ..." if len(self.acceptance) > 6 else "")
        by_depth = f", acceptance by depth {acceptance}" if acceptance else ""
        return f"<Stats {self.tokens} tokens in {self.rounds} rounds, tau {self.tau:.2f}{by_depth}>"

    @property
    def tau(self) -> float:
        """Tokens emitted per round and row; plain decoding has 1."""
        return self.tokens / self.row_rounds if self.row_rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """By depth: how often a draft there was kept, of the rounds that had one."""
        return [held / tried if tried else 0.0 for held, tried in zip(self.held, self.tried, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the numbers, and what follows from them."""
        return asdict(self) | {"tau": self.tau, "acceptance": self.acceptance}

    def copy(self) -> Stats:
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
    def of(cls, parts: Iterable[Part]) -> Stats:
        """Of one request, from its parts in rounds."""
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
        """What was added after `before` was copied."""
        more = self.copy()
        for name in ("rounds", "row_rounds", "tokens", "nodes", "drafts"):
            setattr(more, name, getattr(self, name) - getattr(before, name))
        more.seconds = {share: spent - before.seconds[share] for share, spent in self.seconds.items()}
        for mine, old in ((more.tried, before.tried), (more.held, before.held)):
            mine[: len(old)] = [now - then for now, then in zip(mine, old, strict=False)]
        return more

    def count(self, tried: int, held: int, emitted: int) -> None:
        self.row_rounds += 1
        self.tokens += emitted
        while len(self.tried) < tried:
            self.tried.append(0)
            self.held.append(0)
        for depth in range(tried):
            self.tried[depth] += 1
            self.held[depth] += depth < held
