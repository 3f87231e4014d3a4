"""The time of a round by part, and inside `propose` by level: layers, LM head, noise, choice and bookkeeping.

    python benchmarks/draft_cost.py [--model MODEL] --drafter mtp [--planner tree:16] [--temperature 1] [--threads 1]

Prompts are decoded while the functions of a round are wrapped. A clock charges the time between their calls and returns to the
innermost one that runs, so the parts of a round add up to the whole; the cost of the clock is seen beside the same rounds without
it. Inside `propose`, `layers` are the drafter's own modules, `project` is the LM head, `noise` the target's noise (which
verification needs as well), `choose` the rest of `Rows.choose`, `tree` the bookkeeping of `headstart.drafters.parts`, and
`walk` everything else: embeddings, positions, what a method computes between its modules. For a drafter that is no torch module,
layers and LM head are part of `walk`, and where a level is one call of the compiled kernels, its LM head is part of `layers`.
`bytes` is how long the weights that a level reads would take at the memory speed measured in this process (the best of several
sums of a buffer that no cache holds), and `ratio` what the level took of that. Numbers are medians over the rounds that drafted the
most common shape; `x` counts target forwards of one node, as in plain decoding. With one thread, times are processor time, which
other programs hardly disturb; with more threads they are wall-clock time, which needs an idle machine. The last line of the output
is JSON.
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

import headstart
from headstart.bench import report, runner, suites
from headstart.bench.tasks import encode_tasks
from headstart.drafters.parts import grow, host_tree
from headstart.drafters.parts.compiled_level import CompiledLevel
from headstart.engine import engine as rounds
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.speculation.rows import Rows
from headstart.target.kernels.linear import packed_bytes
from headstart.target.steps import Steps

PARTS = ("propose", "prune", "merge", "score", "verify", "commit", "extend", "host")
INSIDE = ("layers", "walk", "project", "noise", "choose", "tree")
OWN = "walk"  # what a part computes itself
Key = tuple[str, int, str]  # part of the round, level (0 outside propose), what


@dataclass
class Round:
    """The time of a round.

    spent: seconds by part, level and operation.
    lines: number of nodes that were given children, by level.
    nodes: scored by the target.
    """

    spent: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    lines: dict[int, int] = field(default_factory=dict)
    nodes: int = 0

    def sum(self, part: str | None = None, level: int | None = None, what: str | None = None) -> float:
        """Seconds of a part, of one of its levels, of one operation; None: of all of them."""
        selected = part, level, what
        return sum(spent for key, spent in self.spent.items() if all(w in (None, k) for w, k in zip(selected, key, strict=True)))


class Clock:
    """Charges all time to the innermost operation that was entered.

    A round begins when an operation is entered while none runs, and ends when that one is left. Inside `propose`, everything up to
    the choice of a level's nodes belongs to that level; where all levels are projected before any is chosen, layers and projections
    are counted in their order.

    now: returns seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._stack: list[str] = []
        self._last = 0.0
        self._done = dict.fromkeys(("project", "choose"), 0)  # how often, in this round
        self.round = Round()
        self.rounds: list[Round] = []

    def enter(self, what: str) -> None:
        """An operation begins."""
        if self._stack:
            self._charge()
        else:
            self.round, self._last = Round(), self._now()
        self._stack.append(what)
        if what == "propose":
            self._done = dict.fromkeys(self._done, 0)

    def leave(self) -> None:
        """The innermost operation ends."""
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
        """The function, timed as the operation `what`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(what)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call


Wrap = tuple[Any, str, str]  # object, name of its function, operation


@contextmanager
def wrapped(clock: Clock, wraps: Sequence[Wrap], modules: Sequence[tuple[nn.Module, str]] = ()) -> Iterator[None]:
    """Time functions and modules until the end of the block."""
    with ExitStack() as stack:
        for owner, name, what in wraps:
            stack.enter_context(patch.object(owner, name, clock.timed(what, getattr(owner, name))))
        for module, what in modules:
            stack.callback(module.register_forward_pre_hook(lambda *_, what=what: clock.enter(what)).remove)
            stack.callback(module.register_forward_hook(lambda *_: clock.leave()).remove)
        yield


@contextmanager
def watched(clock: Clock, engine: Engine, modules: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Time everything that an engine does in a round, and record the number of nodes."""
    choose, score = Rows.choose, engine.target.score

    def recorded_choose(rows: Rows, logits: Tensor, level: int, *args: Any, **kwargs: Any) -> Any:
        clock.round.lines[level] = len(logits)
        return choose(rows, logits, level, *args, **kwargs)

    def recorded_score(forest: Any, *args: Any, **kwargs: Any) -> Any:
        clock.round.nodes = len(forest)
        return score(forest, *args, **kwargs)

    trees = (grow._TreeBuilder, host_tree.HostTree)
    bookkeeping = [(tree, name) for tree in trees for name in vars(tree) if callable(getattr(tree, name)) and name[0] != "_"]
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
        (Steps, "run", "layers"),
        *((tree, name, "tree") for tree, name in bookkeeping),
    ]
    with ExitStack() as stack:
        stack.enter_context(patch.object(Rows, "choose", recorded_choose))
        stack.enter_context(patch.object(engine.target, "score", recorded_score))
        stack.enter_context(wrapped(clock, wraps, modules))
        yield


