"""`inspect`: what a folder holds, and what prevents serving it exactly."""

import json as json_format
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any

import typer

from headstart.cli.options import Json, ModelOptions, Trust, quieten, waiting

LABELS = {"reach": "attention window"}  # of a table, where the JSON key is not the field's word


def inspect(
    path: Annotated[
        str | None, typer.Argument(help="Folder of a model or of heads, or a hub id.", show_default="the embedded model")
    ] = None,
    device: Annotated[str, typer.Option(help="Device to load the model on: auto, cpu, cuda, ...")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="With --probe: the model to try the heads with.", show_default="embedded")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Decode a few prompts with these heads, and print tau and the acceptance rate by depth.")
    ] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Show what a folder holds.

    For a model: its sizes, context, KV cache, tokenizer and fingerprint, and what prevents serving it exactly.
    For heads, native or published by others: method, sizes, their model, and the command that uses or imports them.

    Example: headstart inspect ./talk13M --json
    """
    from headstart.formats.inspection import inspect_folder
    from headstart.target.loading import embedded

    if model is not None and not probe:
        raise ValueError("--model names the model to try heads with; add --probe, or leave --model out")
    folder = path or str(embedded("target"))
    with waiting(f"loading {folder}"):
        quieten()
        report = inspect_folder(folder, device, trust_remote_code)
    if probe:
        report |= {"probe": _probe(folder, model, device, trust_remote_code)}
    refusal = report.pop("refusal", None)
    if json:
        print(json_format.dumps(report))
    else:
        _print(report)
    if refusal is not None:
        raise ValueError(refusal)


def _probe(heads: str, model: str | None, device: str, trust_remote_code: bool) -> dict[str, Any]:
    """Raises ValueError for a folder that holds no native heads, before the model is loaded."""
    from headstart.bench.probe import probe
    from headstart.formats import describe

    describe(heads)
    options = ModelOptions(model=model, device=device, trust_remote_code=trust_remote_code)
    return probe(options.load(drafter=None, max_rows=1), heads)


# -- printing ---------------------------------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in report.items():
        if name == "notes":
            for note in value:
                table.add_row("note", note)
        elif name != "problems":
            table.add_row(LABELS.get(name, name.replace("_", " ")), _readable(name, value))
    for problem in report["problems"] or ["none"]:
        table.add_row("problem" if report["problems"] else "problems", problem)
    Console(highlight=False, markup=False).print(table)


def _readable(name: str, value: object) -> str:
    if name == "bytes":
        return f"{int(str(value)) / 2**20:,.1f} MiB"
    if name == "reach" and isinstance(value, Sequence):
        return ", ".join(f"{len([*layers])} layers see {window}" for window, layers in groupby(value))
    if name == "probe" and isinstance(value, dict):
        shares = " ".join(f"{share:.2f}" for share in value["acceptance"])
        return f"tau {value['tau']:.2f} at temperature {value['temperature']:g}, acceptance rate by depth {shares}"
    if isinstance(value, dict):
        return ", ".join(f"{token} ({number})" for token, number in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "missing" if value is None else str(value)
