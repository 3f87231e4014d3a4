"""The results of a calibration for people: tables, JSON, and a section of the heads' model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from headstart.bench.calibrate import CalibrationResult, DecodeTrial
from headstart.formats import describe_target, write_card_section


def as_json(results: Sequence[CalibrationResult]) -> list[dict[str, Any]]:
    """The results, one per temperature."""
    entries = []
    for result in results:
        trees = {size: {"paths": tree.paths, "tau": tree.tau} for size, tree in result.trees.items()}
        entry = asdict(result) | {"trees": trees}
        del entry["texts"]
        entry["warmth"] = entry.pop("calibration_temperature")  # the key is that of plan.json
        entries.append(entry)
    return entries


def tables(trial: DecodeTrial, results: Sequence[CalibrationResult]) -> tuple[Table, Table]:
    """Acceptance by depth, and tau of the chain and the trees."""
    title = f"{trial.target.name}: {len(trial.prompts)} prompts, at most {trial.max_tokens} tokens each"
    heads = Table(title=title, title_justify="left")
    names = ("temperature", "depth", "acceptance rate", "in the first 8", "calibration temperature", "calibration error")
    for name in names:
        heads.add_column(name, justify="right")
    trees = Table(title="tau (acceptance length), replayed from the recorded ranks", title_justify="left")
    for name in ("temperature", "drafts", "tau"):
        trees.add_column(name, justify="right")
    for result in results:
        for depth, (shares, tau) in enumerate(zip(result.table, result.calibration_temperature, strict=True), 1):
            error = f"{result.errors[0]:.3f} -> {result.errors[1]:.3f}" if depth == 1 else ""
            temperature = f"{result.temperature:g}" if depth == 1 else ""
            heads.add_row(temperature, str(depth), f"{shares[0]:.3f}", f"{sum(shares):.3f}", f"{tau:.2f}", error)
        trees.add_row(f"{result.temperature:g}", f"chain of {len(result.table)}", f"{result.chain:.3f}")
        for size, tree in result.trees.items():
            trees.add_row("", f"tree of {size}", f"{tree.tau:.3f}")
    return heads, trees


def write_card(heads: Path, trial: DecodeTrial, prompts: str, results: Sequence[CalibrationResult]) -> None:
    """Write the section "Measured" of the heads' model card, in place of an earlier one.

    heads: their folder. prompts: the name of the prompt set.
    """
    sizes = sorted({size for result in results for size in result.trees})
    names = ("temperature", "acceptance rate by depth", "chain", *(f"tree of {size}" for size in sizes))
    rows = [names, ("---",) * len(names)]
    for result in results:
        accepted = ", ".join(f"{shares[0]:.0%}" for shares in result.table)
        cells = (f"{result.trees[size].tau:.2f}" if size in result.trees else "" for size in sizes)
        rows.append((f"{result.temperature:g}", accepted, f"{result.chain_measured:.2f}", *cells))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    write_card_section(
        heads,
        "Measured",
        f"`headstart tune`, on {describe_target(trial.target.model).name}'s own answers to {len(trial.prompts)} prompts "
        f"({prompts}), at most {trial.max_tokens} tokens each. The acceptance rate is that of the likeliest draft, given that its "
        "parent was accepted. The last columns are tau (acceptance length, tokens per forward of the target): with a chain of the "
        f"likeliest drafts, by decoding, and with the trees in `plan.json` (`--planner tree:SIZE`), replayed.\n\n{table}",
    )
