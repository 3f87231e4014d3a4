"""One request to an OpenAI-compatible server, streamed and timed. Tokens are counted by the server's `usage`, never by chunks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headstart.distill.connection import connect, is_too_long, sentence, served_model
from headstart.speculation.params import SamplingParams

ATTEMPTS = 4
PAUSE = 0.5  # seconds before the second attempt; each later pause is twice as long
_THOUGHTS = ("reasoning", "reasoning_content")


class RequestFailed(ValueError):
    """A request that failed after all its attempts."""


class PromptTooLong(ValueError):
    """A prompt that exceeds the server's context."""


@dataclass(frozen=True)
class EndpointTask:
    """A prompt to send.

    messages: of a chat; empty where `text` is to be continued.
    text: to be continued as it is; empty for a chat.
    kind: name of the prompt set, or of the prompt's category.
    prompt: as its author wrote it; the last message of a conversation.
    """

    messages: tuple[dict[str, str], ...] = ()
    text: str = ""
    kind: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class Reply:
    """A timed answer.

    text: of the answer, reasoning included.
    num_tokens: of the answer, by the server's usage.
    began, first, ended: when the request was sent, its first token came, and its stream ended, in seconds of a monotonic clock.
    bursts: after the first token, (tokens, seconds since the tokens before); a single one where the server counts at the end only.
    is_counted: whether the server counted the tokens of each chunk.
    histogram: how many target forwards kept 0 drafts, 1 draft, and so on; empty where the server does not say.
    num_attempts: requests that were sent; the times are of the last.
    """

    text: str
    num_tokens: int
    began: float
    first: float
    ended: float
    bursts: tuple[tuple[int, float], ...]
    is_counted: bool
    histogram: tuple[int, ...] = ()
    num_attempts: int = 1


