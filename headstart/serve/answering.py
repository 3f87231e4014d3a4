"""Answers a prepared request: as one object, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headstart.serve.errors import ApiError, as_api_error
from headstart.serve.jobs import Job, Update
from headstart.serve.preparing import Prepared
from headstart.serve.protocol import Sampling
from headstart.serve.queueing import QueueFull
from headstart.serve.responses import Collected, Form, Object, drawn, speculation, usage
from headstart.serve.token_texts import TokenTexts
from headstart.serve.worker import Worker

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event_bytes(data: Object) -> bytes:
    """A server-sent event. JSON has no line breaks, so that the event ends where it should."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


class Answering:
    """The answers to one request, from the first token on. Ends its jobs at the latest with `close`.

    prepared: the request.
    form: how it is answered.
    body: what the client asked for.
    worker: makes the answers.
    texts: of tokens, for trees.
    with_metrics: whether the figures of speculation come.
    on_end: called once, at the end.
    """

    def __init__(
        self, prepared: Prepared, form: Form, body: Sampling, worker: Worker, texts: TokenTexts, with_metrics: bool,
        on_end: Callable[[Answering], object],
    ) -> None:  # fmt: skip
        self._prepared, self._form, self._body, self._worker, self._texts = prepared, form, body, worker, texts
        self._with_metrics, self._on_end, self._is_open = with_metrics, on_end, True
        self._answers = [Collected(echo) for echo in prepared.echoes]
        self._mailbox = prepared.jobs[0].mailbox
        self._deadline = asyncio.get_running_loop().time() + prepared.seconds
        self._first: list[Update] = []

    async def start(self) -> None:
        """Queue the jobs, and wait for the first update: until then an error can be told by its status."""
        try:
            self._worker.submit(self._prepared.jobs)
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from None
        self._first = await self._take()

    def close(self) -> None:
        """End the jobs that have not ended."""
        if self._is_open:
            self._is_open = False
            self._worker.cancel(self._left)
            self._on_end(self)

    def fail(self, error: ApiError) -> None:
        """End the jobs that have not ended, and tell the client why."""
        self._worker.cancel(self._left, error)

    @property
    def _left(self) -> list[Job]:
        """The jobs that have not ended."""
        return [job for job, answer in zip(self._prepared.jobs, self._answers, strict=True) if answer.finish_reason is None]

    async def whole(self) -> Object:
        """The whole answer."""
        async for _ in self._updates():
            pass
        answer = self._form.whole(self._answers) | {"usage": self._usage()}
        return answer | self._metrics()

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream. After the first one an error is an event too."""
        try:
            async for update in self._with_first_choices():
                yield event_bytes(update)
        except Exception as error:
            yield event_bytes(as_api_error(error).body)
        yield DONE

    async def _with_first_choices(self) -> AsyncIterator[Object]:
        firsts = [self._form.first(index, echo) for index, echo in enumerate(self._prepared.echoes)]
        for choice in firsts:
            if choice is not None:
                yield self._event([choice])
        async for update in self._updates():
            choice = self._form.piece(update, self._answers[update.job.index])
            if update.tree is not None:
                choice["tree"] = drawn(update.tree, update, self._texts)
            yield self._event([choice])
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield self._form.event([]) | {"usage": self._usage()} | self._metrics()
        elif self._with_metrics:
            yield self._form.event([]) | self._metrics()

    async def _updates(self) -> AsyncIterator[Update]:
        """All updates to the end of the last job. Raises the error of a job that failed."""
        updates = self._first
        while True:
            for update in updates:
                self._answers[update.job.index].add(update)
                yield update
            if all(answer.finish_reason is not None for answer in self._answers):
                return
            updates = await self._take()

    async def _take(self) -> list[Update]:
        late = ApiError(408, f"the answer was not complete after {self._prepared.seconds:g} seconds", code="timeout")
        if asyncio.get_running_loop().time() > self._deadline:  # the client was slow
            raise late
        try:
            async with asyncio.timeout_at(self._deadline):
                updates = await self._mailbox.take()
        except TimeoutError:
            raise late from None
        for update in updates:
            if isinstance(update.error, ApiError):
                raise update.error
            if update.error is not None:
                raise ApiError(500, "this answer could not be made; the server's log says why", code="internal_error")
        return updates

    def _event(self, choices: list[Object]) -> Object:
        options = self._body.stream_options
        event = self._form.event(choices)
        if options is not None and options.continuous_usage_stats:
            return event | {"usage": self._usage()}
        return event | ({"usage": None} if options is not None and options.include_usage else {})

    def _usage(self) -> Object:
        return usage(self._prepared.num_prompt_tokens, self._answers)

    def _metrics(self) -> Object:
        return {"metrics": {"speculative_decoding": speculation(self._answers)}} if self._with_metrics else {}


class EventStream(Response):
    """A response of server-sent events, which ends when the client goes away or takes no event for too long.

    events: the events.
    on_end: called at the end, whatever it is.
    slow_seconds: in which the client must take an event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], object], slow_seconds: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end, self._slow_seconds = events, on_end, slow_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await unless_gone(receive, self._send(send))
        except (ClientDisconnect, TimeoutError):  # nobody reads
            pass
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            async with asyncio.timeout(self._slow_seconds):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work. Raises ClientDisconnect, and cancels the work, when the client goes away before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone away."""
    message: Any = {}
    while message.get("type") != "http.disconnect":
        message = await receive()
