"""Endpoints in turn on the same prompts: timed answers, several at once, and throughput by their number.

An answer's `seconds` are its share of the time: where several requests run at once, each has an equal part of every moment, so that
the seconds of all answers sum to the time in which any ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from statistics import median

import numpy as np

from headstart.bench.concurrency import Load
from headstart.bench.endpoints import counters
from headstart.bench.endpoints.client import Endpoint, EndpointTask, PromptTooLong, Reply, RequestFailed
from headstart.bench.latency import token_ms
from headstart.distill.connection import at_once
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams


@dataclass(frozen=True)
class EndpointSetup:
    """What all endpoints share.

    params: sampling and max_tokens; the seed of task `i` is `mix(seed, i)`.
    rows: requests that run at once.
    """

    tasks: tuple[EndpointTask, ...]
    params: SamplingParams
    rows: int = 1

    def params_of(self, task: int) -> SamplingParams:
        """The sampling parameters of a task, with its seed."""
        return replace(self.params, seed=mix(self.params.seed or 0, task))


@dataclass(frozen=True)
class EndpointSample:
    """One answer of one endpoint.

    run: name of the endpoint.
    task: index of the task.
    seconds: total time, its share; prompt_seconds: the part of it until the first token.
    repeat: number of the measurement, from 0.
    """

    run: str
    task: int
    reply: Reply
    seconds: float
    prompt_seconds: float
    repeat: int = 0

    @property
    def first_token_seconds(self) -> float:
        """Time that passed from the request to its first token."""
        return self.reply.first - self.reply.began


@dataclass
class Measured:
    """What was measured of some endpoints with one setup, up to a failure.

    samples: of the answers.
    skipped: tasks that exceed an endpoint's context.
    speculation: of each endpoint that publishes it, over these samples.
    others: tokens that each endpoint generated for other clients meanwhile, where it counts them.
    loads: throughput by the number of requests at once.
    failure: why the measurement ended early; None: it did not.
    """

    setup: EndpointSetup
    samples: list[EndpointSample] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)
    speculation: dict[str, counters.Speculation] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    failure: str | None = None

    def usable(self, runs: Sequence[str]) -> list[EndpointSample]:
        """The samples of the tasks that every run has answered."""
        answered = [{sample.task for sample in self.samples if sample.run == run} for run in runs]
        common = set.intersection(*answered) - self.skipped
        return [sample for sample in self.samples if sample.task in common]


@dataclass
class _Batch:
    """Answers of one endpoint that ran together. failure: what ended it early."""

    replies: list[tuple[int, Reply]] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)
    failure: RequestFailed | None = None


def measure(
    setup: EndpointSetup,
    endpoints: Sequence[Endpoint],
    repeat: int,
    levels: Sequence[int] = (),
    on_progress: Callable[[], None] = lambda: None,
) -> Measured:
    """All answers of the endpoints: per repetition and prompt each in turn; the first prompts warm up, unmeasured.

    With several rows each endpoint answers all prompts, then the next one does.
    levels: numbers of requests at once to measure throughput at, after that.
    on_progress: called after each answer.

    Raises ValueError for a `repeat` below 1, and where the first prompts already fail. A later failure ends the measurement, and
    `failure` says why.
    """
    if repeat < 1:
        raise ValueError(f"repeat is {repeat}; it must be at least 1")
    for endpoint in endpoints:
        if failure := _batch(endpoint, setup, range(len(setup.tasks))[: setup.rows], on_progress).failure:
            raise failure
    measured = Measured(setup)
    _measure(measured, endpoints, repeat, on_progress)
    for rows in levels:
        if measured.failure is None:
            _add_loads(measured, endpoints, rows, repeat, on_progress)
    return measured


def num_answers(setup: EndpointSetup, num_endpoints: int, repeat: int, levels: Sequence[int]) -> int:
    """How often `measure` calls `on_progress`, if nothing fails."""
    loads = sum((repeat + 1) * max(rows, len(setup.tasks)) for rows in levels)
    return num_endpoints * (min(setup.rows, len(setup.tasks)) + repeat * len(setup.tasks) + loads)


def _measure(measured: Measured, endpoints: Sequence[Endpoint], repeat: int, on_progress: Callable[[], None]) -> None:
    setup = measured.setup
    tasks = range(len(setup.tasks))
    parts: list[Sequence[int]] = [tasks] if setup.rows > 1 else [[task] for task in tasks]
    before = {endpoint.name: counters.settled_counters(endpoint.url, endpoint.api_key) for endpoint in endpoints}
    for number, part, endpoint in product(range(repeat), parts, endpoints):
        batch = _batch(endpoint, setup, part, on_progress)
        measured.samples += samples_of(endpoint.name, batch.replies, number)
        measured.skipped |= batch.skipped
        if batch.failure is not None:
            measured.failure = str(batch.failure)
            break
    for endpoint in endpoints:
        after = counters.settled_counters(endpoint.url, endpoint.api_key)
        _note_counters(measured, endpoint.name, before[endpoint.name], after)


def _note_counters(measured: Measured, run: str, before: counters.Counters, after: counters.Counters) -> None:
    """What the engine counted meanwhile; the figures of single answers where it gives them."""
    own = [sample.reply for sample in measured.samples if sample.run == run]
    histograms = [reply.histogram for reply in own]
    speculation = counters.of_histograms(histograms) if all(histograms) else None
    speculation = speculation or counters.speculation_between(before, after)
    if speculation is not None:
        measured.speculation[run] = speculation
    generated = counters.generated(before, after)
    if generated is not None and measured.failure is None:
        measured.others[run] = generated - sum(reply.num_tokens for reply in own)


def _batch(endpoint: Endpoint, setup: EndpointSetup, tasks: Iterable[int], on_progress: Callable[[], None]) -> _Batch:
    """The answers to tasks, `setup.rows` at once. A task beyond the number of tasks repeats one with another seed."""

    def answer(task: int) -> tuple[int, Reply | None]:
        try:
            return task, endpoint.reply(setup.tasks[task % len(setup.tasks)], setup.params_of(task))
        except PromptTooLong:
            return task, None

    batch = _Batch()
    try:
        for task, reply in at_once(answer, tasks, setup.rows):
            if reply is None:
                batch.skipped.add(task % len(setup.tasks))
            else:
                batch.replies.append((task, reply))
            on_progress()
    except RequestFailed as error:
        batch.failure = error
    return batch


def samples_of(run: str, replies: Sequence[tuple[int, Reply]], repeat: int = 0) -> list[EndpointSample]:
    """The samples of answers that ran together, each with its share of the time. replies: (task, reply) of each."""
    elapsed = _shared_time([reply for _, reply in replies])
    return [
        EndpointSample(
            run, task, reply, elapsed(reply.ended) - elapsed(reply.began), elapsed(reply.first) - elapsed(reply.began), repeat
        )
        for task, reply in replies
    ]


def _shared_time(replies: Sequence[Reply]) -> Callable[[float], float]:
    """A function of a moment, of which the difference over a span is one request's share of it, in seconds."""
    if not replies:
        return lambda moment: 0.0
    began, ended = (np.array([getattr(reply, name) for reply in replies]) for name in ("began", "ended"))
    moments = np.unique(np.concatenate([began, ended]))
    running = (began[None] <= moments[:-1, None]).sum(1) - (ended[None] <= moments[:-1, None]).sum(1)
    shares = np.diff(moments) / np.maximum(running, 1)
    totals = np.concatenate([[0.0], np.cumsum(shares)])
    return lambda moment: float(np.interp(moment, moments, totals))


