"""A savepoint: the state of requests, seats and cache lengths before a round, for a round that fails.

The drafter has snapshots of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from headstart.engine.scheduler import Request, Scheduler
from headstart.target.cache import KVCache


class Savepoint:
    """The state of the scheduler, the seating, the cache and the requests. Made before a round changes any of it.

    Of the KV cache only the lengths are saved: slots beyond the committed ones hold nothing that is read.

    requests: those that a round may change: the running ones, and as many of the waiting ones as there are seats.
    """

    def __init__(self, scheduler: Scheduler, cache: KVCache) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._waiting = tuple(scheduler.waiting)
        self._running = tuple(scheduler.running)
        self._seating = scheduler.seating.snapshot()
        self._lengths = list(cache.lengths)
        self.requests: Sequence[Request] = (*self._running, *islice(self._waiting, scheduler.seating.num_seats))
        self._requests = [
            (request, request.seat, request.scored, request.finish_reason, len(request.output), request.stream, len(request.rounds))
            for request in self.requests
        ]

    def restore(self) -> None:
        """Restore the state. May be called again where it was interrupted."""
        for request, seat, scored, finish_reason, num_tokens, stream, num_rounds in self._requests:
            request.seat, request.scored, request.finish_reason = seat, scored, finish_reason
            request.stream = stream
            del request.rounds[num_rounds:]
            for series in (request.output, request.guessed, request.logprobs):
                del series[num_tokens:]
        self._cache.lengths[:] = self._lengths
        self._scheduler.seating.restore(self._seating)
        self._scheduler.waiting = deque(self._waiting)
        self._scheduler.running = list(self._running)