def modules_of(engine: Engine, decode: Callable[[], object]) -> list[tuple[nn.Module, str]]:
    """A drafter's outermost modules and the LM head (its own, or the target's), each with its operation.

    decode: runs a few rounds to find them; hooks on all modules would be slow.
    """
    if not isinstance(engine.drafter, nn.Module):
        return []
    decode()  # before there are hooks, with which no level would become one call
    depth, outermost = [0], {}

    def enter(module: nn.Module, args: Any) -> None:
        if not depth[0]:
            outermost[module] = "layers"
        depth[0] += 1

    def leave(module: nn.Module, args: Any, out: Any) -> None:
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
class Result:
    """Measured rounds.

    rounds: those that drafted the most common shape.
    num_rounds: number of all rounds that drafted.
    bare: the same rounds without a clock inside.
    plain: rounds of plain decoding.
    level_bytes: bytes of the weights that the first level reads, and a later one; None where they are not known.
    memory_speed: bytes per second.
    """

    rounds: Sequence[Round]
    num_rounds: int
    bare: Sequence[Round]
    plain: Sequence[Round]
    level_bytes: tuple[int, int] | None
    memory_speed: float

    def bytes_ms(self, level: int | None) -> float | None:
        """Milliseconds that reading the weights of a level takes; None: of all levels; None where it is not known."""
        if self.level_bytes is None or level == self.levels[-1]:
            return None
        first, later = self.level_bytes
        num_bytes = first + later * (len(self.levels) - 2) if level is None else first if level == 1 else later
        return 1000 * num_bytes / self.memory_speed

    def ms(self, part: str | None = None, level: int | None = None, what: str | None = None) -> float:
        """Median milliseconds of a round of the drafter, or of a part, level or operation of it."""
        return milliseconds(self.rounds, part, level, what)

    @property
    def forward(self) -> float:
        """Milliseconds of plain decoding's forward of one node."""
        return milliseconds(self.plain, "score")

    @property
    def sums(self) -> dict[str, float]:
        """Milliseconds of totals that should agree, and of plain decoding."""
        return {
            "sum of these": sum(map(self.ms, PARTS)),
            "whole round": self.ms(),
            "without clock": milliseconds(self.bare),
            "plain forward": self.forward,
            "plain round": milliseconds(self.plain),
        }

    @property
    def levels(self) -> list[int]:
        """The levels of `propose`; the last one is what follows the last choice."""
        return sorted({level for part, level, _ in self.rounds[0].spent if part == "propose"})

    def as_dict(self) -> dict[str, Any]:
        """All numbers in milliseconds."""
        return {
            "parts": {part: self.ms(part) for part in PARTS},
            "levels": {level: {what: self.ms("propose", level, what) for what in INSIDE} for level in self.levels},
            "bytes": {level: self.bytes_ms(level) for level in self.levels},
            "memory_gb_s": self.memory_speed / 1e9,
            **self.sums,
            "nodes": self.rounds[0].nodes,
            "lines": self.rounds[0].lines,
            "rounds": [len(self.rounds), self.num_rounds],
        }


def milliseconds(some: Sequence[Round], part: str | None = None, level: int | None = None, what: str | None = None) -> float:
    """Median milliseconds over rounds."""
    return 1000 * median(one.sum(part, level, what) for one in some)


def stopwatch() -> Callable[[], float]:
    """Processor time where there is one thread, else wall-clock time."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def measure(setup: runner.Setup, spec: str) -> Result:
    """Decode every prompt plainly, with the drafter, and with the drafter and a clock inside.

    Raises ValueError where no draft is chosen from logits.
    """
    plain, run = runner.prepare(setup, [spec])
    modules = modules_of(run.engine, lambda: runner.answer(setup, run, 0))
    runner.answer(setup, plain, 0)
    simple, bare, full = (Clock(stopwatch()) for _ in range(3))
    for index in range(len(setup.tasks)):
        with wrapped(simple, [(plain.engine, "step", "host"), (setup.target, "score", "score")]):
            runner.answer(setup, plain, index)
        with wrapped(bare, [(run.engine, "step", "host")]):
            runner.answer(setup, run, index)
        with watched(full, run.engine, modules):
            runner.answer(setup, run, index)
    drafting = [(one, without) for one, without in zip(full.rounds, bare.rounds, strict=True) if one.lines]
    if not drafting:
        raise ValueError(f"{spec} chose no draft from logits; there is nothing to measure inside it")
    usual = Counter(tuple(one.lines.items()) for one, _ in drafting).most_common(1)[0][0]
    chosen = [(one, without) for one, without in drafting if tuple(one.lines.items()) == usual]
    measured, bare_rounds = zip(*chosen, strict=True)
    return Result(measured, len(drafting), bare_rounds, simple.rounds, level_bytes(run.engine), memory_speed())


def level_bytes(engine: Engine) -> tuple[int, int] | None:
    """Bytes of the weights that the first level reads, which is the LM head's, and a later one; None where they are not known."""
    compiled = getattr(engine.drafter, "compiled_level", None)
    if not isinstance(compiled, CompiledLevel):
        return None
    head: Any = getattr(engine.drafter, "lm_head", engine.target.model.get_output_embeddings())
    return packed_bytes(head), compiled.nbytes


