"""Interleaved measurements: plain decoding and each drafter in turn, in one process on one target.

A sample records how long the process waited for a processor (Linux counts that), so that samples which other programs disturbed can
be left out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from headstart.bench import peers
from headstart.bench.replay import Replay
from headstart.bench.samples import CLEAN, PLAIN, Sample, Setup, Task
from headstart.bench.weights import weight_bytes
from headstart.drafters import Drafter
from headstart.drafters.fused import Fused
from headstart.engine.drafter_loading import make, resolve_planner
from headstart.engine.engine import Engine
from headstart.engine.memory import headroom_slots, slot_bytes
from headstart.engine.planning import planner_for
from headstart.engine.scheduler import Request
from headstart.engine.stats import Stats
from headstart.engine.waiting import Watch, waiting_seconds
from headstart.speculation.planner import Auto, CalibratedTree, Planner, parse
from headstart.speculation.reliability import Reliability, by_name
from headstart.speculation.rules import parse_rule

__all__ = [
    "CLEAN", "PLAIN", "Run", "Sample", "Setup", "Task", "answer", "measure", "num_answers", "prepare", "read_spec", "split_spec",
    "waiting_seconds", "with_rows",
]  # fmt: skip

PLANNERS = ("auto", "chain", "best", "full", "tree")


@dataclass(frozen=True)
class Run:
    """An engine with a drafter, on the common target.

    name: DRAFTER[@PLANNER], or plain.
    replay: the rule of the engine, where references replace its tokens.
    memory: bytes of the drafter's weights ("heads"), and of the KV cache that `rows` of the longest requests need, the drafter's
        included ("cache").
    """

    name: str
    engine: Engine
    replay: Replay | None
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def reliability(self) -> dict[str, Reliability]:
        """Of the chances so far, by drafter; of joined ones also under the key `all`."""
        drafter = self.engine.drafter
        parts = drafter.parts if isinstance(drafter, Fused) else (drafter,)
        return by_name(self.engine.learning.reliability, [part.name for part in parts if part is not None])

    def answers(self, setup: Setup, tasks: Sequence[int]) -> list[Sample]:
        """The timed answers to the tasks of these indices, at most `setup.rows` of them at once, in the order they end."""
        watch = Watch()
        flights = list(_fly(setup, self, tasks))
        delay = watch.delay()
        return [flight.sample(setup, self.name, delay) for flight in flights]


AnyRun = Run | peers.Peer


# -- preparing --------------------------------------------------------------------------------------------------------------


def prepare(setup: Setup, specs: Sequence[str]) -> list[AnyRun]:
    """Plain decoding, then one run per `DRAFTER[@PLANNER]` or peer.

    Raises ValueError for an unknown name, for one given twice, and for a replay of several rows.
    """
    if len({PLAIN, *specs}) <= len(specs):
        raise ValueError(f"a run is named twice, or {PLAIN!r}, which always runs: {', '.join(specs)}")
    if setup.is_replay and setup.rows > 1:
        raise ValueError(f"a replay follows one text at a time, but rows is {setup.rows}; leave one of the two out")
    return [_run(setup, spec) for spec in (PLAIN, *specs)]


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
    if peers.is_peer(drafter):
        peers.check_spec(spec, planner)
        return drafter, None
    return drafter, resolve_planner(planner, drafter, temperature, model)


def _run(setup: Setup, spec: str) -> AnyRun:
    name = read_spec(spec, setup.params.temperature, setup.target.name)[0]
    if peers.is_peer(name):
        return peers.load(name, setup)
    drafter = None if spec == PLAIN else make(name, setup.target)
    return _with_engine(setup, spec, drafter, weight_bytes(drafter, setup.target))


def _with_engine(setup: Setup, name: str, drafter: Drafter | None, num_bytes: int) -> Run:
    chosen = read_spec(name, setup.params.temperature, setup.target.name)[1]
    planner = planner_for(setup.target, drafter, chosen, parse_rule(setup.accept))
    slots = setup.longest + headroom_slots(setup.target, drafter, planner, setup.rows)
    memory = setup.rows * slots * slot_bytes(setup.target, drafter)
    replay = Replay(parse_rule(setup.accept)) if setup.is_replay else None
    rule = replay.rule if replay else setup.accept
    # With twice the slots of `rows` requests, some free run always fits the next one: there are at most `rows` of them.
    allowed = memory if setup.rows == 1 else 2 * memory
    engine = Engine(setup.target, drafter, planner, max_rows=setup.rows, memory=allowed, accept=rule)
    return Run(name, engine, replay, {"heads": num_bytes, "cache": memory})


def with_rows(setup: Setup, runs: Iterable[AnyRun]) -> list[Run]:
    """The runs with new engines and planners for `setup.rows`, and the same drafters, which no longer serve the old engines.

    Peers are left out.
    """
    engines = [run for run in runs if isinstance(run, Run)]
    return [_with_engine(setup, run.name, run.engine.drafter, run.memory["heads"]) for run in engines]


# -- measuring --------------------------------------------------------------------------------------------------------------


def measure(setup: Setup, runs: Sequence[AnyRun], repeat: int = 1, on_progress: Callable[[], None] = lambda: None) -> list[Sample]:
    """All samples: per repetition and prompt, plain decoding first, then each run. The first prompt warms up every run, unmeasured.

    With several rows each run answers all prompts, then the next run does. Peers answer after all others in each repetition, so
    that another library's threads and copy of the weights do not disturb ours.

    repeat: samples per prompt and run.
    on_progress: called after each answer.
    Raises ValueError for a `repeat` below 1.
    """
    if repeat < 1:
        raise ValueError(f"repeat is {repeat}; it must be at least 1")
    tasks = range(len(setup.tasks))
    for run in runs:
        for _ in run.answers(setup, tasks[: setup.rows]):
            on_progress()
    groups: list[list[AnyRun]] = [[run for run in runs if isinstance(run, Run) is is_ours] for is_ours in (True, False)]
    parts: list[Sequence[int]] = [tasks] if setup.rows > 1 else [[task] for task in tasks]
    samples: list[Sample] = []
    for number, group, part in product(range(repeat), groups, parts):
        for run in group:
            for sample in run.answers(setup, part):
                samples.append(replace(sample, repeat=number))
                on_progress()
    return samples


def num_answers(setup: Setup, num_runs: int, repeat: int) -> int:
    """How often `measure` calls `on_progress`."""
    return num_runs * (min(setup.rows, len(setup.tasks)) + repeat * len(setup.tasks))


def answer(setup: Setup, run: AnyRun, index: int) -> Sample:
    """The timed answer of a run to the task of that index."""
    return run.answers(setup, [index])[0]


@dataclass
class _Flight:
    """A request that runs, and when its tokens came.

    began: when it was added; last: when its last tokens came.
    seconds, prompt_seconds, first_token_seconds, bursts: as in `Sample`.
    num_tokens: emitted so far.
    num_prompt_rounds: rounds until the first token.
    before, after: the engine's statistics after the first token and now.
    """

    task: int
    request: Request
    began: float
    last: float = 0.0
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    first_token_seconds: float = 0.0
    bursts: list[tuple[int, float]] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_rounds: int = 0
    before: Stats = field(default_factory=Stats)
    after: Stats = field(default_factory=Stats)

    def note(self, now: float, share: float, stats: Stats) -> None:
        """Note a round that ended `now`.

        share: of its time, in seconds.
        stats: of the engine, which never changes them in place.
        """
        self.seconds += share
        self.after = stats
        new = len(self.request.output) - self.num_tokens
        if new and self.num_tokens:
            self.bursts.append((new, now - self.last))
        elif new:
            self.prompt_seconds, self.first_token_seconds = self.seconds, now - self.began
            self.num_prompt_rounds, self.before = len(self.request.rounds), stats
        if new:
            self.num_tokens, self.last = self.num_tokens + new, now

    def sample(self, setup: Setup, run: str, delay: float | None) -> Sample:
        """What was noted. Alone, a request has the engine's statistics, which count the nodes that pad a forward too."""
        is_alone = setup.rows == 1
        stats = self.after.since(self.before) if is_alone else Stats.of(self.request.rounds[self.num_prompt_rounds :])
        tokens, times = tuple(self.request.output), (self.seconds, self.prompt_seconds)
        return Sample(run, self.task, tokens, *times, stats, delay, self.first_token_seconds, tuple(self.bursts))


def _fly(setup: Setup, run: Run, tasks: Sequence[int]) -> Iterator[_Flight]:
    """Run requests, the next one as soon as one ends, and yield those that have ended."""
    todo, flights = deque(tasks), list[_Flight]()
    last = time.perf_counter()
    while todo or flights:
        while todo and len(flights) < setup.rows:
            flights.append(_start(setup, run, todo.popleft()))
        run.engine.step()
        now = time.perf_counter()
        for flight in flights:
            flight.note(now, (now - last) / len(flights), run.engine.stats)
        last = now
        yield from (flight for flight in flights if flight.request.finish_reason is not None)
        flights = [flight for flight in flights if flight.request.finish_reason is None]


def _start(setup: Setup, run: Run, task: int) -> _Flight:
    prompt, reference = setup.tasks[task].prompt, setup.tasks[task].reference
    if run.replay:
        run.replay.follow(prompt, reference or ())
    began = time.perf_counter()
    return _Flight(task, run.engine.add(prompt, setup.params_of(task), stop_ids=setup.stop_ids), began)
