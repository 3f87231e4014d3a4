"""`calibrate`: measure heads on the answers of the model they draft for."""

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from headstart.cli.options import Json, ModelOptions, Raw
from headstart.cli.terminal import console, progress

TEMPERATURES = (0.0, 0.7, 1.0)


def calibrate(
    model: ModelOptions,
    heads: Annotated[Path, typer.Argument(help="Folder of heads that this package trained or imported.")],
    prompts: Annotated[str, typer.Option(help="A JSONL file, or a built-in suite: stories, questions, edits.")] = "questions",
    limit: Annotated[int | None, typer.Option(help="Use only the first N prompts.", show_default="all")] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of each answer.")] = 64,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Sampling temperature to measure at; may be repeated.", show_default="0, 0.7 and 1")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the answers.")] = 0,
    raw: Raw = None,
    json: Json = False,
) -> None:
    """Measure heads and save their calibration.

    Measures on the model's own answers, by temperature: the calibration temperatures that make acceptance probabilities true, the
    acceptance rates by depth, and the best static trees. They are saved in the folder of the heads, and drafting uses them
    from then on. The tau (acceptance length) that the ranks predict is printed beside the one that decoding has.

    Example: headstart calibrate ./my-heads --model ./talk13M --limit 4
    """
    from headstart.bench import calibration_report as report
    from headstart.bench.calibrate import SIZES, DecodeTrial, decode_trees
    from headstart.bench.calibrate import calibrate as measure
    from headstart.bench.suites import load_cases
    from headstart.bench.tasks import encode_tasks
    from headstart.engine.drafter_loading import heads_in
    from headstart.speculation.heads_plan import save_plan

    if model.accept != "coupled":
        raise ValueError(f"--accept is {model.accept}; calibration measures the coupled acceptance rule, so leave it out")
    cases = load_cases(prompts, limit)
    llm = model.load(drafter=None, max_rows=1)
    drafter = heads_in(heads, llm.engine.target)
    tasks, num_skipped = encode_tasks(llm, cases, max_tokens, raw)
    trial = DecodeTrial(llm.engine.target, tuple(task.prompt for task in tasks), max_tokens, seed, llm.stop_ids)
    temperatures = temperature or TEMPERATURES
    with progress(len(tasks) * len({*temperatures}) * (1 + len(SIZES))) as on_progress:
        plan, results = measure(trial, drafter, temperatures, on_progress=on_progress)
        save_plan(heads, plan)
        decoded = decode_trees(trial, drafter, results, on_progress)
    report.write_card(heads, trial, Path(prompts).name, results, decoded)
    if json:
        settings = {
            "prompts": prompts,
            "num_prompts": len(tasks),
            "num_skipped": num_skipped,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        print(json_format.dumps({"heads": str(heads), "settings": settings, "findings": report.as_json(results, decoded)}))
        return
    for table in report.tables(trial, results, decoded):
        console().print(table)
    print(f"written to {heads / 'plan.json'}, and to the model card beside it")
