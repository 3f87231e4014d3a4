"""A savepoint: the state of requests, seats and cache lengths before a round, for a round that fails.

The drafter has snapshots of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from headstart.engine.prefixes import Prefixes
from headstart.engine.scheduler import Request, Scheduler
from headstart.target.cache import KVCache


class Savepoint:
    """The state of the scheduler, the seating, the cache and the requests. Made before a round changes any of it.

    Of the KV cache only the lengths are saved: slots beyond the committed ones hold nothing that is read. Of the queue only its
    front is saved: a round seats waiting requests in order, as many as there are rows, and the rest keeps its place.

    ending: a request that ends, which may wait anywhere in the queue; the front then reaches as far as it. None: a round.
    requests: those that may change: the running ones, and the front of the queue.
    """

    def __init__(self, scheduler: Scheduler, cache: KVCache, prefixes: Prefixes, ending: Request | None = None) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._prefixes, self._kept = prefixes, [prefix.seat for prefix in prefixes]
        waiting = scheduler.waiting
        num_rows = scheduler.max_rows
        size = num_rows if ending is None or ending not in waiting else max(num_rows, waiting.index(ending) + 1)
        self._front = tuple(islice(waiting, size))
        self._num_waiting = len(waiting)
        self._running = tuple(scheduler.running)
        self._seating = scheduler.seating.snapshot()
        self._lengths = list(cache.lengths)
        self.requests: Sequence[Request] = (*self._running, *self._front)
        self._requests = [
            (request, request.seat, request.scored, request.finish_reason, len(request.output), request.stream, len(request.rounds))
            for request in self.requests
        ]

    def restore(self) -> list[int]:
        """Restore the state. May be called again where it was interrupted.

        The texts that were kept are dropped, since a new one may have been written over them. Returns their seats, which are free.
        """
        for request, seat, scored, finish_reason, num_tokens, stream, num_rounds in self._requests:
            request.seat, request.scored, request.finish_reason = seat, scored, finish_reason
            request.stream = stream
            del request.rounds[num_rounds:]
            for series in (request.output, request.guessed, request.logprobs):
                del series[num_tokens:]
        self._cache.lengths[:] = self._lengths
        self._scheduler.seating.restore(self._seating)
        self._restore_waiting()
        self._scheduler.running = list(self._running)
        self._prefixes.clear()
        for seat in self._kept:
            self._scheduler.seating.give_back(seat)
        return self._kept

    def _restore_waiting(self) -> None:
        """Replace what is left of the queue's front by the front as it was."""
        waiting = self._scheduler.waiting
        num_gone = self._num_waiting - len(waiting)
        for _ in range(len(self._front) - num_gone):
            waiting.popleft()
        waiting.extendleft(reversed(self._front))