def _add_loads(measured: Measured, endpoints: Sequence[Endpoint], rows: int, repeat: int, on_progress: Callable[[], None]) -> None:
    """Throughput with `rows` requests at any time; the first pass warms up. After a failure nothing is added."""
    setup = replace(measured.setup, rows=rows)
    tasks = [task for task in range(max(rows, len(setup.tasks))) if task % len(setup.tasks) not in measured.skipped]
    passes: dict[str, list[list[EndpointSample]]] = {}
    for number, endpoint in product(range(repeat + 1), endpoints):
        batch = _batch(endpoint, setup, tasks, on_progress)
        if batch.failure is not None:
            measured.failure = str(batch.failure)
            return
        if number:
            passes.setdefault(endpoint.name, []).append(samples_of(endpoint.name, batch.replies, number))
    measured.loads += [_load(setup, run, some) for run, some in passes.items()]


def _load(setup: EndpointSetup, run: str, passes: Sequence[Sequence[EndpointSample]]) -> Load:
    rates = [sum(s.reply.num_tokens for s in samples) / (sum(s.seconds for s in samples) or 1.0) for samples in passes]
    bursts = chain.from_iterable(sample.reply.bursts for samples in passes for sample in samples)
    return Load(run, setup.params.temperature, setup.rows, median(rates), token_ms(bursts))
