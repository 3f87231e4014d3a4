"""What a round of an engine changes: requests, seats, cache, penalties, the drafter and events; all of it counts, or none of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headstart.engine.drafter_state import DrafterState
from headstart.engine.emission import emission_of, token_logprobs
from headstart.engine.events import Event, EventQueue
from headstart.engine.savepoint import Savepoint
from headstart.engine.scheduler import Request, Scheduler
from headstart.speculation.distribution import History
from headstart.target.cache import KVCache
from headstart.target.target import Target


class EngineState:
    """The mutable state of an engine, changed in transactions.

    target: for the size of `history` only.
    scheduler: has the requests and the seating.
    cache: KV cache of the target.
    drafter: told what becomes certain.
    history: token counts of the seats, for penalties; None until a request uses penalties.
    unread: events of requests without a queue of their own.
    """

    def __init__(self, target: Target, scheduler: Scheduler, cache: KVCache, drafter: DrafterState) -> None:
        self.target = target
        self.scheduler = scheduler
        self.cache = cache
        self.drafter = drafter
        self.history: History | None = None
        self.unread = EventQueue()
        self._savepoint: Savepoint | None = None  # while what changes does not count yet
        self._touched: list[EventQueue] = []  # queues with events that are not published yet

    # -- transactions --

    def transact(self, work: Callable[[], object], ending: Request | None = None) -> None:
        """Do the work as a whole or not at all: a round, or the end of a request.

        Where it raises, everything is as it was before. Otherwise its changes count, and its events are published.
        ending: the request that the work ends; None: the work is a round.
        """
        self.drafter.begin()
        self._savepoint = Savepoint(self.scheduler, self.cache, ending)
        try:
            work()
            self._count()
        except BaseException:
            self._roll_back()
            raise
        self._publish()

    def finish_interrupted(self) -> None:
        """Finish what an interrupted transaction left to do: roll back where it did not count, publish where it did."""
        if self._savepoint is not None:
            self._roll_back()
        self._publish()

    def _count(self) -> None:
        """From here on what has changed counts."""
        self.drafter.count()
        self._savepoint = None

    def _publish(self) -> None:
        """Let readers see the events that count. May be called again where it was interrupted."""
        for queue in self._touched:
            queue.publish()
        self._touched.clear()

    @torch.inference_mode()
    def _roll_back(self) -> None:
        """Return to the savepoint. May be called again where it was interrupted."""
        savepoint = self._savepoint
        if savepoint is None:  # it counts already
            return
        for queue in self._touched:
            queue.withdraw()
        self._touched.clear()
        seated = {request for request in savepoint.requests if request.seat is not None}
        self.drafter.mark_stale(seated)
        savepoint.restore()
        for request in self.scheduler.running:
            self._start_history(request)
        self.drafter.recover(seated.union(self.scheduler.running))
        self._savepoint = None

    # -- changes --

    def seat(self, request: Request) -> None:
        """Prepare the seat that a request has just got, with its leader's text where that can be copied."""
        assert request.seat is not None, "the request has no seat"
        self.cache.free(request.seat)
        self.drafter.seat(request)
        leader, length = request.leader, len(request.prompt) - 1
        if leader is not None and leader.seat is not None and length and self.drafter.can_fork(leader):
            self.cache.fork(leader.seat, request.seat, length)
            request.scored = length
            self.drafter.fork(leader, request, length)
        if request.params.has_penalties and self.history is None:
            self.history = History(self.scheduler.seating.num_seats, self.target.vocab, self.target.device)
        self._start_history(request)

    def _start_history(self, request: Request) -> None:
        if self.history is not None and request.params.has_penalties and request.seat is not None:
            self.history.start(request.seat, request.prompt, request.output)

    def emit(self, request: Request, decided: tuple[int, ...], logits: Tensor, asked: tuple[int, ...]) -> int:
        """Give a request what it emits of the decided tokens. Returns how many these are.

        decided: kept drafts, then the target's own token.
        logits: [asked, vocab] of the round.
        asked: per decided token, the index of its line in `logits`.
        """
        try:
            emission = emission_of(request, decided)
        except Exception as error:  # of its own text stream: the other rows go on
            self.finish(request, "error")
            self.put(Event(request, finish_reason="error", error=error))
            return 0
        tokens = emission.tokens
        request.stream = emission.stream
        request.output += tokens
        request.guessed += emission.guessed
        if request.params.logprobs is not None:
            request.logprobs += token_logprobs(logits, asked[: len(tokens)], tokens, request.params.logprobs)
        self._write_history(request, tokens)
        if emission.finish_reason is not None:
            self.finish(request, emission.finish_reason)
        self.put(Event(request, tokens, emission.guessed, emission.text, emission.finish_reason))
        return len(tokens)

    def _write_history(self, request: Request, tokens: tuple[int, ...]) -> None:
        if self.history is not None and request.params.has_penalties and request.seat is not None:
            self.history.write(request.seat, tokens)

    def put(self, event: Event) -> None:
        """Add an event to its request's queue. A reader sees it once the transaction counts."""
        queue = event.request.queue or self.unread
        self._touched.append(queue)
        queue.events.append(event)

    def finish(self, request: Request, reason: str) -> None:
        """End a request and free its seat."""
        request.finish_reason = reason
        if request.seat is not None:
            self.cache.free(request.seat)
        self.drafter.free(request)
        self.scheduler.leave(request)
