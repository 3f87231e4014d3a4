"""`calibrate`, and the probe of `inspect`: heads measured on the answers of the model they are for."""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.options import Json, ModelOptions, Raw
from headstart.cli.terminal import console, progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from headstart.bench.calibrate import CalibrationResult, DecodeTrial, TrainedDrafter

DEFAULT = (0.0, 0.7, 1.0)  # temperatures


def calibrate(
    model: ModelOptions,
    heads: Annotated[Path, typer.Argument(help="Folder of heads that this package trained or imported.")],
    prompts: Annotated[str, typer.Option(help="A JSONL file, or a built-in suite: stories, questions, edits.")] = "questions",
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.", show_default="all")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer at most.")] = 64,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Measure at this one; may be given again.", show_default="0, 0.7 and 1")
    ] = None,
    seed: Annotated[int, typer.Option(help="Repeats the answers.")] = 0,
    raw: Raw = None,
    json: Json = False,
) -> None:
    """Measure heads on their model's own answers, and keep what was found in their folder.

    How warm their chances should be, which of their guesses are right, and which static trees pay, by temperature; drafting
    goes by it from then on. The tau that the guesses' ranks predict stands beside the one that decoding has.

    Example: headstart calibrate ./my-heads --model ./talk13M --limit 4
    """
    from headstart.bench import suites
    from headstart.bench.calibrate import SIZES, DecodeTrial
    from headstart.bench.calibrate import calibrate as measure
    from headstart.bench.tasks import encode_tasks
    from headstart.engine.drafter_loading import heads_in
    from headstart.speculation.calibration import save_plan

    if model.accept != "coupled":
        raise ValueError(f"--accept is {model.accept}; calibration measures the coupled rule, so leave it out")
    cases = suites.load_cases(prompts, limit)
    llm = model.load(drafter=None, max_rows=1)
    drafter = heads_in(heads, llm.engine.target)
    tasks, num_skipped = encode_tasks(llm, cases, max_tokens, raw)
    trial = DecodeTrial(llm.engine.target, tuple(task.prompt for task in tasks), max_tokens, seed, llm.stop_ids)
    with progress(len(tasks) * len({*(temperature or DEFAULT)}) * (1 + len(SIZES))) as on_progress:
        plan, results = measure(trial, drafter, temperature or DEFAULT, on_progress=on_progress)
        save_plan(heads, plan)
        decoded = [
            {size: _tau(trial, drafter, tree.paths, one.temperature, on_progress) for size, tree in one.trees.items()}
            for one in results
        ]
    _write_card(heads, trial, Path(prompts).name, results, decoded)
    if json:
        settings = {
            "prompts": prompts,
            "num_prompts": len(tasks),
            "num_skipped": num_skipped,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        print(json_format.dumps({"heads": str(heads), "settings": settings, "results": _as_json(results, decoded)}))
    else:
        _print(trial, results, decoded)
        print(f"written to {heads / 'plan.json'}, and to the card beside it")


def _tau(
    trial: "DecodeTrial", drafter: "TrainedDrafter", paths: Any, temperature: float, on_progress: "Callable[[], None]"
) -> float:
    """Of decoding with the tree of these paths. on_progress: called after each answer."""
    from headstart.speculation.planner import StaticTree

    return float(trial.decode(drafter, StaticTree(paths), temperature, lambda place, done: on_progress()).tau)


def _write_card(
    heads: Path, trial: "DecodeTrial", prompts: str, results: "list[CalibrationResult]", decoded: list[dict[int, float]]
) -> None:
    """Write what was measured into the model card of the heads."""
    from headstart.formats import describe_target, write_card_section

    sizes = sorted({size for taus in decoded for size in taus})
    names = ("temperature", "first guess accepted, by depth", "chain", *(f"tree of {size}" for size in sizes))
    rows = [names, ("---",) * len(names)]
    for one, taus in zip(results, decoded, strict=True):
        accepted = ", ".join(f"{shares[0]:.0%}" for shares in one.table)
        cells = (f"{taus[size]:.2f}" if size in taus else "" for size in sizes)
        rows.append((f"{one.temperature:g}", accepted, f"{one.chain_measured:.2f}", *cells))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    write_card_section(
        heads,
        "Measured",
        f"`headstart calibrate`, on {describe_target(trial.target.model).name}'s own answers to {len(trial.prompts)} prompts "
        f"({prompts}), {trial.max_tokens} tokens each at most. The last columns are tokens per pass of the model, by decoding: "
        "with a chain of best guesses, and with the trees in `plan.json` (`--planner tree:SIZE`). Acceptance is that of a guess "
        "whose parent was "
        f"accepted.\n\n{table}",
    )


def _as_json(results: "list[CalibrationResult]", decoded: list[dict[int, float]]) -> list[dict[str, Any]]:
    result = []
    for one, taus in zip(results, decoded, strict=True):
        trees = {size: {"paths": tree.paths, "tau": tree.tau, "decoded": taus[size]} for size, tree in one.trees.items()}
        result.append(asdict(one) | {"trees": trees})
    return result


def _print(trial: "DecodeTrial", results: "list[CalibrationResult]", decoded: list[dict[int, float]]) -> None:
    from rich.table import Table

    title = f"{trial.target.name}: {len(trial.prompts)} prompts, {trial.max_tokens} tokens each at most"
    heads = Table(title=title, title_justify="left")
    for name in ("temperature", "depth", "first guess right", "in the first 8", "tau_d", "calibration error"):
        heads.add_column(name, justify="right")
    trees = Table(title="Tokens per round (tau): replayed from ranks, and by decoding", title_justify="left")
    for name in ("temperature", "drafts", "replayed", "decoded"):
        trees.add_column(name, justify="right")
    for one, taus in zip(results, decoded, strict=True):
        for depth, (shares, tau) in enumerate(zip(one.table, one.calibration_temperature, strict=True), 1):
            error = f"{one.errors[0]:.3f} -> {one.errors[1]:.3f}" if depth == 1 else ""
            place = f"{one.temperature:g}" if depth == 1 else ""
            heads.add_row(place, str(depth), f"{shares[0]:.3f}", f"{sum(shares):.3f}", f"{tau:.2f}", error)
        trees.add_row(f"{one.temperature:g}", f"chain of {len(one.table)}", f"{one.chain:.3f}", f"{one.chain_measured:.3f}")
        for size, tree in one.trees.items():
            trees.add_row("", f"tree of {size}", f"{tree.tau:.3f}", f"{taus[size]:.3f}")
    console().print(heads)
    console().print(trees)
