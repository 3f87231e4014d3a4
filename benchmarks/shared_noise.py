"""The gain of shared noise: the same heads, prompts and trees, with drafts chosen in three ways, by sampling temperature.

    python benchmarks/shared_noise.py [--model MODEL] --drafter mtp --drafter HEADS [--temperatures 0.7,1] [--shape full:4,2,2,1]

coupled: drafts are chosen with the target's own noise. rejection: drafts are sampled with noise of their own and accepted by
rejection sampling, on the same shape. picked: drafts are the drafter's top tokens, without noise, and accepted by the coupled
rule, which is exact for any tree. Shapes that grow (`best`) have no rejection, and there the chance (acceptance probability) of a
picked draft is the drafter's own probability at that temperature, because calibrated chances are those under noise. The calibrated
trees (`tree:8`) are those of coupled drafts in all three. Coupled and picked texts are asserted to be plain decoding's. Errors are
standard errors over prompts (jackknife). Those of the ratios are paired by prompt, which is more precise where the texts are the
same. The last line of the output is JSON.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

import headstart
from headstart.bench import report, runner, suites
from headstart.bench.identity import find_split
from headstart.bench.tasks import encode_tasks
from headstart.engine.stats import Stats
from headstart.speculation.calibration import UNFITTED, Calibration
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Chain, StaticTree
from headstart.speculation.rules import RULES

RULE_OF = {"coupled": RULES["coupled"], "rejection": RULES["rejection"], "picked": replace(RULES["coupled"], noise="none")}
DEFAULT_SHAPES = ("chain:4", "tree:8", "best")


@dataclass(frozen=True)
class Cell:
    """The results of one way of choosing drafts.

    way: coupled, rejection or picked.
    parts: statistics of each prompt.
    near_ties: texts that differ from plain decoding's because of rounding.
    """

    drafter: str
    temperature: float
    shape: str
    way: str
    parts: tuple[Stats, ...]
    near_ties: int

    def tau(self, prompts: Sequence[int]) -> float:
        """Acceptance length (tokens per target forward) over some of the prompts."""
        return Stats.total(self.parts[prompt] for prompt in prompts).tau


def standard_error(estimate: Callable[[Sequence[int]], float], num_prompts: int) -> float:
    """Standard error of an estimate from several prompts by the jackknife (Tukey 1958); NaN for one prompt."""
    if num_prompts < 2:
        return math.nan
    estimates = [estimate([prompt for prompt in range(num_prompts) if prompt != out]) for out in range(num_prompts)]
    mean = sum(estimates) / num_prompts
    return math.sqrt((num_prompts - 1) / num_prompts * sum((value - mean) ** 2 for value in estimates))


def with_error(estimate: Callable[[Sequence[int]], float], num_prompts: int) -> tuple[float, float]:
    """An estimate over all prompts and its standard error."""
    return estimate(range(num_prompts)), standard_error(estimate, num_prompts)


def ratio(one: Cell, other: Cell) -> Callable[[Sequence[int]], float]:
    """The ratio of two taus over the same prompts; NaN where nothing was decoded."""

    def estimate(prompts: Sequence[int]) -> float:
        base = other.tau(prompts)
        return one.tau(prompts) / base if base else math.nan

    return estimate


def prepare_run(setup: runner.Setup, spec: str, way: str) -> runner.Run:
    """A run of the bench with one way of choosing drafts."""
    run = runner.prepare(setup, [spec])[1]
    run.engine.rule = RULE_OF[way]
    temperature = setup.params.temperature
    if way == "picked" and temperature > 0 and hasattr(run.engine.drafter, "calibration"):
        run.engine.drafter.calibration = Calibration((temperature,), ((temperature,),), UNFITTED.ranks)
    return run


def near_ties(setup: runner.Setup, plain: Sequence[runner.Sample], samples: Sequence[runner.Sample]) -> int:
    """The number of texts that rounding changed. Raises AssertionError for any other difference from plain decoding."""
    count = 0
    for mine, theirs in zip(samples, plain, strict=True):
        task = setup.tasks[mine.task]
        split = find_split(setup.target, task.prompt, setup.params_of(mine.task), theirs.tokens, mine.tokens)
        may_differ = split is not None and split.is_near_tie and not setup.target.is_exact
        assert split is None or may_differ, f"{mine.run} is not plain decoding's text at {split}"
        count += split is not None
    return count


def measure(setup: runner.Setup, drafter: str, shape: str, plain: Sequence[runner.Sample], num_prompts: int) -> list[Cell]:
    """The results of all ways that a shape allows. The tasks of the setup repeat `num_prompts` prompts."""
    temperature, spec, cells = setup.params.temperature, f"{drafter}@{shape}", []
    is_fixed = isinstance(runner.read_spec(spec, temperature, setup.target.name)[1], Chain | StaticTree)
    for way in RULE_OF if is_fixed else ("coupled", "picked"):
        run = prepare_run(setup, spec, way)
        samples = [runner.answer(setup, run, index) for index in range(len(setup.tasks))]
        ties = 0 if way == "rejection" else near_ties(setup, plain, samples)
        parts = (Stats.total(sample.stats for sample in samples[prompt::num_prompts]) for prompt in range(num_prompts))
        cells.append(Cell(drafter, temperature, shape, way, tuple(parts), ties))
    return cells


def shapes_of(drafter: str, requested: Sequence[str] | None, temperature: float, model: str | None) -> list[str]:
    """The shapes to measure: the requested ones, or the default ones without a calibrated tree where the drafter has none.

    Raises ValueError for a requested shape that the drafter does not have.
    """
    shapes = []
    for shape in requested or DEFAULT_SHAPES:
        try:
            runner.read_spec(f"{drafter}@{shape}", temperature, model)
        except ValueError:
            if requested or not shape.startswith("tree"):
                raise
            continue
        shapes.append(shape)
    return shapes


def numbers(text: str) -> list[float]:
    """Numbers between commas."""
    return list(map(float, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: the embedded model")
    parser.add_argument("--drafter", action="append", required=True, help="a folder of heads or a name; may be repeated")
    parser.add_argument("--temperatures", type=numbers, default=[0.7, 1.0], help="such as 0.7,1")
    parser.add_argument("--shape", action="append", help="a planner, such as chain:4, full:4,2,2,1 or best; may be repeated")
    parser.add_argument("--prompts", action="append", help="a JSONL file or a built-in suite; may be repeated")
    parser.add_argument("--limit", type=int, help="only the first N prompts of each set")
    parser.add_argument("--answers", type=int, default=1, help="answers per prompt, each with its own seed")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True, help="equality to the bit; default: on")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    try:
        cells, setup = run(arguments)
    except ValueError as error:
        parser.error(str(error))
    show(cells, setup, arguments.model or "embedded model")
    entries = [asdict(cell) | {"tau": cell.tau(range(len(cell.parts)))} for cell in cells]
    print(json.dumps({"machine": report.machine(setup.target), "arguments": vars(arguments), "cells": entries}))


def run(arguments: argparse.Namespace) -> tuple[list[Cell], runner.Setup]:
    """All cells, and what they share. Raises ValueError for bad settings before the model is loaded."""
    base = SamplingParams(max_tokens=arguments.max_tokens, seed=arguments.seed)
    all_params = [replace(base, temperature=temperature) for temperature in arguments.temperatures]
    if arguments.answers < 1:
        raise ValueError(f"answers is {arguments.answers}; it must be at least 1 per prompt")
    cases = [case for source in arguments.prompts or ["stories"] for case in suites.load_cases(source, arguments.limit)]
    for params, drafter in product(all_params, arguments.drafter):
        shapes_of(drafter, arguments.shape, params.temperature, arguments.model)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    llm = headstart.load(arguments.model, dtype=arguments.dtype, exact=arguments.exact, drafter=None, max_rows=1)
    prompts, _ = encode_tasks(llm, cases, arguments.max_tokens)
    cells: list[Cell] = []
    for params in all_params:
        setup = runner.Setup(llm.engine.target, prompts * arguments.answers, params, llm.stop_ids)
        (plain_run,) = runner.prepare(setup, [])
        plain = [runner.answer(setup, plain_run, task) for task in range(len(setup.tasks))]
        for drafter in arguments.drafter:
            for shape in shapes_of(drafter, arguments.shape, params.temperature, arguments.model):
                cells += measure(setup, drafter, shape, plain, len(prompts))
    return cells, setup


# -- printing ---------------------------------------------------------------------------------------------------------------


def show(cells: Sequence[Cell], setup: runner.Setup, name: str) -> None:
    """Print a line per drafter, shape and temperature: tau of all ways, then acceptance rates by depth."""
    num_prompts = len(cells[0].parts)
    words = [name, report.cpu_name(), f"{num_prompts} prompts, {len(setup.tasks)} answers", *report.labels(setup)]
    taus = Table(title=f"tau (acceptance length): {', '.join(words)}", title_justify="left")
    rates = Table(title="acceptance rate by depth, of the rounds that drafted there", title_justify="left")
    for table, columns in ((taus, (*RULE_OF, "coupled / picked", "rejection / picked", "near-ties")), (rates, RULE_OF)):
        for name in ("drafter", "shape", "T", *columns):
            table.add_column(name, justify="left" if name in ("drafter", "shape") else "right")
    for (drafter, shape, temperature), by_way in by_line(cells).items():
        line = report.short(drafter), shape, f"{temperature:g}"
        values = [written(*with_error(by_way[way].tau, num_prompts)) if way in by_way else "" for way in RULE_OF]
        ratios = [
            written(*with_error(ratio(by_way[way], by_way["picked"]), num_prompts)) if way in by_way else ""
            for way in ("coupled", "rejection")
        ]
        taus.add_row(*line, *values, *ratios, str(sum(cell.near_ties for cell in by_way.values())))
        rates.add_row(*line, *(by_depth(by_way[way]) if way in by_way else "" for way in RULE_OF))
    for table in (taus, rates):
        Console(width=170).print(table)


def by_line(cells: Sequence[Cell]) -> dict[tuple[str, str, float], dict[str, Cell]]:
    """Cells by drafter, shape and temperature, then by way; the temperatures of one shape are adjacent."""
    lines: dict[tuple[str, str, float], dict[str, Cell]] = {}
    order = {name: index for index, name in enumerate(dict.fromkeys(cell.drafter for cell in cells))}
    for cell in sorted(cells, key=lambda cell: (order[cell.drafter], cell.shape)):
        lines.setdefault((cell.drafter, cell.shape, cell.temperature), {})[cell.way] = cell
    return lines


def written(value: float, error: float) -> str:
    """A number with its standard error."""
    return f"{value:.2f}" if math.isnan(error) else f"{value:.2f} ± {error:.2f}"


def by_depth(cell: Cell) -> str:
    """Acceptance rates by depth."""
    return " ".join(f"{share:.2f}" for share in Stats.total(cell.parts).acceptance)


if __name__ == "__main__":
    main()
