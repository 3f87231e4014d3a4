"""The queue before the engines: bounded, and fair to users. Must not import FastAPI."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from threading import Lock

from headstart.serve.jobs import Job
from headstart.serve.lanes import Lane

_LONGEST_WAIT = 600  # seconds that a client is told to wait, at most


class QueueFull(Exception):
    """The queue has no place for some jobs. retry_after: estimated seconds until it has."""

    def __init__(self, num_waiting: int, most: int, retry_after: int) -> None:
        super().__init__(f"{num_waiting} answers wait already, of at most {most}; try again in {retry_after} seconds")
        self.retry_after = retry_after


class FairQueue:
    """Jobs that wait for their lane. Users take turns: one with many jobs delays another's by no more than one job each.

    Threads may share it.
    most: jobs that may wait, over all lanes.
    num_rows: jobs that run at once, for estimates.
    """

    def __init__(self, most: int, num_rows: int) -> None:
        self.most = most
        self._num_rows = num_rows
        self._lanes: dict[Lane, OrderedDict[str, deque[Job]]] = {}
        self._num_waiting = 0
        self._seconds = 1.0  # average time that a job takes once it has a row
        self._lock = Lock()

    def __len__(self) -> int:
        return self._num_waiting

    def put(self, jobs: Sequence[Job]) -> None:
        """Add the jobs of one client. Raises QueueFull if not all have a place."""
        with self._lock:
            if self._num_waiting + len(jobs) > self.most:
                raise QueueFull(self._num_waiting, self.most, self.retry_after())
            for job in jobs:
                self._lanes.setdefault(job.lane, OrderedDict()).setdefault(job.user, deque()).append(job)
            self._num_waiting += len(jobs)

    def take(self, lane: Lane) -> Job | None:
        """Remove the next job of a lane and return it: the first one of the user whose turn it is; None: there is none."""
        with self._lock:
            users = self._lanes.get(lane)
            if not users:
                return None
            user, jobs = next(iter(users.items()))
            job = jobs.popleft()
            users.move_to_end(user)
            self._forget(lane, user)
            self._num_waiting -= 1
            return job

    def remove(self, jobs: Iterable[Job]) -> list[Job]:
        """Remove those of some jobs that wait. Returns the others."""
        others: list[Job] = []
        with self._lock:
            for job in jobs:
                users = self._lanes.get(job.lane)
                waiting = users.get(job.user) if users is not None else None
                if waiting is None or job not in waiting:
                    others.append(job)
                    continue
                waiting.remove(job)
                self._forget(job.lane, job.user)
                self._num_waiting -= 1
        return others

    def clear(self, lane: Lane | None = None) -> list[Job]:
        """Remove all jobs of a lane, or of all lanes. Returns them."""
        with self._lock:
            lanes = list(self._lanes) if lane is None else [lane]
            jobs = [job for name in lanes for waiting in self._lanes.pop(name, {}).values() for job in waiting]
            self._num_waiting -= len(jobs)
            return jobs

    def has_jobs(self, lane: Lane) -> bool:
        """Whether a job waits for a lane."""
        return bool(self._lanes.get(lane))

    def learn(self, seconds: float) -> None:
        """Take notice of how long a job took once it had a row."""
        self._seconds += 0.1 * (seconds - self._seconds)

    def retry_after(self) -> int:
        """Estimated seconds until a job more has a place."""
        return max(1, min(_LONGEST_WAIT, math.ceil(self._seconds * self._num_waiting / self._num_rows)))

    def _forget(self, lane: Lane, user: str) -> None:
        if not self._lanes[lane][user]:
            del self._lanes[lane][user]
