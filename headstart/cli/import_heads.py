"""`import`: heads that others have published, brought into the native format."""

import json as json_format
from typing import Annotated, Any

import typer

from headstart.cli.options import Json, Trust, quieten, waiting


def bring(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder, file or hub id of Medusa, Hydra or EAGLE heads, or of a model with heads inside.", metavar="SOURCE"
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder to write the heads to.")],
    target: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model they draft for.", show_default="the source, if a model is in it"),
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option(
            help="Layers of the target whose outputs EAGLE-3 heads read, from 0, as 1,15,28.",
            show_default="as their config.json says",
        ),
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Bring heads that others have published into headstart's format.

    Knows Medusa heads of their authors, TGI and vLLM, Medusa heads inside a whole model, Hydra and Hydra++, EAGLE and EAGLE-2,
    EAGLE-3 of its authors, SpecForge, speculators and llama.cpp, and the MTP modules of DeepSeek-V3, GLM, MiMo, Qwen and Mellum in
    a whole model. Nothing in the files is run. What is missing, extra or misshaped is named, and nothing is written.

    Example: headstart import ./medusa-vicuna-7b-v1.3 --target lmsys/vicuna-7b-v1.3 --out ./heads
    """
    from headstart.formats.importing import import_heads

    quieten()
    with waiting(f"reading {source}"):
        found = import_heads(source, target, out, _layers(taps), trust_remote_code)
    if json:
        print(json_format.dumps(found))
    else:
        _print(found)


def _layers(taps: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in taps.split(",")) if taps is not None else ()
    except ValueError:
        raise ValueError(f"--taps is {taps!r}; write the numbers of layers, as 1,15,28") from None


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found.items():
        is_several = isinstance(value, list | tuple)
        for line in value if is_several else [value]:
            word = name.removesuffix("s") if is_several else name.replace("_", " ")
            table.add_row(word, f"{line:,}" if isinstance(line, int) else line)
    Console(highlight=False, markup=False).print(table)
