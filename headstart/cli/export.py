"""`export`: heads written in the format of another engine."""

import json as json_format
import sys
from typing import Annotated, Any, Literal

import typer

from headstart.cli import completion as complete
from headstart.cli.options import Json, Trust, quieten, waiting

COMMANDS = ("launch", "check")  # printed outside the table, so that they can be copied


def export(
    heads: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of heads, or a method's name for the embedded model's.",
            metavar="HEADS",
            autocompletion=complete.drafters,
        ),
    ],
    to: Annotated[str, typer.Option(help="Engine: vllm, speculators, sglang, tgi, gguf or hf.", autocompletion=complete.engines)],
    out: Annotated[str, typer.Option(help="Folder to write: new, empty, or an earlier export.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model that the heads draft for.",
            show_default="embedded",
            autocompletion=complete.folders,
        ),
    ] = None,
    dtype: Annotated[
        Literal["stored", "float32", "bfloat16", "float16"], typer.Option(help="Data type of the exported heads.")
    ] = "stored",
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Write heads in the format of another engine.

    What the engine would drop, ignore or change without a word is refused, with the reason. Beside the heads are written the
    command that starts the engine, the best chain length per batch size (of `headstart tune`), and conformance.json: which tensors
    went where, the version of the reader, and the acceptance to expect. `headstart import` brings the same heads back.

    Example: headstart export eagle3 --to vllm --out ./heads-vllm
    """
    quieten()
    with waiting(f"exporting {heads}"):
        from headstart.engine.drafter_loading import folder_of
        from headstart.formats.exporting import export_heads

        folder = folder_of(heads, model)
        if folder is None:
            raise ValueError(
                f"{heads} is no folder of heads; name a folder that `headstart train` or `import` wrote, a hub id, or, without "
                "--model, a method of the embedded model"
            )
        summary = export_heads(folder, model, to, out, dtype, trust_remote_code)
    if json:
        print(json_format.dumps(summary))
    else:
        _print(summary)


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in summary.items():
        if name in COMMANDS:
            continue
        shown = " ".join(map(str, value)) if name in ("files", "acceptance") and value else value
        for line in shown if isinstance(shown, list | tuple) else [shown]:
            if line is not None:
                table.add_row(name.replace("_", " "), str(line))
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160).print(table)
    for name in COMMANDS:
        print(f"\n{name}:\n  {summary[name]}")
