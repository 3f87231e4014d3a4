"""Requests and the scheduler: which requests have seats, and which tokens the next round scores. No tensors here.

Continuous batching. A request waits until enough slots are free for all that it may ever need, and keeps its seat until it ends.
Or it gets slots for its text and some tokens more, its seat grows, and where there is no room left, the request that came last
loses its seat and waits again (preemption). Must not import the module of any one drafter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headstart.engine.events import EventQueue
from headstart.engine.stats import Part, Stats
from headstart.speculation.constraints import Constraint
from headstart.speculation.params import SamplingParams
from headstart.target.cache import Seating


class Piece(Protocol):
    """What a text stream returns for some tokens."""

    @property
    def text(self) -> str:
        """Text that became final."""
        ...

    @property
    def num_tokens_used(self) -> int:
        """How many of the pushed tokens belong to the answer."""
        ...

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the answer, or None."""
        ...


class Stream(Protocol):
    """Turns the tokens of one answer into text; `headstart.text.text_stream.TextStream` is one.

    A round pushes to a copy, which replaces the original when the round counts.
    """

    def copy(self) -> Stream:
        """A copy in the same state."""
        ...

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Add tokens."""
        ...

    def flush(self) -> Piece:
        """End the text: what was held back becomes final."""
        ...


@dataclass(eq=False)
class Request:
    """One prompt to be continued, and its state.

    id: unique in its engine.
    prompt: token ids.
    params: how to sample and where to stop.
    seed: the one that is used; `params.seed` may be None.
    stop_ids: tokens that end the answer.
    stream: turns its tokens into text, or None.
    leader: another request with the same prompt, whose keys and values are copied instead of computed again; or None.
    queue: where its events go; None: `Engine.step` returns them.
    constraint: which tokens may follow its output; None: any.
    draws_trees: whether its events have the trees of their rounds.
    output: token ids emitted so far.
    guessed: per token of `output`, whether a drafter had proposed it.
    logprobs: per token of `output` its log-probability and those of the best alternatives; empty if not asked for.
    seat: its place in the cache, or None while it waits and after it ends.
    scored: how many of its tokens are committed to the cache.
    finish_reason: None until it ends, then "stop", "length", "abort", or "error" where its stream raised.
    rounds: its part in each round.
    drafts: whether the drafter drafts for it. False after a drafter lost its state for good or failed twice in a row.
    is_lost: whether the drafter has to be told its text again, after a round that failed.
    num_copied: tokens whose keys and values were copied from another text when it last got a seat.
    num_preempted: how often it lost its seat.
    """

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int] = frozenset()
    stream: Stream | None = None
    leader: Request | None = None
    queue: EventQueue | None = None
    constraint: Constraint | None = None
    draws_trees: bool = False
    output: list[int] = field(default_factory=list)
    guessed: list[bool] = field(default_factory=list)
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    seat: int | None = None
    scored: int = 0
    finish_reason: str | None = None
    rounds: list[Part] = field(default_factory=list)
    drafts: bool = True
    is_lost: bool = False
    num_copied: int = 0
    num_preempted: int = 0

    @property
    def stats(self) -> Stats:
        """Statistics of its own rounds."""
        return Stats.of(self.rounds)

    @property
    def length(self) -> int:
        """How many tokens are known: prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def left(self) -> int:
        """How many tokens it may still emit."""
        return self.params.max_tokens - len(self.output)

    def known(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens [start, stop) of prompt and output."""
        size = len(self.prompt)
        if start >= size:
            return tuple(self.output[start - size : stop - size])
        return self.prompt[start:stop] + tuple(self.output[: max(0, stop - size)])


@dataclass(frozen=True)
class Turn:
    """A row of the next round.

    request: whose row it is.
    stem: the known tokens to be scored.
    ends_at_root: whether the stem ends with the last known token, the root; False for a cut prompt.
    """

    request: Request
    stem: tuple[int, ...]
    ends_at_root: bool


class Scheduler:
    """Waiting requests, running requests, and the stems of the next round.

    seating: seats and their slots, shared with the caches.
    headroom: slots that each seat needs beyond its text, for drafts.
    chunk: prompt tokens scored in one round, over all rows (chunked prefill).
    max_rows: requests that run at once.
    ahead: tokens of output for which a seat has slots beforehand; None: for all that the request may emit.
    """

    def __init__(self, seating: Seating, headroom: int, chunk: int, max_rows: int | None = None, ahead: int | None = None) -> None:
        self.seating = seating
        self.headroom = headroom
        self.chunk = chunk
        self.max_rows = max_rows or seating.num_seats
        self.ahead = ahead
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self.waiting and not self.running

    def slots(self, request: Request) -> int:
        """How many slots a request may ever need."""
        return len(request.prompt) + request.params.max_tokens + self.headroom

    def check(self, request: Request) -> None:
        """Raise ValueError if even an empty cache could not hold a request."""
        if self.slots(request) > self.seating.num_slots:
            num_tokens = max(0, self.seating.num_slots - self.headroom)
            raise ValueError(
                f"prompt of {len(request.prompt)} tokens plus max_tokens={request.params.max_tokens} exceeds the cache, which "
                f"holds {num_tokens} tokens of one request; shorten the prompt, lower max_tokens, or allow more memory"
            )

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def slots_now(self, request: Request) -> int:
        """How many slots a request needs for its text so far and the tokens that it may emit soon."""
        whole = self.slots(request)
        return whole if self.ahead is None else min(whole, request.length + self.ahead + self.headroom)

    def next_ready(self) -> Request | None:
        """The first waiting request, if it may get a seat as soon as there are slots; None: nobody may."""
        is_full = len(self.running) >= self.max_rows
        return self.waiting[0] if self.waiting and not is_full and self._is_ready(self.waiting[0]) else None

    def seat(self, request: Request) -> bool:
        """Give the first waiting request a seat. Returns whether there were slots."""
        seat = self.seating.take(self.slots_now(request))
        if seat is not None:
            request.seat = seat
            self.waiting.popleft()
            self.running.append(request)
        return seat is not None

    def short(self) -> Request | None:
        """The first running request whose seat is too small for its next round; None: all have room."""
        for request in self.running:
            assert request.seat is not None, "a running request has a seat"
            if self.seating[request.seat].capacity < request.length + self.headroom:
                return request
        return None

    def preempt(self, request: Request) -> None:
        """Take a running request's seat; it waits again, before all others."""
        self.leave(request)
        request.scored = 0
        self.waiting.appendleft(request)

    def _is_ready(self, request: Request) -> bool:
        """Whether a request may get a seat. A follower waits until its leader's prompt is scored, or the leader has ended."""
        leader = request.leader
        if leader is None or leader.finish_reason is not None:
            return True
        return leader.seat is not None and leader.scored >= len(leader.prompt) - 1

    def turns(self, chunk: int | None = None) -> list[Turn]:
        """The rows of the next round: all running requests but those to whose text no part of the chunk falls.

        chunk: prompt tokens to score; None: `self.chunk`.
        """
        shares = self._shares(self.chunk if chunk is None else chunk)
        turns: list[Turn] = []
        for request in self.running:
            pending = request.length - request.scored
            size = 1 if pending == 1 else shares[request.id]
            if size:
                stem = request.known(request.scored, request.scored + size)
                turns.append(Turn(request, stem, size == pending))
        return turns

    def _shares(self, chunk: int) -> dict[int, int]:
        """Tokens of the chunk for each request with more than one token to score.

        Half of it is for the request that came first, so that nobody waits for ever; the rest is for the shortest first, so that a
        long prompt delays nobody.
        """
        pending = {request.id: request.length - request.scored for request in self.running}
        pending = {request: size for request, size in pending.items() if size > 1}
        first = next(iter(pending), None)
        shares, left = dict.fromkeys(pending, 0), chunk
        if first is not None:
            shares[first] = min(pending[first], (left + 1) // 2)
            left -= shares[first]
        for request in sorted(pending, key=pending.__getitem__):
            more = min(pending[request] - shares[request], left)
            shares[request] += more
            left -= more
        return shares

    def leave(self, request: Request) -> None:
        """Remove a request and free its seat."""
        if request in self.running:
            self.running.remove(request)
        if request in self.waiting:
            self.waiting.remove(request)
        if request.seat is not None:
            self.seating.give_back(request.seat)
            request.seat = None
