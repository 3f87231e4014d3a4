"""The host's state before a round, to return to when the round does not end.

Knows what a round changes. Refuses to know how a round goes and what a drafter remembers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from headstart.engine.scheduler import Request, Scheduler
from headstart.target.cache import KVCache


class Savepoint:
    """State of the scheduler, the seating, the cache and the requests. Made before anything of a round changes.

    What lies behind the committed slots of a cache is garbage at any time, so lengths are all that is remembered of it.
    requests: those that a round may touch: the running ones, and as many of the waiting as there are seats.
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
        """Bring it back. May be called again where it was interrupted."""
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