def memory_speed() -> float:
    """Bytes per second of memory, read with torch's threads: the best of several sums of a buffer that no cache holds."""
    buffer = torch.ones(2**27)
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.nbytes / (time.perf_counter() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: the embedded model")
    parser.add_argument("--drafter", required=True, help="a folder of heads or a name")
    parser.add_argument("--planner", help="such as chain:4, tree:16 or best:nodes=8; default: the drafter's own")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--prompts", default="stories", help="a JSONL file or a built-in suite")
    parser.add_argument("--limit", type=int, help="only the first N prompts")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    try:
        result, setup = run(arguments)
    except ValueError as error:
        parser.error(str(error))
    show(result, setup, arguments)
    print(json.dumps({"machine": report.machine(setup.target), "arguments": vars(arguments), "ms": result.as_dict()}))


def run(arguments: argparse.Namespace) -> tuple[Result, runner.Setup]:
    """The result, and the setup that it was measured in. Raises ValueError for bad settings."""
    spec = f"{arguments.drafter}@{arguments.planner}" if arguments.planner else arguments.drafter
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=arguments.temperature, top_p=arguments.top_p, seed=0)
    runner.read_spec(spec, params.temperature, arguments.model)
    cases = suites.load_cases(arguments.prompts, arguments.limit)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    exact = "auto" if arguments.exact is None else arguments.exact
    llm = headstart.load(arguments.model, device="cpu", dtype=arguments.dtype, exact=exact, drafter=None, max_rows=1)
    tasks, _ = encode_tasks(llm, cases, params.max_tokens)
    setup = runner.Setup(llm.engine.target, tasks, params, llm.stop_ids)
    return measure(setup, spec), setup


# -- printing ---------------------------------------------------------------------------------------------------------------


def show(result: Result, setup: runner.Setup, arguments: argparse.Namespace) -> None:
    """Print the parts of a round, with the operations inside them, and the levels of `propose`."""
    total, forward = result.ms(), result.forward
    words = [arguments.drafter, arguments.planner or "its own planner", f"T={arguments.temperature:g}", report.cpu_name()]
    words += [
        f"{torch.get_num_threads()} threads",
        f"{result.rounds[0].nodes} nodes",
        f"{len(result.rounds)} of {result.num_rounds} rounds",
        *report.labels(setup),
    ]
    parts = Table(title=f"a round: {', '.join(words)}", title_justify="left")
    for column in ("", "ms", "share", "x", "of which"):
        parts.add_column(column, justify="left" if column in ("", "of which") else "right")
    for part in PARTS:
        ms, inner = result.ms(part), {what: result.ms(part, what=what) for what in INSIDE if what != OWN}
        operations = ", ".join(f"{what} {spent:.3f}" for what, spent in inner.items() if spent >= 0.0005)
        parts.add_row(part, f"{ms:.3f}", f"{ms / total:.1%}", f"{ms / forward:.2f}", operations)
    parts.add_section()
    for name, ms in result.sums.items():
        parts.add_row(name, f"{ms:.3f}", f"{ms / total:.1%}", f"{ms / forward:.2f}", "")
    Console(width=160).print(parts)
    Console(width=160).print(by_level(result))


def by_level(result: Result) -> Table:
    """The time inside `propose` by level."""
    table = Table(title="inside propose, ms", title_justify="left")
    for column in ("level", "parents", *INSIDE, "all", "x", "bytes", "ratio"):
        table.add_column(column, justify="right")
    lines = result.rounds[0].lines
    for level in (*result.levels, None):
        if level is None:
            table.add_section()
        spent = [result.ms("propose", level, what) for what in (*INSIDE, None)]
        name, parents = ("all", sum(lines.values())) if level is None else (level, lines[level]) if level in lines else ("end", "")
        floor = result.bytes_ms(level)
        of_bytes = ("", "") if floor is None else (f"{floor:.3f}", f"{spent[-1] / floor:.2f}")
        table.add_row(str(name), str(parents), *(f"{ms:.3f}" for ms in spent), f"{spent[-1] / result.forward:.2f}", *of_bytes)
    return table


if __name__ == "__main__":
    main()
