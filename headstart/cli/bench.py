"""`bench`: plain decoding and drafters side by side, on the same prompts, in one process."""

import json as json_format
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.measuring import available_drafters, measure, title_of
from headstart.cli.options import MEASURING, Json, ModelOptions, Raw, SamplingOptions
from headstart.cli.terminal import console

if TYPE_CHECKING:
    from headstart.bench.report import Row
    from headstart.bench.runner import Setup
    from headstart.bench.suites import Case
    from headstart.bench.trained_heads import Trained
    from headstart.engine.llm import LLM
    from headstart.speculation.params import SamplingParams


def _option(help: str, default: str | bool = True) -> Any:
    """default: in words; True: the value itself."""
    return typer.Option(help=help, show_default=default, rich_help_panel=MEASURING)


@dataclass(frozen=True)
class MeasuringOptions:
    """What is measured, on which prompts, how often, and where the numbers go."""

    run: Annotated[
        list[str] | None,
        _option(
            "DRAFTER or DRAFTER@PLANNER to run, such as lookup@best:nodes=8, model:PATH@chain:4, HEADS@tree:32; may be repeated.",
            default="all available",
        ),
    ] = None
    prompts: Annotated[
        list[str] | None,
        _option("A JSONL file, or a built-in suite: stories, questions, edits; may be repeated.", default="stories"),
    ] = None
    by_kind: Annotated[
        bool, typer.Option("--by-kind", help="Print speed-up and tau per prompt set too.", rich_help_panel=MEASURING)
    ] = False
    limit: Annotated[int | None, _option("Use only the first N prompts of each set.", default="all")] = None
    temperatures: Annotated[
        str | None, _option("Sampling temperatures to measure at, such as 0,0.7,1.", default="--temperature")
    ] = None
    repeat: Annotated[int, _option("Number of measurements per prompt and run.")] = 3
    raw: Raw = None
    replay: Annotated[
        bool,
        typer.Option(
            "--replay", help="Run the target at full cost, but emit the prompts' reference answers.", rich_help_panel=MEASURING
        ),
    ] = False
    out: Annotated[Path | None, _option("File to write all measurements to, as JSON.", default="none")] = None

    @property
    def sources(self) -> list[str]:
        """Suites and files of prompts."""
        return self.prompts or ["stories"]

    def read_prompt_sets(self) -> "dict[str, list[Case]]":
        """The prompt sets by name, read before a model is loaded. Raises ValueError for one that cannot be read."""
        from headstart.bench.tasks import read_prompt_sets

        sets = read_prompt_sets(self.sources, self.limit, self.replay)
        if self.by_kind and len(sets) == 1:
            raise ValueError(
                f"--by-kind compares prompt sets, and {self.sources[0]} is the only one; give --prompts again, or leave it out"
            )
        return sets

    def all_temperatures(self, single: float | None) -> tuple[float, ...]:
        """The temperatures to measure at.

        single: the value of --temperature.
        Raises ValueError where both options are given, or a value is not a temperature.
        """
        if self.temperatures is None:
            return (single or 0.0,)
        if single is not None:
            raise ValueError("--temperature gives one and --temperatures several; leave one of the two out")
        try:
            temperatures = tuple(map(float, self.temperatures.split(",")))
        except ValueError:
            raise ValueError(
                f"temperatures is {self.temperatures!r}; write numbers with commas between them, such as 0,0.7,1"
            ) from None
        if len({*temperatures}) < len(temperatures) or not all(0 <= temperature < math.inf for temperature in temperatures):
            raise ValueError(f"temperatures is {self.temperatures!r}; each must be 0 or positive, and given once")
        return temperatures


