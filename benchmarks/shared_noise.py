"""What shared noise gives: the same heads, prompts and trees, with children chosen in three ways, as the temperature rises.

    python benchmarks/shared_noise.py [--model MODEL] --drafter mtp --drafter HEADS [--temperatures 0.7,1] [--shape full:4,2,2,1]

coupled: children are chosen with the target's own noise. rejection: drawn with noise of their own, and judged by their chances,
on the same shape. picked: the best of the drafter's logits, without noise, judged as coupled ones are, which is exact for any
tree. Where a shape grows (`best`), rejection has no part, and a picked child's chance is the drafter's own at that temperature,
for what was calibrated are chances under noise; the calibrated trees (`tree:8`) are those of coupled children too. Coupled and
picked texts are asserted to be plain decoding's. Errors are standard errors over prompts (jackknife), of ratios in pairs: where the
texts are the same they say much more than those of the two taus. One JSON line at the end.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from rich.console import Console
from rich.table import Table

from headstart.bench import report, runner, suites
from headstart.bench.identity import find_split
from headstart.cli.bench import as_tasks
from headstart.cli.options import Model
from headstart.engine.stats import Stats
from headstart.speculation.calibration import UNFITTED, Calibration
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Chain, StaticTree
from headstart.speculation.rules import RULES

RULE_OF = {"coupled": RULES["coupled"], "rejection": RULES["rejection"], "picked": replace(RULES["coupled"], noise="none")}
DEFAULT_SHAPES = ("chain:4", "tree:8", "best")


@dataclass(frozen=True)
class Cell:
    """One way of choosing children. parts: the rounds of each prompt; near_ties: texts unlike plain's by a rounding."""

    drafter: str
    temperature: float
    shape: str
    way: str
    parts: tuple[Stats, ...]
    near_ties: int

    def tau(self, prompts: Sequence[int]) -> float:
        """Tokens per round over some of the prompts."""
        return Stats.total(self.parts[prompt] for prompt in prompts).tau


def standard_error(estimate: Callable[[Sequence[int]], float], num_prompts: int) -> float:
    """Of an estimate from several prompts: how it moves as each is left out (jackknife, Tukey 1958). NaN for one prompt."""
    if num_prompts < 2:
        return math.nan
    found = [estimate([prompt for prompt in range(num_prompts) if prompt != out]) for out in range(num_prompts)]
    mean = sum(found) / num_prompts
    return math.sqrt((num_prompts - 1) / num_prompts * sum((value - mean) ** 2 for value in found))


def with_error(estimate: Callable[[Sequence[int]], float], num_prompts: int) -> tuple[float, float]:
    return estimate(range(num_prompts)), standard_error(estimate, num_prompts)


def ratio(one: Cell, other: Cell) -> Callable[[Sequence[int]], float]:
    """Of two taus over the same prompts; NaN where nothing was decoded."""

    def estimate(prompts: Sequence[int]) -> float:
        base = other.tau(prompts)
        return one.tau(prompts) / base if base else math.nan

    return estimate


def prepared(setup: runner.Setup, spec: str, way: str) -> runner.Run:
    """A run of the bench under one of the three rules."""
    run = runner.prepare(setup, [spec])[1]
    run.engine.rule = RULE_OF[way]
    temperature = setup.params.temperature
    if way == "picked" and temperature > 0 and hasattr(run.engine.drafter, "calibration"):
        run.engine.drafter.calibration = Calibration((temperature,), ((temperature,),), UNFITTED.ranks)
    return run


def near_ties(setup: runner.Setup, plain: Sequence[runner.Sample], samples: Sequence[runner.Sample]) -> int:
    """How many texts a rounding changed. AssertionError for any other difference from plain decoding."""
    count = 0
    for mine, theirs in zip(samples, plain, strict=True):
        task = setup.tasks[mine.task]
        split = find_split(setup.target, task.prompt, setup.params_of(mine.task), theirs.tokens, mine.tokens)
        may_differ = split is not None and split.is_near_tie and not setup.target.is_exact
        assert split is None or may_differ, f"{mine.run} is not plain decoding's text at {split}"
        count += split is not None
    return count


def measure(setup: runner.Setup, drafter: str, shape: str, plain: Sequence[runner.Sample], num_prompts: int) -> list[Cell]:
    """All ways that a shape allows; tasks are `num_prompts` prompts, again and again."""
    temperature, spec, cells = setup.params.temperature, f"{drafter}@{shape}", []
    is_fixed = isinstance(runner.read_spec(spec, temperature)[1], Chain | StaticTree)
    for way in RULE_OF if is_fixed else ("coupled", "picked"):
        run = prepared(setup, spec, way)
        samples = [runner.answer(setup, run, place) for place in range(len(setup.tasks))]
        ties = 0 if way == "rejection" else near_ties(setup, plain, samples)
        parts = (Stats.total(sample.stats for sample in samples[prompt::num_prompts]) for prompt in range(num_prompts))
        cells.append(Cell(drafter, temperature, shape, way, tuple(parts), ties))
    return cells


