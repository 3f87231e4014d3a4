"""`serve`: a model with its heads behind an OpenAI-compatible server. So far the server is another engine's."""

import json as json_format
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from headstart.cli import completion as complete
from headstart.cli.options import Json, Trust, quieten, waiting

_ENGINE = "Another engine as the server"


def serve(
    *,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model to serve.", show_default="embedded", autocompletion=complete.folders),
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(
            help="Folder of heads: native ones, or an export of `headstart export`.",
            show_default=False,
            autocompletion=complete.folders,
        ),
    ] = None,
    engine: Annotated[
        Literal["vllm", "sglang"] | None,
        typer.Option(help="The engine that serves; it is one's own installation.", show_default=False, rich_help_panel=_ENGINE),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to export native heads to.", show_default=False, rich_help_panel=_ENGINE),
    ] = None,
    start: Annotated[
        bool, typer.Option("--start", help="Start the engine, rather than print its command.", rich_help_panel=_ENGINE)
    ] = False,
    more: Annotated[
        list[str] | None,
        typer.Argument(help="Behind a --: options of the engine, as they are.", metavar="[-- OPTIONS]", show_default=False),
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Serve a model with its heads by vLLM or SGLang.

    Prints the command that starts the engine with these heads and chains of the best length for each batch size, or runs it. Native
    heads are exported first; an export is used as it is, if it is for this engine and this model.

    Example: headstart serve --engine vllm --model ./talk13M --heads ./my-heads --out ./for-vllm --start -- --port 8001
    """
    if engine is None:
        raise ValueError("there is no server of this package yet; --engine vllm or --engine sglang serves the model by that engine")
    if heads is None:
        raise ValueError(f"--engine {engine} needs --heads, the folder of the heads it drafts with")
    if start and json:
        raise ValueError("--json prints the command and --start runs it; leave one of the two out")
    _serve_by(engine, model, heads, out, start, more or [], trust_remote_code, json)


def _serve_by(
    engine: str, model: str | None, heads: Path, out: Path | None, is_started: bool, more: list[str], trust: bool, as_json: bool
) -> None:
    from headstart.serve import engines

    quieten()
    with waiting(f"preparing {heads} for {engine}"):
        launch = engines.prepare(engine, model, heads, out, more, trust)
    if as_json:
        print(json_format.dumps(vars(launch)))
        return
    notes = [*([f"the heads were exported to {launch.heads}"] if launch.is_new else []), *launch.notes]
    for note in notes:
        print(f"headstart: {note}", file=sys.stderr)
    if is_started:
        engines.start(launch)
    print(shlex.join(launch.command))