def bench(model: ModelOptions, sampling: SamplingOptions, measuring: MeasuringOptions, json: Json = False) -> None:
    """Measure drafters against plain decoding.

    Prints tokens/s, speed-up, tau (acceptance length), the acceptance rate by depth, and whether the text is identical.

    Example: headstart bench --model ./talk13M --run lookup --run model:./draft@chain:4 --prompts edits --replay
    """
    from headstart.bench import report, trained_heads

    params = sampling.params(seed=sampling.seed or 0, max_tokens=128 if sampling.max_tokens is None else sampling.max_tokens)
    temperatures = measuring.all_temperatures(sampling.temperature)
    _check_out(measuring.out)
    sets = measuring.read_prompt_sets()
    runs = measuring.run if measuring.run is not None else available_drafters(model)
    _check_runs(runs, temperatures, model.model)
    llm = model.load(drafter=None, max_rows=1)
    setups, num_skipped = _setups(llm, sets, params, temperatures, model.accept, measuring)
    samples = [measure(setup, runs, measuring.repeat) for setup in setups]
    rows = [row for setup, some in zip(setups, samples, strict=True) for row in report.rows(setup, some)]
    heads = trained_heads.trained(runs, llm.engine.target)
    settings = _settings(llm, model, measuring, params, temperatures, num_skipped)
    result = report.as_json(setups[0], [*chain(*samples)], rows, settings) | {"heads": [vars(one) for one in heads]}
    if measuring.out is not None:
        _write(measuring.out, result)
    if json:
        print(json_format.dumps(result))
    else:
        _print(title_of(setups, model), rows, heads, measuring.by_kind, result)


def _check_runs(runs: Sequence[str], temperatures: Sequence[float], model: str | None) -> None:
    """Before a model is loaded. Raises ValueError for a planner that cannot be read, or whose trees were not measured."""
    from headstart.bench.runner import read_spec

    for spec, temperature in product(runs, temperatures):
        read_spec(spec, temperature, model)


def _setups(
    llm: "LLM",
    sets: "dict[str, list[Case]]",
    params: "SamplingParams",
    temperatures: Sequence[float],
    accept: str,
    measuring: MeasuringOptions,
) -> "tuple[list[Setup], int]":
    """One per temperature, and how many prompts exceed the context and are left out."""
    from headstart.bench.runner import Setup
    from headstart.bench.tasks import encode_prompt_sets

    tasks, num_skipped = encode_prompt_sets(llm, sets, params.max_tokens, measuring.raw, measuring.replay)
    setup = Setup(llm.engine.target, tasks, params, llm.stop_ids, accept, measuring.replay)
    return [replace(setup, params=replace(params, temperature=temperature)) for temperature in temperatures], num_skipped


def _settings(
    llm: "LLM",
    model: ModelOptions,
    measuring: MeasuringOptions,
    params: "SamplingParams",
    temperatures: Sequence[float],
    num_skipped: int,
) -> dict[str, Any]:
    """What the numbers depend on, for machines."""
    from headstart.bench.tasks import uses_chat_template

    return {
        "prompts": measuring.sources,
        "num_skipped": num_skipped,
        "repeat": measuring.repeat,
        "chat": uses_chat_template(llm, measuring.raw),
        "exact": model.exact,
        "temperatures": temperatures,
    } | {name: value for name, value in vars(params).items() if name not in ("n", "logprobs", "temperature")}


def _check_out(out: Path | None) -> None:
    """Before anything is measured. Raises ValueError where no file can be written."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        reason = "is a folder" if out.is_dir() else f"is in {out.parent}, which is no folder"
        raise ValueError(f"--out {out} {reason}; name a file to write the measurements to")


def _write(out: Path, result: dict[str, Any]) -> None:
    try:
        out.write_text(json_format.dumps(result) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be written: {error.strerror}; the measurements are {json_format.dumps(result)}"
        ) from None


def _print(title: str, rows: "Sequence[Row]", heads: "Sequence[Trained]", by_kind: bool, result: dict[str, Any]) -> None:
    from headstart.bench import report, trained_heads

    console().print(report.table(rows, title))
    if by_kind:
        console().print(report.table_by_kind(rows))
    if heads:
        console().print(trained_heads.table(heads))
    share = result["clean_share"]
    clean = "unknown on this system" if share is None else f"{share:.0%} of {result['num_samples']}"
    print(f"clean samples (waited at most 2% for a processor): {clean}; medians are of these where there are some")
    for row in rows:
        for split in row.splits:
            print(f"{row.run} at temperature {row.temperature:g} differs at {split}")
