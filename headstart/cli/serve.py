"""`serve`: a model with its drafters behind OpenAI's interface, by this package's own server or by another engine."""

import json as json_format
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from headstart.cli import completion as complete
from headstart.cli.options import Json, TargetOptions, quieten, waiting
from headstart.cli.serve_options import ClientOptions, LaneOptions

_ENGINE = "Another engine as the server"


def serve(
    target: TargetOptions,
    lanes: LaneOptions,
    clients: ClientOptions,
    *,
    engine: Annotated[
        Literal["vllm", "sglang"] | None,
        typer.Option(
            help="Another engine that serves, which is your own installation.", show_default="this package", rich_help_panel=_ENGINE
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Heads for that engine: a folder, native or exported, a hub id, or a method's name for the embedded model's.",
            show_default=False,
            rich_help_panel=_ENGINE,
            autocompletion=complete.folders,
        ),
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
    json: Json = False,
) -> None:
    """Serve a model with OpenAI's interface, by this package or with --engine by vLLM or SGLang.

    This package's server drafts as far as it pays under the load, and shows a page to try the model at its address. Clients may
    choose among the drafters that were loaded.

    With --engine it prints or runs the command that starts the engine with these heads, and chains of the best length for each
    batch size. Native heads are exported first; an export is used as it is, if it is for this engine and this model.

    Example: headstart serve --model ./talk13M --drafter lookup --port 8000

    Example: headstart serve --engine vllm --model ./talk13M --heads ./my-heads --out ./for-vllm --start -- --port 8001
    """
    if engine is None:
        _check_own(heads, out, start, more, json)
        _serve(target, lanes, clients)
        return
    if heads is None:
        raise ValueError(f"--engine {engine} needs --heads, the heads that it drafts with")
    if start and json:
        raise ValueError("--json prints the command and --start runs it; leave one of the two out")
    plain = replace(TargetOptions(), model=target.model, trust_remote_code=target.trust_remote_code)
    if target != plain or lanes != LaneOptions() or clients != ClientOptions():
        raise ValueError(f"options of this package's server do nothing with --engine {engine}; give the engine's own behind a --")
    _serve_by(engine, target.model, heads, out, start, more or [], target.trust_remote_code, json)


# -- this package -----------------------------------------------------------------------------------------------------------


def _check_own(heads: str | None, out: Path | None, is_started: bool, more: list[str] | None, as_json: bool) -> None:
    """Raise ValueError for options that only another engine has."""
    given = {"--heads": heads, "--out": out, "--start": is_started, "-- OPTIONS": more, "--json": as_json}
    for name, value in given.items():
        if value:
            way_out = "name the heads as --drafter" if name == "--heads" else "leave it out"
            raise ValueError(f"{name} is for another engine, with --engine vllm or sglang; {way_out}, or name the engine")


def _serve(target_options: TargetOptions, lane_options: LaneOptions, clients: ClientOptions) -> None:
    try:
        from headstart.serve.running import listen, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"the server needs the package {error.name}; install headstart[serve]") from None
    from headstart.serve.lanes import open_lanes
    from headstart.serve.service import Service

    drafters, rules, sizes = lane_options.drafters(), lane_options.rules(), lane_options.sizes()
    settings = clients.settings(target_options.model)
    logging.basicConfig(format="headstart: %(message)s", stream=sys.stderr)
    logging.getLogger("headstart").setLevel(logging.INFO)
    listening = listen(settings)  # a port that is taken is told before anything is loaded
    target, tokenizer = target_options.load_target()
    with waiting("measuring what rounds cost"):
        service = Service(tokenizer, open_lanes(target, drafters, rules, sizes, model=target_options.model), settings)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    serve(service, listening, lambda: print(f"serving {settings.model} at {address}", flush=True))


# -- another engine ---------------------------------------------------------------------------------------------------------


def _serve_by(
    engine: str, model: str | None, heads: str, out: Path | None, is_started: bool, more: list[str], trust: bool, as_json: bool
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
