"""Throughput and time per token by the number of requests that run at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median

from headstart.bench.latency import token_ms
from headstart.bench.runner import AnyRun, Run, with_rows
from headstart.bench.samples import Sample, Setup

MOST = 32


@dataclass(frozen=True)
class Load:
    """A run under load: `rows` requests at any time, a new one as soon as one ends.

    temperature: of sampling.
    tokens_per_second: throughput of all rows together, the median over repetitions.
    token_ms: percentiles of the time per token of a row, in milliseconds.
    """

    run: str
    temperature: float
    rows: int
    tokens_per_second: float
    token_ms: dict[str, float]


def read_levels(text: str) -> tuple[int, ...]:
    """The numbers of rows in a text such as `1,4,16`. Raises ValueError for what is no such list, and beyond the bounds."""
    try:
        levels = tuple(map(int, text.split(",")))
    except ValueError:
        raise ValueError(f"concurrency is {text!r}; write whole numbers with commas between them, such as 1,4,16") from None
    if len({*levels}) < len(levels) or not all(1 <= level <= MOST for level in levels):
        raise ValueError(f"concurrency is {text!r}; each number must be from 1 to {MOST}, and given once")
    return levels


def sweep(
    setup: Setup, runs: Sequence[AnyRun], levels: Sequence[int], repeat: int, on_progress: Callable[[], None] = lambda: None
) -> list[Load]:
    """Every run at every number of rows, without peers, which have one row. The runs' engines are replaced.

    A level with more rows than prompts repeats the prompts, with other seeds.
    on_progress: called after each answer.
    """
    return list(chain.from_iterable(_at(loaded(setup, rows), runs, repeat, on_progress) for rows in levels))


def loaded(setup: Setup, rows: int) -> Setup:
    """The setup with this number of rows, and with at least as many tasks."""
    copies = -(-rows // len(setup.tasks))
    return replace(setup, rows=rows, tasks=(setup.tasks * copies)[: max(rows, len(setup.tasks))])


def _at(setup: Setup, runs: Sequence[AnyRun], repeat: int, on_progress: Callable[[], None]) -> list[Load]:
    passes: dict[str, list[list[Sample]]] = {}
    engines = with_rows(setup, runs)
    for number in range(repeat + 1):
        for run in engines:
            samples = _answers(setup, run, on_progress)
            if number:  # the first pass warms up
                passes.setdefault(run.name, []).append(samples)
    return [_load(setup, name, some) for name, some in passes.items()]


def _answers(setup: Setup, run: Run, on_progress: Callable[[], None]) -> list[Sample]:
    samples = run.answers(setup, range(len(setup.tasks)))
    for _ in samples:
        on_progress()
    return samples


def num_answers(setup: Setup, num_runs: int, levels: Sequence[int], repeat: int) -> int:
    """How often `sweep` calls `on_progress`. num_runs: without peers."""
    return sum(num_runs * (repeat + 1) * len(loaded(setup, rows).tasks) for rows in levels)


def _load(setup: Setup, run: str, passes: Sequence[Sequence[Sample]]) -> Load:
    clean = [samples for samples in passes if samples[0].is_clean] or passes
    rates = [sum(len(s.tokens) for s in samples) / sum(s.seconds for s in samples) for samples in clean]
    bursts = chain.from_iterable(sample.bursts for samples in clean for sample in samples)
    return Load(run, setup.params.temperature, setup.rows, median(rates), token_ms(bursts))
