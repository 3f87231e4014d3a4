"""Answers of an engine for its callers: fragments while requests run, and whole answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self
from weakref import finalize

from headstart.engine.engine import Engine
from headstart.engine.events import Event, EventQueue
from headstart.engine.scheduler import Request, Stream
from headstart.engine.stats import Stats
from headstart.speculation.params import SamplingParams


@dataclass(frozen=True)
class Answer:
    """One completion.

    text: the output without the prompt.
    token_ids: of the output.
    guessed: per token, whether a drafter had proposed it.
    finish_reason: "stop", "length", "abort", or "error" where the text could not be made.
    seed: repeats the answer.
    logprobs: per token its raw log-probability and those of the best alternatives, by token id; None if not asked for.
    stats: of this answer alone; `LLM.stats` are the engine's.
    is_lossy: whether the acceptance rule changes the distribution, so that plain decoding would answer differently.
    """

    text: str
    token_ids: tuple[int, ...]
    guessed: tuple[bool, ...]
    finish_reason: str
    seed: int
    logprobs: tuple[tuple[float, dict[int, float]], ...] | None
    stats: Stats
    is_lossy: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary for JSON; `stats` with tau (acceptance length) and acceptance rate by depth."""
        return asdict(self) | {"stats": self.stats.as_dict()}

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        start = self.text if len(self.text) <= 40 else self.text[:37] + "..."
        lossy = ", lossy" if self.is_lossy else ""
        return f"<Answer {start!r}: {len(self.token_ids)} tokens, {self.finish_reason}, tau {self.stats.tau:.2f}{lossy}>"


@dataclass(frozen=True)
class Fragment:
    """A piece of a streamed answer. `str(fragment)` is its text.

    text: text that became final.
    token_ids: the tokens that it came with.
    guessed: per token, whether a drafter had proposed it.
    index: which answer it belongs to, where several run at once.
    """

    text: str
    token_ids: tuple[int, ...]
    guessed: tuple[bool, ...]
    index: int = 0

    def __str__(self) -> str:
        return self.text


class Answering:
    """Answers that are being made: iterate over it for their fragments; `answers` has the answers so far at any time.

    Several of these objects may be read by turns and in several threads, one reader each: a round that one reader runs serves all
    requests, and events of requests that are not being read wait for their reader. Leaving the loop ends the requests and frees
    their memory; so do `close`, the end of a `with` block, and dropping the object.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._requests: list[Request] = []
        self._queue = EventQueue()
        self._num_read = 0
        self._num_ended = 0  # requests whose last event was read
        self._finalizer = finalize(self, engine.leave, self._requests)
        self._finalizer.atexit = False

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        stop_ids: Sequence[int] = (),
        stream: Stream | None = None,
        leader: Request | None = None,
    ) -> Request:
        """Queue one more request; the parameters are those of `Engine.add`. Raises ValueError if it can never run."""
        request = self._engine.add(prompt, params, seed=seed, stop_ids=stop_ids, stream=stream, leader=leader, queue=self._queue)
        self._requests.append(request)
        return request

    # -- reading --

    def __iter__(self) -> Iterator[Fragment]:
        """Yield fragments as they come; a second iteration goes on where the first stopped. Raises what a text stream raised."""
        indices = {request.id: index for index, request in enumerate(self._requests)}
        try:
            while self._num_ended < len(self._requests):
                event = self._next()
                if event.error is not None:
                    raise event.error
                if event.tokens:
                    yield Fragment(event.text, event.tokens, event.guessed, indices[event.request.id])
        finally:
            if self._num_ended < len(self._requests):
                self._engine.leave(self._requests)

    def _next(self) -> Event:
        while not self._has_unread():
            self._engine.advance(self._has_unread)
        event = self._queue.events[self._num_read]
        self._num_read += 1
        self._num_ended += event.finish_reason is not None
        return event

    def _has_unread(self) -> bool:
        return self._num_read < self._queue.num_published

    @property
    def answers(self) -> list[Answer]:
        """The answers so far, read or not, in the order of the requests. One that still runs has finish_reason "abort"."""
        texts, tokens = [""] * len(self._requests), [0] * len(self._requests)
        reasons = ["abort"] * len(self._requests)
        indices = {request.id: index for index, request in enumerate(self._requests)}
        for event in self._queue.published:
            index = indices[event.request.id]
            texts[index] += event.text
            tokens[index] += len(event.tokens)
            reasons[index] = event.finish_reason or reasons[index]
        is_lossy = self._engine.rule.is_lossy
        parts = zip(self._requests, texts, tokens, reasons, strict=True)
        return [_answer(request, text, count, reason, is_lossy) for request, text, count, reason in parts]

    # -- ending --

    def close(self) -> None:
        """End the requests that still run; their text so far stays. Waits for a round that another thread runs."""
        for request in self._requests:
            self._engine.abort(request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """End all requests if the block raises."""
        try:
            yield
        except BaseException:
            self._engine.leave(self._requests)
            raise


def _answer(request: Request, text: str, num_tokens: int, reason: str, is_lossy: bool) -> Answer:
    """The answer of the first `num_tokens` tokens of a request: later ones are of a round that does not count yet."""
    output, guessed = tuple(request.output[:num_tokens]), tuple(request.guessed[:num_tokens])
    logprobs = None if request.params.logprobs is None else tuple(request.logprobs[:num_tokens])
    return Answer(text, output, guessed, reason, request.seed, logprobs, request.stats, is_lossy)
