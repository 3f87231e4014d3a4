"""The service behind the app: the worker, the queue, what is in flight, and how all of it ends. Must not import FastAPI."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from headstart.serve.answering import Answering
from headstart.serve.errors import ApiError
from headstart.serve.jobs import Update
from headstart.serve.lanes import Lane
from headstart.serve.metrics import Metrics
from headstart.serve.preparing import Prepared, Preparer
from headstart.serve.protocol import CompletionRequest, Sampling
from headstart.serve.queueing import FairQueue
from headstart.serve.responses import ChatForm, CompletionForm, Head, Options
from headstart.serve.settings import Settings
from headstart.serve.token_texts import TokenTexts
from headstart.serve.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
logger = logging.getLogger("headstart.serve")

_FLUSH = 2.0  # seconds for the last errors to reach their clients
STOPPING = ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)


class Service:
    """One model, served.

    tokenizer: the model's.
    lanes: the engines; the first is for requests that ask for none.
    settings: limits, and who may ask.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, lanes: Sequence[Lane], settings: Settings) -> None:
        self.settings = settings
        self.lanes = lanes
        self.preparer = Preparer(tokenizer, lanes, settings)
        self.texts = TokenTexts(tokenizer)
        self.metrics = Metrics(settings.model, lanes, settings.with_vllm_metrics)
        self.queue = FairQueue(settings.max_queue, sum(lane.engine.scheduler.max_rows for lane in lanes))
        self.worker = Worker(lanes, self.queue, self.metrics, self._deliver)
        self.metrics.watch(self._num_running, self._num_waiting, self._cache_usage)
        self.in_flight: set[Answering] = set()
        self.is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool = ThreadPoolExecutor(2, "headstart-text")

    # -- requests --

    async def in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """The result of work that takes a while, such as encoding a text."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def answering(self, prepared: Prepared, body: Sampling) -> Answering:
        """The answers to a request, not yet queued."""
        if self.is_stopping:
            raise STOPPING
        is_completion = isinstance(body, CompletionRequest)
        head = Head("cmpl" if is_completion else "chatcmpl", self.settings.model)
        options = Options(prepared.jobs[0].params.logprobs is not None, bool(body.return_token_ids))
        form = (CompletionForm if is_completion else ChatForm)(head, self.texts, options)
        with_metrics = self.settings.with_metrics or bool(body.include_metrics)
        answering = Answering(prepared, form, body, self.worker, self.texts, with_metrics, self.in_flight.discard)
        self.in_flight.add(answering)
        return answering

    def _deliver(self, updates: list[Update]) -> None:
        """Hand the updates of a round to the event loop. Called on the engine thread."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_put, updates)

    # -- beginning and end --

    def start(self) -> None:
        """Start the engine thread. Called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    async def drain(self) -> None:
        """Take no more requests, and end those in flight: by themselves within the time of grace, else with an error."""
        self.is_stopping = True
        logger.info("shutting down: %d requests in flight have %g seconds", len(self.in_flight), self.settings.grace)
        await self._wait_for_end(self.settings.grace)
        for answering in tuple(self.in_flight):
            answering.fail(STOPPING)
        await self._wait_for_end(_FLUSH)

    async def _wait_for_end(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.in_flight:
                    await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End everything."""
        self.is_stopping = True
        self.worker.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def trouble(self) -> str | None:
        """Why the service does not answer; None: it does."""
        return self.worker.trouble

    # -- for the metrics --

    def _num_running(self) -> int:
        return sum(len(lane.engine.scheduler.running) for lane in self.lanes)

    def _num_waiting(self) -> int:
        return len(self.queue) + sum(len(lane.engine.scheduler.waiting) for lane in self.lanes)

    def _cache_usage(self) -> float:
        seatings = [lane.engine.seating for lane in self.lanes]
        return 1 - sum(seating.num_free for seating in seatings) / sum(seating.num_slots for seating in seatings)


def _put(updates: list[Update]) -> None:
    for update in updates:
        update.job.mailbox.put(update)
