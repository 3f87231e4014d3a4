"""`verify-export`: whether an engine drafts with exported heads as this one does."""

import json as json_format
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import completion as complete
from headstart.cli.options import Json, Trust, quieten, waiting
from headstart.cli.terminal import console

if TYPE_CHECKING:
    from headstart.bench.conformance.verify import Verification

DIFFERENT = 1  # exit code


def verify_export(
    folder: Annotated[str, typer.Argument(help="Folder written by `headstart export`.", metavar="FOLDER")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model that the heads draft for.", show_default="embedded", autocompletion=complete.folders
        ),
    ] = None,
    python: Annotated[str | None, typer.Option(help="The Python that has the engine.", show_default="this one")] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="A JSONL file, or a suite as for `bench`; may be repeated.",
            show_default="questions, or stories for a model without a chat template",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use only the first N prompts of each set.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    chain: Annotated[int | None, typer.Option(min=1, help="Drafts per round.", show_default="as the export says")] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Check that an engine drafts with exported heads as headstart does.

    First the files are compared with the manifest of the export, and imported again. Then, where vLLM is installed, it answers
    a few prompts in fp32 at temperature 0 beside headstart, and in every round both must keep the same number of drafts. Of other
    engines only the files are checked. The exit code is 1 where something differs.

    Example: headstart verify-export ./for-vllm --python ~/vllm/bin/python
    """
    from headstart.bench.conformance.ours import Plan
    from headstart.bench.conformance.verify import verify

    plan = Plan(model, tuple(prompts or ()), limit, max_tokens, chain, trust_remote_code)
    with waiting(f"verifying {folder}"):
        quieten()
        found = verify(folder, plan, python)
    if json:
        print(json_format.dumps(found.as_dict()))
    else:
        _print(found)
    if not found.is_right:
        raise typer.Exit(DIFFERENT)


# -- printing ---------------------------------------------------------------------------------------------------------------


def _print(found: "Verification") -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("export", f"{found.folder}: {found.method} heads for {found.engine}, written against {found.reader}")
    table.add_row(
        "files", "not as written" if found.errors else f"{found.tensors} tensors as written, and the same heads when imported"
    )
    for error in found.errors:
        table.add_row("error", error)
    if found.comparison is not None:
        one = found.comparison
        table.add_row("equal rounds", f"{one.equal_rounds}/{one.rounds}")
        table.add_row("equal texts", f"{one.equal_texts}/{one.texts}")
    for note in found.notes:
        table.add_row("note", note)
    printed = console()
    printed.print(table, highlight=False, markup=False)
    if found.comparison is not None:
        printed.print(_acceptance(found), highlight=False, markup=False)


def _acceptance(found: "Verification") -> Any:
    """The share of rounds that kept the draft at each position, here, there, and as the export expects."""
    from rich.table import Table

    assert found.comparison is not None
    here, there = found.comparison.acceptance
    table = Table(title="share of rounds that kept the draft, by position", title_justify="left", box=None, pad_edge=False)
    table.add_column("engine")
    for position in range(1, len(here) + 1):
        table.add_column(str(position), justify="right")
    rows = [("headstart", here), (f"vLLM {found.version}", there), ("expected", found.expected or ())]
    for name, shares in rows:
        if shares:
            table.add_row(name, *(f"{share:.3f}" for share in shares[: len(here)]))
    return table
