"""The engine thread: runs rounds while there is work, and sleeps otherwise. Must not import FastAPI."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue

from headstart.engine.events import Event
from headstart.serve.jobs import Job, Logprob, Update
from headstart.serve.lanes import Lane
from headstart.serve.metrics import Metrics
from headstart.serve.queueing import FairQueue

logger = logging.getLogger("headstart.serve")

_RETRIES = 2  # rounds that may fail in a row before a request is ended for it
_STUCK = 300.0  # seconds of a round after which it counts as stuck


class RoundFailed(Exception):
    """A request was ended since rounds with it failed."""


class Worker:
    """Runs the lanes' rounds by turns, on one thread of its own.

    lanes: the engines.
    queue: where jobs wait before they are in an engine.
    metrics: told of every round and of the end of every job.
    deliver: called on the engine thread with the updates of a round, in order.
    """

    def __init__(self, lanes: Sequence[Lane], queue: FairQueue, metrics: Metrics, deliver: Callable[[list[Update]], None]) -> None:
        self.lanes = lanes
        self.queue = queue
        self._metrics = metrics
        self._deliver = deliver
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # what to do between two rounds; None: look for work
        self._thread = threading.Thread(target=self._run, name="headstart-engine", daemon=True)
        self._is_stopping = False
        self._round_began: float | None = None

    # -- for any thread: none of these waits --

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one client. Raises QueueFull."""
        self.queue.put(jobs)
        self._inbox.put(None)

    def cancel(self, jobs: Iterable[Job], failure: Exception | None = None) -> None:
        """End jobs: now where they wait, else before the next round.

        failure: each job that has not ended gets an update with it; None: nobody reads their updates.
        """
        jobs = list(jobs)
        running = self.queue.remove(jobs)
        waiting = [job for job in jobs if job not in running]
        for job in waiting:
            self._metrics.ended(job, "abort", time.perf_counter())
        if waiting and failure is not None:
            self._inbox.put(lambda: self._deliver([Update(job, finish_reason="error", error=failure) for job in waiting]))
        if running:
            self._inbox.put(lambda: self._end(running, failure))

    def stop(self, seconds: float = 10.0) -> None:
        """End all jobs without updates, and the thread. Waits for the round that runs, at most so long."""

        def leave() -> None:
            self._is_stopping = True

        self._inbox.put(leave)
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def trouble(self) -> str | None:
        """Why answers are not made any more; None: they are."""
        began = self._round_began
        if not self._thread.is_alive():
            return "the engine thread has ended"
        if began is not None and time.perf_counter() - began > _STUCK:
            return f"a round has taken more than {_STUCK:g} seconds"
        return next((f"the engine of {lane.drafter}, {lane.accept} has failed" for lane in self.lanes if lane.is_broken), None)

    # -- the engine thread --

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                self._obey()
                for lane in self.lanes:
                    self._turn(lane)
            except Exception as error:  # a fault of this package: requests fail, the thread goes on
                _log("the engine thread failed", error)
                for lane in self.lanes:
                    self._end(list(lane.jobs.values()), RoundFailed("the server failed on this request"))
        for lane in self.lanes:
            self._end(list(lane.jobs.values()))

    def _obey(self) -> None:
        """Do what came in since the last round. Waits where there is nothing else to do."""
        is_idle = all(lane.is_broken or (lane.engine.is_idle and not self.queue.has_jobs(lane)) for lane in self.lanes)
        while is_idle or not self._inbox.empty():
            if (command := self._inbox.get()) is not None:
                command()
            is_idle = False

    def _turn(self, lane: Lane) -> None:
        """One round of a lane, if it has work."""
        if lane.is_broken:
            self._refuse(self.queue.clear(lane), RoundFailed("the engine has failed"))
            return
        while lane.has_place and (job := self.queue.take(lane)) is not None:
            self._add(lane, job)
        if lane.engine.is_idle:
            return
        self._round_began = began = time.perf_counter()
        try:
            lane.engine.step()
            lane.num_failed = 0
        except Exception as error:  # the state is the one before the round
            self._recover(lane, error)
        self._round_began = None
        for request in lane.engine.scheduler.running:
            if request in lane.jobs:
                self._seat(lane.jobs[request], began)
        self._collect(lane)
        self._metrics.round(lane)

    def _add(self, lane: Lane, job: Job) -> None:
        """Hand a job to its engine."""
        leader = job.leader.request if job.leader is not None else None
        try:
            job.request = lane.engine.add(
                job.prompt, job.params, seed=job.seed, stop_ids=job.stop_ids, stream=job.stream, leader=leader, queue=lane.events,
                constraint=job.constraint, draws_trees=job.draws_trees,
            )  # fmt: skip
        except Exception as error:
            self._refuse([job], error)
            return
        job.request.drafts = job.drafts
        lane.jobs[job.request] = job

    def _refuse(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            self._metrics.ended(job, "error", time.perf_counter())
        if jobs:
            self._deliver([Update(job, finish_reason="error", error=error) for job in jobs])

    # -- failures, and ends --

    def _recover(self, lane: Lane, error: Exception) -> None:
        """After a failed round: try again, and after some times end the request that is most likely the cause."""
        lane.num_failed += 1
        _log(f"round failed ({lane.num_failed} in a row)", error)
        if lane.num_failed <= _RETRIES:
            return
        # First those that were in no round that counted, the newest first: rounds went well before they came.
        request = min(lane.jobs, key=lambda request: (bool(request.rounds), -request.id), default=None)
        if request is not None:
            self._end([lane.jobs[request]], RoundFailed("the engine failed on this request"))
        if request is None or request.finish_reason is None:
            lane.is_broken = True
            self._refuse([*lane.jobs.values(), *self.queue.clear(lane)], RoundFailed("the engine has failed"))
            lane.jobs.clear()
        elif not lane.jobs:
            lane.num_failed = 0

    def _end(self, jobs: Iterable[Job], failure: Exception | None = None) -> None:
        """End jobs. Their slots are free before the next round. failure: what their clients are told; None: nothing."""
        for job in jobs:
            if job.request is None:  # its engine refused it
                continue
            job.failure = failure
            try:
                job.lane.engine.leave([job.request])
            except Exception as error:  # it is tried again before the next round, which then fails too
                _log("a request could not be ended", error)
            self._collect(job.lane)

    # -- what rounds gave --

    def _collect(self, lane: Lane) -> None:
        """Deliver the updates of the events that came since the last call."""
        now = time.perf_counter()
        updates = [update for event in lane.events.drain() if (update := self._update(lane, event, now)) is not None]
        if updates:
            self._deliver(updates)

    def _seat(self, job: Job, when: float) -> None:
        if job.seated is None:
            job.seated = when
            self._metrics.seated(job)

    def _update(self, lane: Lane, event: Event, now: float) -> Update | None:
        """The update that an event means; None where nobody waits for it."""
        request, reason, error = event.request, event.finish_reason, event.error
        job = lane.jobs.get(request)
        if job is None:
            return None
        if event.tokens:
            self._seat(job, self._round_began or now)
            self._metrics.spoke(job, len(event.tokens), now)
        if error is not None:  # of its own text stream or grammar: what it says may hold the text
            _log("an answer failed", error, is_told=False)
        if reason is not None:
            del lane.jobs[request]
            if reason == "abort" and job.failure is not None:
                reason, error = "error", job.failure
            if job.seated is not None:
                self.queue.learn(now - job.seated)
            self._metrics.ended(job, reason, now)
            if reason == "abort":
                return None
        return Update(
            job, event.tokens, event.guessed, event.text, _logprobs(job, event), reason, error,
            rounds=request.rounds if reason else (), num_cached=job.num_cached, tree=event.tree,
        )  # fmt: skip


def _logprobs(job: Job, event: Event) -> tuple[Logprob, ...] | None:
    """Those of an event's tokens, which are the last ones of its request."""
    if job.params.logprobs is None or not event.tokens:
        return None
    return tuple(event.request.logprobs[-len(event.tokens) :])


def _log(what: str, error: Exception, *, is_told: bool = True) -> None:
    """Write an error to the server's log. is_told: whether what it says is written too; it must hold no prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s: %s%s\n%s", what, type(error).__name__, f": {error}" if is_told else "", frames)
