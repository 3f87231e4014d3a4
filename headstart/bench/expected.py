"""The speed that is expected of static trees and chains, from recorded ranks and what rounds cost; no model runs here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from headstart.speculation.calibration import Ranks, Table, walk
from headstart.speculation.chains import chain, chain_lengths, round_seconds
from headstart.speculation.cost import CostModel
from headstart.speculation.sequoia import Sequoia

MOST_NODES = 256  # drafts per row, at most
BEAMS = (1, 2, 4, 8, 16)  # parents per level, for which the drafting of candidate trees is priced


@dataclass(frozen=True)
class Expected:
    """The fastest tree for a number of rows.

    rows: that decode at once, each with this tree.
    paths: the tree; empty: plain decoding.
    tau: acceptance length (tokens per target forward and row) behind the first token, replayed from the ranks.
    seconds: of a round.
    plain_seconds: of a round of plain decoding.
    """

    rows: int
    paths: tuple[Ranks, ...]
    tau: float
    seconds: float
    plain_seconds: float

    @property
    def depth(self) -> int:
        """Levels of the tree."""
        return max(map(len, self.paths), default=0)

    @property
    def tokens_per_second(self) -> float:
        """Of all rows."""
        return self.rows * self.tau / self.seconds

    @property
    def speed_up(self) -> float:
        """Ratio to plain decoding's tokens per second."""
        return self.tau * self.plain_seconds / self.seconds


@dataclass(frozen=True)
class Observed:
    """What is known of heads at one temperature.

    temperature: of sampling.
    table: [depth][rank] acceptance rates.
    texts: ranks by answer, as `walk` takes them.
    length: mean length of a text while it is answered, in tokens.
    """

    temperature: float
    table: Table
    texts: Sequence[Tensor]
    length: float

    @cached_property
    def programme(self) -> Sequoia:
        """The trees of every size and depth that these heads draft."""
        return Sequoia(self.table, MOST_NODES, len(self.table))

    def tau(self, paths: Iterable[Ranks]) -> float:
        """tau of a tree by replay, without the rounds that score prompts."""
        num_tokens = sum(len(ranks) + 1 for ranks in self.texts)
        num_rounds = num_tokens / walk(self.texts, paths)
        num_prompts = len(self.texts)  # each has one round that emits its first token
        return (num_tokens - num_prompts) / max(1.0, num_rounds - num_prompts)

    def fastest(self, cost: CostModel, rows: int) -> Expected:
        """The tree with the most expected tokens per second; plain decoding where nothing pays."""
        plain = self.expected(cost, rows, ())
        return max((plain, *(self.expected(cost, rows, paths) for paths in self._trees(cost, rows))), key=lambda one: one.speed_up)

    def expected(self, cost: CostModel, rows: int, paths: tuple[Ranks, ...]) -> Expected:
        """What a tree gives; () is plain decoding."""
        tau = self.tau(paths) if paths else 1.0
        return Expected(rows, paths, tau, self._seconds(cost, paths, rows), self._seconds(cost, (), rows))

    def _trees(self, cost: CostModel, rows: int) -> Iterator[tuple[Ranks, ...]]:
        """Candidates: chains, and Sequoia's choice if every level had so many parents."""
        yield from (chain(depth) for depth in range(1, len(self.table) + 1))
        context = round(rows * self.length)
        sizes = [rows * (1 + nodes) for nodes in range(MOST_NODES + 1)]
        forward = [cost.forward(size, rows, context) + cost.host(size, rows) for size in sizes]
        for beam in BEAMS:
            drafting = [cost.drafting(depth, beam, rows) for depth in range(len(self.table) + 1)]
            if paths := self.programme.choose(forward, drafting).paths:
                yield paths

    def _seconds(self, cost: CostModel, paths: tuple[Ranks, ...], rows: int) -> float:
        """Seconds of a round in which every row has this tree."""
        return round_seconds(cost, paths, rows, self.length)

    def chain_lengths(self, cost: CostModel, most_rows: int) -> tuple[int, ...]:
        """For 1, 2, ... rows, the length of the chain with the most expected tokens per second; 0: plain decoding."""
        return chain_lengths(self.table, cost, most_rows, self.length)
