"""Who sits where and what runs next. Plain Python: no tensor begins here.

A request waits until a run of slots is free that holds all it may ever need, so nothing runs out in mid-request. It then keeps
its seat until it ends. A round scores of each row what is known and not yet scored: the last token, or a piece of the prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headstart.engine.events import EventQueue
from headstart.engine.stats import Part, Stats
from headstart.speculation.params import SamplingParams
from headstart.target.cache import Seating


class Piece(Protocol):
    """Text that became final, how many of the pushed tokens belong to the answer, and the stop string that ended it."""

    @property
    def text(self) -> str: ...
    @property
    def num_tokens_used(self) -> int: ...
    @property
    def stopped(self) -> str | None: ...


class Stream(Protocol):
    """Turns the tokens of one answer into text; `headstart.text.text_stream.TextStream` is one.

    A round pushes to a copy, which takes the original's place when the round counts.
    """

    def copy(self) -> Stream: ...
    def push(self, token_ids: Sequence[int]) -> Piece: ...
    def flush(self) -> Piece: ...


@dataclass(eq=False)
class Request:
    """One prompt to be continued, and how far it has come.

    prompt, output: token ids. seed: the one really used. stream: turns its tokens into text, or None. leader: another request
    with the same prompt, whose slots are copied instead of scored again. queue: where its events go, or None: `Engine.step`
    returns them. finish_reason: None while it runs, then "stop", "length", "abort", or "error" where its stream raised.
    rounds: what each round gave it.
    drafts: whether the drafter drafts for it; a drafter that failed twice in a row does not.
    is_lost: whether the drafter has to be told its text again, after a round that failed.
    """

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int] = frozenset()
    stream: Stream | None = None
    leader: Request | None = None
    queue: EventQueue | None = None
    output: list[int] = field(default_factory=list)
    guessed: list[bool] = field(default_factory=list)
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    seat: int | None = None
    scored: int = 0
    finish_reason: str | None = None
    rounds: list[Part] = field(default_factory=list)
    drafts: bool = True
    is_lost: bool = False

    @property
    def stats(self) -> Stats:
        """Of its own rounds."""
        return Stats.of(self.rounds)

    @property
    def length(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def left(self) -> int:
        """Tokens it may still emit."""
        return self.params.max_tokens - len(self.output)

    def known(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens [start, stop) of prompt and output."""
        size = len(self.prompt)
        if start >= size:
            return tuple(self.output[start - size : stop - size])
        return self.prompt[start:stop] + tuple(self.output[: max(0, stop - size)])


@dataclass(frozen=True)
class Turn:
    """A row of the next round: the request, the tokens to be scored, and whether they end with the last one known."""

    request: Request
    stem: tuple[int, ...]
    is_whole: bool


class Scheduler:
    """Waiting requests, running ones, and the stems of the next round.

    headroom: slots that each seat needs beyond its text, for drafts. chunk: prompt tokens scored in one round, over all rows.
    """

    def __init__(self, seating: Seating, headroom: int, chunk: int) -> None:
        self.seating = seating
        self.headroom = headroom
        self.chunk = chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def slots(self, request: Request) -> int:
        """All that a request may ever need."""
        return len(request.prompt) + request.params.max_tokens + self.headroom

    def check(self, request: Request) -> None:
        """Raises ValueError if even an empty cache could not hold a request."""
        if self.slots(request) > self.seating.num_slots:
            room = max(0, self.seating.num_slots - self.headroom)
            raise ValueError(
                f"prompt of {len(request.prompt)} tokens plus max_tokens={request.params.max_tokens} exceeds the cache, which "
                f"holds {room} tokens of one request; shorten the prompt, lower max_tokens, or allow more memory"
            )

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Seat waiting requests, first come first served, while slots are free. Returns those that sat down."""
        seated: list[Request] = []
        while self.waiting and self._is_ready(self.waiting[0]):
            request = self.waiting[0]
            seat = self.seating.take(self.slots(request))
            if seat is None:
                break
            request.seat = seat
            self.waiting.popleft()
            self.running.append(request)
            seated.append(request)
        return seated

    def _is_ready(self, request: Request) -> bool:
        """A follower waits for its leader's prompt, unless the leader is gone: then it scores the prompt itself."""
        leader = request.leader
        if leader is None or leader.finish_reason is not None:
            return True
        return leader.seat is not None and leader.scored >= len(leader.prompt) - 1

    def turns(self) -> list[Turn]:
        """The rows of the next round: every running request whose stem fits; prompts share the chunk in order."""
        budget = self.chunk
        turns: list[Turn] = []
        for request in self.running:
            pending = request.length - request.scored
            size = pending if pending == 1 else min(pending, budget)
            if size == 0:
                continue
            budget -= size if pending > 1 else 0
            stem = request.known(request.scored, request.scored + size)
            turns.append(Turn(request, stem, size == pending))
        return turns

    def leave(self, request: Request) -> None:
        """Take a request out and free its seat."""
        if request in self.running:
            self.running.remove(request)
        if request in self.waiting:
            self.waiting.remove(request)
        if request.seat is not None:
            self.seating.give_back(request.seat)
            request.seat = None