class Endpoint:
    """An OpenAI-compatible server and one of its models.

    url: with its /v1.
    model: its name there; None: the only one.
    api_key: None: it needs none.

    Raises ValueError where it cannot be reached, has no such model, and without the package `openai`.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        self.url = url
        self.api_key = api_key
        self.client = connect(url, api_key, retries=0)  # an attempt that fails must not be part of the time
        self.model = served_model(self.client, url, model)
        self.counts_chunks = True  # until the server refuses that

    @property
    def name(self) -> str:
        """See `run_name`."""
        return run_name(self.url)

    def reply(self, task: EndpointTask, params: SamplingParams) -> Reply:
        """The timed answer to a prompt. A request that is refused for lack of room, or breaks, is sent again, a few times.

        Raises PromptTooLong where the server's context is exceeded, RequestFailed after the last attempt, and ValueError for a
        server that does not stream or count tokens.
        """
        from openai import OpenAIError

        attempt = 1
        while True:
            try:
                return self._reply_once(task, params, attempt)
            except OpenAIError as error:
                if is_too_long(error):
                    raise PromptTooLong(sentence(error, self.url)) from error
                if self.counts_chunks and _is_about_counting(error):
                    self.counts_chunks = False
                elif attempt == ATTEMPTS or not _may_pass(error):
                    raise RequestFailed(sentence(error, self.url)) from error
                else:
                    time.sleep(PAUSE * 2 ** (attempt - 1))
                    attempt += 1

    def _reply_once(self, task: EndpointTask, params: SamplingParams, attempt: int) -> Reply:
        arrivals = Arrivals(time.perf_counter())
        create: Any = self.client.chat.completions.create if task.messages else self.client.completions.create
        prompt: dict[str, Any] = {"messages": list(task.messages)} if task.messages else {"prompt": task.text}
        with create(model=self.model, **prompt, **request_settings(params, self.counts_chunks)) as stream:
            for chunk in stream:
                arrivals.note(chunk, time.perf_counter())
        return arrivals.reply(self.url, time.perf_counter(), attempt)


def run_name(url: str) -> str:
    """A URL without what all have in common: no scheme, no /v1."""
    return url.partition("://")[2].rstrip("/").removesuffix("/v1") or url


def request_settings(params: SamplingParams, counts_chunks: bool) -> dict[str, Any]:
    """The fields of a request. What OpenAI's API lacks goes into the body, where vLLM and SGLang read it, and only where it is set.

    counts_chunks: ask for the tokens of each chunk, which OpenAI's API does not know.
    """
    options: dict[str, Any] = {"include_usage": True} | ({"continuous_usage_stats": True} if counts_chunks else {})
    settings: dict[str, Any] = {
        "stream": True,
        "stream_options": options,
        "temperature": params.temperature,
        "max_tokens": params.max_tokens,
        "seed": (params.seed or 0) % 2**31,  # a range that every server accepts
    }
    optional = {
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty or None,
        "frequency_penalty": params.frequency_penalty or None,
        "stop": list(params.stop) or None,
    }
    more = {
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty if params.repetition_penalty != 1 else None,
        "ignore_eos": params.ignore_eos or None,
    }
    settings |= {name: value for name, value in optional.items() if value is not None}
    extra = {name: value for name, value in more.items() if value is not None}
    return settings | ({"extra_body": extra} if extra else {})


def _is_about_counting(error: Exception) -> bool:
    """Whether a server refuses to count the tokens of each chunk."""
    return getattr(error, "status_code", None) in (400, 422) and "continuous_usage_stats" in str(error)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    from openai import APIStatusError

    return not isinstance(error, APIStatusError) or error.status_code in (408, 409, 429) or error.status_code >= 500


@dataclass
class Arrivals:
    """What has come of a stream so far.

    began: when the request was sent.
    first, last: when the first tokens and the last ones came.
    count: tokens so far, as the server counts them in each chunk.
    total: tokens of the whole answer, as it counts at the end.
    """

    began: float
    first: float | None = None
    last: float = 0.0
    count: int = 0
    total: int | None = None
    is_counted: bool = False
    has_choices: bool = False
    pieces: list[str] = field(default_factory=list)
    bursts: list[tuple[int, float]] = field(default_factory=list)
    histogram: tuple[int, ...] = ()

    def note(self, chunk: Any, now: float) -> None:
        """Note a chunk that came `now`."""
        usage = chunk.usage.completion_tokens if chunk.usage else None
        if usage is not None:
            self.total = usage
        self.histogram = _histogram(chunk.model_extra) or self.histogram
        if not chunk.choices:
            return
        piece = _piece(chunk.choices[0])
        self.has_choices = True
        self.pieces.append(piece)
        if usage is not None:
            self.is_counted = True
            self._tokens(usage - self.count, now)
            self.count = usage
        elif piece and not self.is_counted:
            self._tokens(1, now)

    def _tokens(self, num: int, now: float) -> None:
        if num <= 0:
            return
        if self.first is None:
            self.first = now
        else:
            self.bursts.append((num, now - self.last))
        self.last = now

    def reply(self, url: str, ended: float, num_attempts: int) -> Reply:
        """The whole answer. Raises ValueError where the server did not stream, or did not count."""
        if not self.has_choices:
            raise ValueError(f"the endpoint {url} does not stream its answers, so they cannot be timed; turn its streaming on")
        if self.total is None:
            raise ValueError(
                f"the endpoint {url} gives no usage at the end of a stream, and tokens are counted by that alone; "
                "a server that knows stream_options.include_usage can be measured"
            )
        first = ended if self.first is None else self.first
        bursts = tuple(self.bursts)
        if not self.is_counted:  # one chunk may hold several tokens: only their mean time is known
            bursts = ((self.total - 1, self.last - first),) if self.total > 1 else ()
        answer = "".join(self.pieces), self.total, self.began, first, ended, bursts, self.is_counted
        return Reply(*answer, self.histogram, num_attempts)


def _piece(choice: Any) -> str:
    """The text of a chunk of a chat or of a completion."""
    if not hasattr(choice, "delta"):
        return choice.text or ""
    more = choice.delta.model_extra or {}
    return (choice.delta.content or "") + "".join(more.get(name) or "" for name in _THOUGHTS)


def _histogram(more: Mapping[str, Any] | None) -> tuple[int, ...]:
    """What vLLM adds to an answer with `--per-request-spec-decode-metrics`."""
    try:
        return tuple(map(int, (more or {})["metrics"]["speculative_decoding"]["acceptance_histogram"]))
    except (KeyError, TypeError, ValueError):
        return ()
