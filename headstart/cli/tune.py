"""`tune`: measure heads and the cost of rounds, and say how much to speculate on this machine and with other engines."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.options import Json, ModelOptions, Raw
from headstart.cli.terminal import console, progress

if TYPE_CHECKING:
    from headstart.bench.tuning import Tuning

TEMPERATURES = (0.0, 0.7, 1.0)
ROWS = (1, 2, 4, 8, 16, 32)


def tune(
    model: ModelOptions,
    heads: Annotated[Path, typer.Argument(help="Folder of heads that this package trained or imported.")],
    prompts: Annotated[
        str, typer.Option(help="A JSONL file, or a suite: categories (a mixture), questions, stories, gsm8k, ...")
    ] = "categories",
    limit: Annotated[int | None, typer.Option(help="Use only the first N prompts, of each category.", show_default="all")] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of each answer.")] = 64,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Sampling temperature to measure at; may be repeated.", show_default="0, 0.7 and 1")
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(help="Number of requests at once to plan for; may be repeated.", show_default="1, 2, 4, 8, 16 and 32"),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode held-out prompts, for the speed-up that is achieved.")
    ] = True,
    hardware: Annotated[
        str | None,
        typer.Option(help="Forecast for a machine: a100, l40, h100, h200, desktop, lpu, or a JSON file.", show_default="none"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the answers.")] = 0,
    raw: Raw = None,
    json: Json = False,
) -> None:
    """Measure heads and machine, and save a plan.

    Measures, on the model's own answers and by temperature, the calibration temperatures that make acceptance probabilities true,
    the acceptance rates by depth, and the best static trees; and what rounds cost on this machine. Both are saved in the folder of
    the heads, and drafting uses them from then on. Printed are also the cost by nodes, the fastest tree for each number of rows
    with the speed-up expected of it and, at the middle one of the temperatures, the one that decoding held-out prompts has, and the
    best length of a chain for vLLM and SGLang.

    Example: headstart tune ./my-heads --model ./talk13M --limit 4 --hardware h100
    """
    from headstart.bench import tuning
    from headstart.bench.calibrate import DecodeTrial
    from headstart.bench.hardware import read_hardware
    from headstart.bench.suites import load_cases
    from headstart.bench.tasks import encode_tasks

    if model.accept != "coupled":
        raise ValueError(f"--accept is {model.accept}; tuning measures the coupled acceptance rule, so leave it out")
    if any(number < 1 for number in rows or ROWS):
        raise ValueError(f"--rows is {min(rows or ROWS)}; it must be at least 1")
    cases = load_cases(prompts, limit)
    machine = read_hardware(hardware) if hardware else None
    llm = model.load(drafter=None, max_rows=1)
    tasks, num_skipped = encode_tasks(llm, cases, max_tokens, raw)
    trial = DecodeTrial(llm.engine.target, tuple(task.prompt for task in tasks), max_tokens, seed, llm.stop_ids)
    numbers, temperatures = sorted({*(rows or ROWS)}), sorted({*(temperature or TEMPERATURES)})
    with progress(tuning.num_steps(len(tasks), len(temperatures), numbers, decode)) as on_progress:
        result = tuning.tune(trial, heads, temperatures, numbers, decode, machine, on_progress)
    settings = {"prompts": prompts, "num_prompts": len(tasks), "num_skipped": num_skipped, "max_tokens": max_tokens, "seed": seed}
    _show(result, heads, settings, Path(prompts).name, json)


def _show(result: "Tuning", heads: Path, settings: dict[str, Any], prompts: str, json: bool) -> None:
    """Write the model card, and print the results."""
    from headstart.bench import calibration_report, tuning_report

    calibration_report.write_card(heads, result.trial, prompts, result.results)
    if json:
        findings = calibration_report.as_json(result.results)
        entry = {"heads": str(heads), "settings": settings, "findings": findings, **tuning_report.as_json(result)}
        print(json_format.dumps(entry))
        return
    for table in (*calibration_report.tables(result.trial, result.results), *tuning_report.tables(result)):
        console().print(table)
    if settings["num_skipped"]:
        num_skipped, max_tokens = settings["num_skipped"], settings["max_tokens"]
        print(f"{num_skipped} prompts are left out: with max_tokens={max_tokens} they exceed the context")
    for line in tuning_report.lines(result, heads):
        print(line)
    print(f"written to {heads / 'plan.json'}, and to the model card beside it")