def shapes_of(drafter: str, given: Sequence[str] | None, temperature: float) -> list[str]:
    """The shapes to measure: those given, or the usual ones but for a calibrated tree where there is none.

    Raises ValueError for one that cannot be had."""
    found = []
    for shape in given or DEFAULT_SHAPES:
        try:
            runner.read_spec(f"{drafter}@{shape}", temperature)
        except ValueError:
            if given or not shape.startswith("tree"):
                raise
            continue
        found.append(shape)
    return found


def numbers(text: str) -> list[float]:
    return list(map(float, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the embedded one by default")
    parser.add_argument("--drafter", action="append", required=True, help="a folder of heads or a name; again for more")
    parser.add_argument("--temperatures", type=numbers, default=[0.7, 1.0], help="such as 0.7,1")
    parser.add_argument("--shape", action="append", help="a planner, such as chain:4, full:4,2,2,1 or best; again for more")
    parser.add_argument("--prompts", action="append", help="a JSONL file or a built-in suite; again for more")
    parser.add_argument("--limit", type=int, help="only the first so many prompts of each")
    parser.add_argument("--answers", type=int, default=1, help="per prompt, each with a seed of its own")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True, help="equality to the bit; on by default")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    try:
        found, setup = run(arguments)
    except ValueError as error:
        parser.error(str(error))
    show(found, setup, arguments.model or "embedded model")
    cells = [asdict(cell) | {"tau": cell.tau(range(len(cell.parts)))} for cell in found]
    print(json.dumps({"machine": report.machine(setup.target), "arguments": vars(arguments), "cells": cells}))


def run(arguments: argparse.Namespace) -> tuple[list[Cell], runner.Setup]:
    """All cells, and what they share. Raises ValueError, before the model is loaded, for settings that cannot be had."""
    base = SamplingParams(max_tokens=arguments.max_tokens, seed=arguments.seed)
    laws = [replace(base, temperature=temperature) for temperature in arguments.temperatures]
    if arguments.answers < 1:
        raise ValueError(f"answers is {arguments.answers}; it must be at least 1 per prompt")
    cases = [case for source in arguments.prompts or ["stories"] for case in suites.load_cases(source, arguments.limit)]
    for params, drafter in product(laws, arguments.drafter):
        shapes_of(drafter, arguments.shape, params.temperature)
    model = Model(arguments.model, dtype=arguments.dtype, exact=arguments.exact, threads=arguments.threads)
    llm = model.load(drafter=None, max_rows=1)
    prompts, _ = as_tasks(llm, cases, arguments.max_tokens, None, False)
    found: list[Cell] = []
    for params in laws:
        setup = runner.Setup(llm.engine.target, prompts * arguments.answers, params, llm.stop_ids)
        (plainly,) = runner.prepare(setup, [])
        plain = [runner.answer(setup, plainly, task) for task in range(len(setup.tasks))]
        for drafter in arguments.drafter:
            for shape in shapes_of(drafter, arguments.shape, params.temperature):
                found += measure(setup, drafter, shape, plain, len(prompts))
    return found, setup


# -- printing ---------------------------------------------------------------------------------------------------------------


def show(found: Sequence[Cell], setup: runner.Setup, name: str) -> None:
    """A line per drafter, shape and temperature with the taus of all ways, then how often drafts were kept by depth."""
    num_prompts = len(found[0].parts)
    words = [name, report.cpu_name(), f"{num_prompts} prompts, {len(setup.tasks)} answers", *report.labels(setup)]
    taus = Table(title=f"tau: {', '.join(words)}", title_justify="left")
    kept = Table(title="kept by depth, of the rounds that drafted there", title_justify="left")
    for table, columns in ((taus, (*RULE_OF, "coupled / picked", "rejection / picked", "near-ties")), (kept, RULE_OF)):
        for name in ("drafter", "shape", "T", *columns):
            table.add_column(name, justify="left" if name in ("drafter", "shape") else "right")
    for (drafter, shape, temperature), cells in by_line(found).items():
        line = report.short(drafter), shape, f"{temperature:g}"
        own = [written(*with_error(cells[way].tau, num_prompts)) if way in cells else "" for way in RULE_OF]
        against = [
            written(*with_error(ratio(cells[way], cells["picked"]), num_prompts)) if way in cells else ""
            for way in ("coupled", "rejection")
        ]
        taus.add_row(*line, *own, *against, str(sum(cell.near_ties for cell in cells.values())))
        kept.add_row(*line, *(by_depth(cells[way]) if way in cells else "" for way in RULE_OF))
    for table in (taus, kept):
        Console(width=170).print(table)


def by_line(found: Sequence[Cell]) -> dict[tuple[str, str, float], dict[str, Cell]]:
    """Ways by drafter, shape and temperature; temperatures of one shape stand together."""
    lines: dict[tuple[str, str, float], dict[str, Cell]] = {}
    places = {name: place for place, name in enumerate(dict.fromkeys(cell.drafter for cell in found))}
    for cell in sorted(found, key=lambda cell: (places[cell.drafter], cell.shape)):
        lines.setdefault((cell.drafter, cell.shape, cell.temperature), {})[cell.way] = cell
    return lines


def written(value: float, error: float) -> str:
    return f"{value:.2f}" if math.isnan(error) else f"{value:.2f} ± {error:.2f}"


def by_depth(cell: Cell) -> str:
    return " ".join(f"{share:.2f}" for share in Stats.total(cell.parts).acceptance)


if __name__ == "__main__":
    main()
