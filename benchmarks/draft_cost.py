"""Where a round's time goes: the parts of a round, and inside `propose` every level's layers, projection, choice and bookkeeping.

    python benchmarks/draft_cost.py [--model MODEL] --drafter mtp [--planner tree:16] [--temperature 1] [--threads 1]

Real answers are decoded while the functions of a round are wrapped from outside. A clock charges the time between any two of their
borders to what is running then, so the parts of a round add up to it; what the clock itself costs is seen beside the same rounds
without it. Inside `propose`, `layers` are the drafter's own modules, `project` the way from its states to the vocabulary, `noise`
the target's noise (which verifying needs as well), `choose` what else `Rows.choose` does, `tree` the bookkeeping of
`headstart.drafters.parts.grow`, and `walk` all the rest: embeddings, positions, what a method does between its modules. For a
drafter
that is no torch module, layers and projection are part of `walk`. Numbers are medians over the rounds that drafted in the most
common way; `x` counts target forwards of one node, as plain decoding runs them. With one thread they are its processor time, which
what else runs on the machine hardly touches; with more, time on the wall, which wants a quiet machine. One JSON line at the end.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from headstart.bench import report, runner, suites
from headstart.cli.bench import as_tasks
from headstart.cli.options import Model
from headstart.drafters.parts import grow
from headstart.engine import engine as rounds
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.speculation.rows import Rows

PARTS = ("propose", "prune", "merge", "score", "verify", "commit", "extend", "host")
INSIDE = ("layers", "walk", "project", "noise", "choose", "tree")
OWN = "walk"  # what a part does itself
Key = tuple[str, int, str]  # part of the round, level (0 outside propose), what


@dataclass
class Round:
    """Seconds of a round by part, level and what. lines: how many nodes were given children, by level; nodes: scored."""

    spent: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    lines: dict[int, int] = field(default_factory=dict)
    nodes: int = 0

    def sum(self, part: str | None = None, level: int | None = None, what: str | None = None) -> float:
        """Seconds of a part, of one of its levels, of one thing; None: of all of them."""
        wanted = part, level, what
        return sum(spent for key, spent in self.spent.items() if all(w in (None, k) for w, k in zip(wanted, key, strict=True)))


class Clock:
    """Charges all time to what is running: the innermost thing entered.

    A round begins when something is entered while nothing runs, and ends when that is left. Inside `propose`, what leads to the
    choice of a level's nodes belongs to that level; where all levels are projected before any is chosen, so do layers and
    projections in their order. now: seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._stack: list[str] = []
        self._last = 0.0
        self._done = dict.fromkeys(("project", "choose"), 0)  # how often, in this round
        self.round = Round()
        self.rounds: list[Round] = []

    def enter(self, what: str) -> None:
        if self._stack:
            self._charge()
        else:
            self.round, self._last = Round(), self._now()
        self._stack.append(what)
        if what == "propose":
            self._done = dict.fromkeys(self._done, 0)

    def leave(self) -> None:
        self._charge()
        what = self._stack.pop()
        if what in self._done:
            self._done[what] += 1
        if not self._stack:
            self.rounds.append(self.round)

    def _charge(self) -> None:
        now = self._now()
        part, what = self._stack[:2][-1], self._stack[-1]
        key = part, self._level(what) if part == "propose" else 0, OWN if what == part else what
        self.round.spent[key] += now - self._last
        self._last = now

    def _level(self, what: str) -> int:
        chosen = self._done["choose"]
        return 1 + (max(chosen, self._done["project"]) if what in ("layers", "project") else chosen)

    def timed(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, clocked."""

        def call(*given: Any, **named: Any) -> Any:
            self.enter(what)
            try:
                return function(*given, **named)
            finally:
                self.leave()

        return call


Wrap = tuple[Any, str, str]  # whose, which function, as what


@contextmanager
def wrapped(clock: Clock, wraps: Sequence[Wrap], modules: Sequence[tuple[nn.Module, str]] = ()) -> Iterator[None]:
    """Functions and modules clocked, until the end of the block."""
    with ExitStack() as stack:
        for owner, name, what in wraps:
            stack.enter_context(patch.object(owner, name, clock.timed(what, getattr(owner, name))))
        for module, what in modules:
            stack.callback(module.register_forward_pre_hook(lambda *_, what=what: clock.enter(what)).remove)
            stack.callback(module.register_forward_hook(lambda *_: clock.leave()).remove)
        yield


@contextmanager
def watched(clock: Clock, engine: Engine, modules: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Everything that an engine does in a round clocked, and noted how many nodes it is about."""
    choose, score = Rows.choose, engine.target.score

    def noted_choose(rows: Rows, logits: Tensor, level: int, *given: Any, **named: Any) -> Any:
        clock.round.lines[level] = len(logits)
        return choose(rows, logits, level, *given, **named)

    def noted_score(forest: Any, *given: Any, **named: Any) -> Any:
        clock.round.nodes = len(forest)
        return score(forest, *given, **named)

    bookkeeping = [name for name, method in vars(grow._TreeBuilder).items() if callable(method) and not name.startswith("_")]
    wraps: list[Wrap] = [
        (engine, "step", "host"),
        (engine.drafter, "propose", "propose"),
        (engine.drafter, "extend", "extend"),
        (type(engine.planner), "prune", "prune"),
        (engine.target, "score", "score"),
        (engine.cache, "commit", "commit"),
        (rounds, "merge", "merge"),
        (rounds, "verify", "verify"),
        (Rows, "noise", "noise"),
        (Rows, "choose", "choose"),
        *((grow._TreeBuilder, name, "tree") for name in bookkeeping),
    ]
    with ExitStack() as stack:
        stack.enter_context(patch.object(Rows, "choose", noted_choose))
        stack.enter_context(patch.object(engine.target, "score", noted_score))
        stack.enter_context(wrapped(clock, wraps, modules))
        yield


def modules_of(engine: Engine, decode: Callable[[], object]) -> list[tuple[nn.Module, str]]:
    """A drafter's modules that are called from no other one of it, and what leads to the vocabulary: its own, or the target's.

    Heard from a few rounds, which `decode` runs: hooks on all modules would be slow."""
    if not isinstance(engine.drafter, nn.Module):
        return []
    depth, outermost = [0], {}

    def enter(module: nn.Module, given: Any) -> None:
        if not depth[0]:
            outermost[module] = "layers"
        depth[0] += 1

    def leave(module: nn.Module, given: Any, out: Any) -> None:
        depth[0] -= 1

    with ExitStack() as stack:
        for module in engine.drafter.modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        decode()
    head: Any = engine.target.model.get_output_embeddings()
    own = [module for name, module in engine.drafter.named_modules() if name.rpartition(".")[2] in ("projection", "lm_head")]
    return list((outermost | dict.fromkeys([head, *own], "project")).items())


# -- measuring --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """rounds: those that drafted in the most common way, of `num_rounds` that drafted; bare: the same ones without a clock inside;
    plain: plain decoding's."""

    rounds: Sequence[Round]
    num_rounds: int
    bare: Sequence[Round]
    plain: Sequence[Round]

    def ms(self, part: str | None = None, level: int | None = None, what: str | None = None) -> float:
        """Milliseconds of a round of the drafter, or of what is named of it."""
        return milliseconds(self.rounds, part, level, what)

    @property
    def forward(self) -> float:
        """Milliseconds of plain decoding's forward of one node."""
        return milliseconds(self.plain, "score")

    @property
    def sums(self) -> dict[str, float]:
        """Milliseconds of what should be alike, and of what to compare it with."""
        return {
            "sum of these": sum(map(self.ms, PARTS)),
            "whole round": self.ms(),
            "without clock": milliseconds(self.bare),
            "plain forward": self.forward,
            "plain round": milliseconds(self.plain),
        }

    @property
    def levels(self) -> list[int]:
        """Of `propose`; the last is what follows the last choice."""
        return sorted({level for part, level, _ in self.rounds[0].spent if part == "propose"})

    def as_dict(self) -> dict[str, Any]:
        """Milliseconds."""
        return {
            "parts": {part: self.ms(part) for part in PARTS},
            "levels": {level: {what: self.ms("propose", level, what) for what in INSIDE} for level in self.levels},
            **self.sums,
            "nodes": self.rounds[0].nodes,
            "lines": self.rounds[0].lines,
            "rounds": [len(self.rounds), self.num_rounds],
        }


def milliseconds(some: Sequence[Round], part: str | None = None, level: int | None = None, what: str | None = None) -> float:
    return 1000 * median(one.sum(part, level, what) for one in some)


def stopwatch() -> Callable[[], float]:
    """Processor time where one thread does everything, else the wall's."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def measure(setup: runner.Setup, spec: str) -> Findings:
    """Every prompt by plain decoding, by the drafter, and by the drafter under the clock.

    Raises ValueError where nothing is chosen from logits."""
    plain, run = runner.prepare(setup, [spec])
    modules = modules_of(run.engine, lambda: runner.answer(setup, run, 0))
    runner.answer(setup, plain, 0)
    simple, bare, full = (Clock(stopwatch()) for _ in range(3))
    for place in range(len(setup.tasks)):
        with wrapped(simple, [(plain.engine, "step", "host"), (setup.target, "score", "score")]):
            runner.answer(setup, plain, place)
        with wrapped(bare, [(run.engine, "step", "host")]):
            runner.answer(setup, run, place)
        with watched(full, run.engine, modules):
            runner.answer(setup, run, place)
    both = [(one, without) for one, without in zip(full.rounds, bare.rounds, strict=True) if one.lines]
    if not both:
        raise ValueError(f"{spec} drafted nothing that was chosen from logits; there is nothing to measure inside it")
    usual = Counter(tuple(one.lines.items()) for one, _ in both).most_common(1)[0][0]
    chosen = [(one, without) for one, without in both if tuple(one.lines.items()) == usual]
    own, without = zip(*chosen, strict=True)
    return Findings(own, len(both), without, simple.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the embedded one by default")
    parser.add_argument("--drafter", required=True, help="a folder of heads or a name")
    parser.add_argument("--planner", help="such as chain:4, tree:16 or best:nodes=8; the drafter's own by default")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", default="stories", help="a JSONL file or a built-in suite")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    try:
        found, setup = run(arguments)
    except ValueError as error:
        parser.error(str(error))
    show(found, setup, arguments)
    print(json.dumps({"machine": report.machine(setup.target), "arguments": vars(arguments), "ms": found.as_dict()}))


def run(arguments: argparse.Namespace) -> tuple[Findings, runner.Setup]:
    spec = f"{arguments.drafter}@{arguments.planner}" if arguments.planner else arguments.drafter
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=0)
    runner.read_spec(spec, params.temperature)
    cases = suites.load_cases(arguments.prompts, arguments.limit)
    model = Model(arguments.model, device="cpu", dtype=arguments.dtype, exact=arguments.exact, threads=arguments.threads)
    llm = model.load(drafter=None, max_rows=1)
    tasks, _ = as_tasks(llm, cases, params.max_tokens, None, False)
    setup = runner.Setup(llm.engine.target, tasks, params, llm.stop_ids)
    return measure(setup, spec), setup


# -- printing ---------------------------------------------------------------------------------------------------------------


def show(found: Findings, setup: runner.Setup, arguments: argparse.Namespace) -> None:
    """The parts of a round, with what the clock saw inside them, and the levels of `propose`."""
    whole, forward = found.ms(), found.forward
    words = [arguments.drafter, arguments.planner or "its own planner", f"T={arguments.temperature:g}", report.cpu_name()]
    words += [
        f"{torch.get_num_threads()} threads",
        f"{found.rounds[0].nodes} nodes",
        f"{len(found.rounds)} of {found.num_rounds} rounds",
        *report.labels(setup),
    ]
    parts = Table(title=f"a round: {', '.join(words)}", title_justify="left")
    for column in ("", "ms", "share", "x", "of which"):
        parts.add_column(column, justify="left" if column in ("", "of which") else "right")
    for part in PARTS:
        ms, inner = found.ms(part), {what: found.ms(part, what=what) for what in INSIDE if what != OWN}
        told = ", ".join(f"{what} {spent:.3f}" for what, spent in inner.items() if spent >= 0.0005)
        parts.add_row(part, f"{ms:.3f}", f"{ms / whole:.1%}", f"{ms / forward:.2f}", told)
    parts.add_section()
    for name, ms in found.sums.items():
        parts.add_row(name, f"{ms:.3f}", f"{ms / whole:.1%}", f"{ms / forward:.2f}", "")
    Console(width=160).print(parts)
    Console(width=160).print(by_level(found))


def by_level(found: Findings) -> Table:
    table = Table(title="inside propose, ms", title_justify="left")
    for column in ("level", "parents", *INSIDE, "all", "x"):
        table.add_column(column, justify="right")
    lines = found.rounds[0].lines
    for level in (*found.levels, None):
        if level is None:
            table.add_section()
        spent = [found.ms("propose", level, what) for what in (*INSIDE, None)]
        name, parents = ("all", sum(lines.values())) if level is None else (level, lines[level]) if level in lines else ("end", "")
        table.add_row(str(name), str(parents), *(f"{ms:.3f}" for ms in spent), f"{spent[-1] / found.forward:.2f}")
    return table


if __name__ == "__main__":
    main()
