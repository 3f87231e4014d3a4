"""What a round of an engine changes: requests, seats, cache, penalties, the drafter and events; all of it counts, or none of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headstart.engine.drafter_state import DrafterState
from headstart.engine.drawn_tree import DrawnTree
from headstart.engine.emission import emission_of, token_logprobs
from headstart.engine.events import Event, EventQueue
from headstart.engine.prefixes import SHORTEST, Prefix, Prefixes, num_common
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
    prefixes: texts of requests that ended, whose keys and values are kept.
    history: token counts of the seats, for penalties; None until a request uses penalties.
    unread: events of requests without a queue of their own.
    """

    def __init__(
        self, target: Target, scheduler: Scheduler, cache: KVCache, drafter: DrafterState, prefixes: Prefixes | None = None
    ) -> None:
        self.target = target
        self.scheduler = scheduler
        self.cache = cache
        self.drafter = drafter
        self.prefixes = Prefixes(0) if prefixes is None else prefixes
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
        self._savepoint = Savepoint(self.scheduler, self.cache, self.prefixes, ending)
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
        dropped = savepoint.restore()
        for request in self.scheduler.running:
            self._start_history(request)
        self.drafter.recover(seated.union(self.scheduler.running))
        self.drafter.mark_stale_seats(dropped)
        self._savepoint = None

    # -- changes --

    def admit(self) -> list[Request]:
        """Give seats to waiting requests, first come first served, while there are slots. Returns these requests.

        Texts that were kept give up their slots, the least recently used first.
        """
        seated: list[Request] = []
        while (request := self.scheduler.next_ready()) is not None:
            source = self._source(request)
            while not self.scheduler.seat(request):
                if not self._drop_oldest(source if isinstance(source, Prefix) else None):
                    return seated
            self._start(request)
            seated.append(request)
        return seated

    def _start(self, request: Request) -> None:
        """Prepare the seat that a request has just got, with the beginning of its text where that can be copied."""
        assert request.seat is not None, "the request has no seat"
        self.cache.free(request.seat)
        self.drafter.seat(request)
        source = self._source(request)
        if source is not None:
            self._copy(source, request)
        if request.params.has_penalties and self.history is None:
            self.history = History(self.scheduler.seating.num_seats, self.target.vocab, self.target.device)
        self._start_history(request)

    def _source(self, request: Request) -> Prefix | Request | None:
        """The text in a seat that has most tokens of a request's text at its beginning; None: too few, even of its leader's."""
        best: tuple[int, Prefix | Request | None] = (SHORTEST - 1, None)
        text = request.known(0, request.length)
        for source in (*self.prefixes, *self.scheduler.running):
            if source is not request and source.seat is not None and self.drafter.can_fork(source):
                length = num_common(text, tokens_of(source)) - 1
                if length > best[0] or (length >= 1 and source is request.leader):
                    best = length, source
        return best[1]

    def _copy(self, source: Prefix | Request, request: Request) -> None:
        """Copy what a seat holds of the beginning of a request's text to the request's seat.

        All but the last of the tokens that both have, since a drafter's state of a token depends on the next one.
        """
        assert source.seat is not None, "the source has no seat"
        assert request.seat is not None, "the request has no seat"
        text = request.known(0, request.length)
        length = num_common(text, tokens_of(source)) - 1
        self.cache.fork(source.seat, request.seat, length)
        self.drafter.fork(source.seat, request, length)
        request.scored = request.num_copied = length
        if isinstance(source, Prefix):
            self.prefixes.use(source)

    def _drop_oldest(self, spared: Prefix | None = None) -> bool:
        """Give up the slots of a kept text. spared: the one to drop last. Returns whether there was one."""
        prefix = self.prefixes.oldest(spared)
        if prefix is not None:
            self.prefixes.drop(prefix)
            self.drafter.forget(prefix.seat, prefix.is_drafted)
            self.cache.free(prefix.seat)
            self.scheduler.seating.give_back(prefix.seat)
        return prefix is not None

    # -- seats that grow --

    def make_room(self, request: Request) -> None:
        """A step towards a larger seat of a running request; to be repeated until it has it, or waits.

        One step is one transaction: slots that a text gives up are not written before that counts. The steps are: the slots behind
        the seat, a larger seat elsewhere, the slots of a kept text, and those of the request that came last.
        """
        assert request.seat is not None, "a running request has a seat"
        capacity = self.scheduler.slots_now(request)
        if not (self.scheduler.seating.extend(request.seat, capacity) or self._move(request, capacity) or self._drop_oldest()):
            self.preempt(self.scheduler.running[-1])

    def _move(self, request: Request, capacity: int) -> bool:
        """Move a request to a larger seat. Returns whether there was one.

        Its last scored token is scored again, for a drafter that keeps no state but the last token's.
        """
        old, seating = request.seat, self.scheduler.seating
        assert old is not None, "a running request has a seat"
        seat, length = seating.take(capacity), max(0, request.scored - 1)
        if seat is None:
            return False
        request.seat, request.scored = seat, length
        self.cache.fork(old, seat, length)
        self.drafter.move(old, request, length)
        self.cache.free(old)
        seating.give_back(old)
        self._start_history(request)
        return True

    def preempt(self, request: Request) -> None:
        """Take a request's seat. It waits, and goes on where it was once it has a seat again."""
        assert request.seat is not None, "a running request has a seat"
        self.cache.free(request.seat)
        self.drafter.free(request)
        self.scheduler.preempt(request)
        request.num_preempted += 1

    def _start_history(self, request: Request) -> None:
        if self.history is not None and request.params.has_penalties and request.seat is not None:
            self.history.start(request.seat, request.prompt, request.output)

    def emit(
        self, request: Request, decided: tuple[int, ...], logits: Tensor, asked: tuple[int, ...], tree: DrawnTree | None = None
    ) -> int:
        """Give a request what it emits of the decided tokens. Returns how many these are.

        decided: kept drafts, then the target's own token.
        logits: [asked, vocab] of the round.
        asked: per decided token, the index of its line in `logits`.
        tree: of the round, for the event.
        """
        try:
            if request.constraint is not None and request.constraint.error is not None:
                raise ValueError(f"the constraint failed: {request.constraint.error}")
            emission = emission_of(request, decided)
        except Exception as error:  # of its own text stream or constraint: the other rows go on
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
        self.put(Event(request, tokens, emission.guessed, emission.text, emission.finish_reason, tree=tree))
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
        """End a request. Its seat is free, unless its text is kept."""
        request.finish_reason = reason
        if request.seat is not None and not self._keep(request):
            self.cache.free(request.seat)
            self.drafter.free(request)
        self.scheduler.leave(request)

    def _keep(self, request: Request) -> bool:
        """Keep the text in a request's seat, if it is worth it. The seat is then the request's no more."""
        tokens, seat = tokens_of(request), request.seat
        if seat is None or not self.prefixes.most or len(tokens) <= SHORTEST:
            return False
        while len(self.prefixes) >= self.prefixes.most:
            self._drop_oldest()
        self.prefixes.keep(Prefix(tokens, seat, self.drafter.can_fork(request)))
        self.scheduler.seating.shrink(seat, self.cache.lengths[seat])
        request.seat = None
        return True


def tokens_of(source: Prefix | Request) -> tuple[int, ...]:
    """The tokens whose keys and values are in a seat."""
    return source.tokens if isinstance(source, Prefix) else source.known(0, min(source.scored, source.length))
