"""Interleaved measurements: every prompt by plain decoding and by each drafter in turn, in one process on one target.

A sample records how long the process waited for a processor (Linux counts that), so that samples which other programs disturbed can
be left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headstart.bench.replay import Replay
from headstart.engine.drafter_loading import make, resolve_planner
from headstart.engine.engine import Engine
from headstart.engine.memory import request_bytes
from headstart.engine.planning import planner_for
from headstart.engine.scheduler import Request
from headstart.engine.stats import Stats
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Auto, CalibratedTree, Planner, parse
from headstart.speculation.rules import parse_rule
from headstart.target.target import Target

PLAIN = "plain"
CLEAN = 0.02  # fraction of its time that a clean sample may have waited for a processor
PLANNERS = ("auto", "chain", "best", "full", "tree")


@dataclass(frozen=True)
class Task:
    """A prompt to answer.

    prompt: token ids.
    reference: token ids of the answer to replay, or None.
    kind: name of the prompt set.
    """

    prompt: tuple[int, ...]
    reference: tuple[int, ...] | None = None
    kind: str = ""


@dataclass(frozen=True)
class Setup:
    """What all runs share.

    params: sampling and max_tokens; the seed of task `i` is `mix(seed, i)`.
    stop_ids: tokens that end an answer.
    accept: acceptance rule, as `parse_rule` reads it.
    is_replay: whether the references replace the target's tokens.
    """

    target: Target
    tasks: tuple[Task, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    accept: str = "coupled"
    is_replay: bool = False

    def params_of(self, task: int) -> SamplingParams:
        """The sampling parameters of a task, with its seed. A replay ends where its reference ends."""
        params = replace(self.params, seed=mix(self.params.seed or 0, task))
        if not self.is_replay:
            return params
        reference = self.tasks[task].reference or ()
        return replace(params, max_tokens=min(params.max_tokens, len(reference)), ignore_eos=True)


@dataclass(frozen=True)
class Sample:
    """One answer by one run.

    run: name of the run.
    task: index of the task.
    tokens: token ids of the answer.
    seconds: total time.
    prompt_seconds: time to first token.
    stats: of the rounds after the first token.
    delay: fraction of the time that the process waited for a processor; None where the system does not count it.
    """

    run: str
    task: int
    tokens: tuple[int, ...]
    seconds: float
    prompt_seconds: float
    stats: Stats
    delay: float | None

    @property
    def is_clean(self) -> bool:
        """Whether the process hardly waited for a processor."""
        return self.delay is not None and self.delay <= CLEAN


@dataclass(frozen=True)
class Run:
    """An engine with a drafter, on the common target.

    name: DRAFTER[@PLANNER], or plain.
    replay: the rule of the engine, where references replace its tokens.
    """

    name: str
    engine: Engine
    replay: Replay | None


def prepare(setup: Setup, specs: Sequence[str]) -> list[Run]:
    """Plain decoding, then one run per `DRAFTER[@PLANNER]`. Raises ValueError for an unknown name and for one given twice."""
    if len({PLAIN, *specs}) <= len(specs):
        raise ValueError(f"a run is named twice, or {PLAIN!r}, which always runs: {', '.join(specs)}")
    return [_run(setup, PLAIN), *(_run(setup, spec) for spec in specs)]


def split_spec(spec: str) -> tuple[str, Planner | CalibratedTree | Auto | None]:
    """`model:PATH@chain:4` into the drafter and its planner; a path may hold an @ of its own."""
    drafter, at, planner = spec.rpartition("@")
    if at and planner.partition(":")[0] in PLANNERS:
        return drafter, parse(planner)
    return spec, None


def read_spec(spec: str, temperature: float, model: str | None) -> tuple[str, Planner | Auto | None]:
    """The drafter of a run and its planner at a temperature, None for the drafter's own.

    model: the target, by name; None: the embedded model.

    Raises ValueError for a planner that cannot be read, and for a calibrated tree of a drafter that was not calibrated.
    """
    drafter, planner = split_spec(spec)
    return drafter, resolve_planner(planner, drafter, temperature, model)


def _run(setup: Setup, spec: str) -> Run:
    name, planner = read_spec(spec, setup.params.temperature, setup.target.name)
    drafter = None if spec == PLAIN else make(name, setup.target)
    planner = planner_for(setup.target, drafter, planner, parse_rule(setup.accept))
    longest = max(len(task.prompt) + setup.params_of(index).max_tokens for index, task in enumerate(setup.tasks))
    memory = request_bytes(setup.target, drafter, planner, longest)
    replay = Replay(parse_rule(setup.accept)) if setup.is_replay else None
    rule = replay.rule if replay else setup.accept
    engine = Engine(setup.target, drafter, planner, max_rows=1, memory=memory, accept=rule)
    return Run(spec, engine, replay)


def measure(setup: Setup, runs: Sequence[Run], repeat: int = 1, on_progress: Callable[[], None] = lambda: None) -> list[Sample]:
    """All samples: per repetition and prompt, plain decoding first, then each run. The first prompt warms up every run, unmeasured.

    repeat: samples per prompt and run.
    on_progress: called after each answer.
    Raises ValueError for a `repeat` below 1.
    """
    if repeat < 1:
        raise ValueError(f"repeat is {repeat}; it must be at least 1")
    for run in runs:
        answer(setup, run, 0)
        on_progress()
    samples: list[Sample] = []
    for _ in range(repeat):
        for task in range(len(setup.tasks)):
            for run in runs:
                samples.append(answer(setup, run, task))
                on_progress()
    return samples


def answer(setup: Setup, run: Run, index: int) -> Sample:
    """The timed answer of a run to the task of that index."""
    task, params, engine = setup.tasks[index], setup.params_of(index), run.engine
    if run.replay:
        run.replay.follow(task.prompt, task.reference or ())
    waited, began = waiting_seconds(), time.perf_counter()
    request = engine.add(task.prompt, params, stop_ids=setup.stop_ids)
    prompt_seconds, before = _prefill(engine, request, began)
    while request.finish_reason is None:
        engine.step()
    seconds = time.perf_counter() - began
    now = waiting_seconds()
    delay = None if waited is None or now is None else (now - waited) / seconds
    return Sample(run.name, index, tuple(request.output), seconds, prompt_seconds, engine.stats.since(before), delay)


def _prefill(engine: Engine, request: Request, began: float) -> tuple[float, Stats]:
    """Run rounds until the first token: the time to first token in seconds, and the statistics so far."""
    while not request.output:
        engine.step()
    return time.perf_counter() - began, engine.stats.copy()


def waiting_seconds() -> float | None:
    """Seconds that this process's threads have waited for a processor so far; None where the system does not count it."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):
            continue  # a thread that ended meanwhile
    return total / 1e9 if total else None
