"""The options of `serve` for this package's own server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headstart.cli import completion as complete
from headstart.cli.options import read_bytes

if TYPE_CHECKING:
    from headstart.serve.lanes import Sizes
    from headstart.serve.settings import Settings

_DRAFTING, _LOAD, _CLIENTS = "Drafting", "Load", "Clients"


@dataclass(frozen=True)
class LaneOptions:
    """Which drafters and acceptance rules clients may choose from, and how much runs at once."""

    drafter: Annotated[
        list[str] | None,
        typer.Option(
            help="Drafter, as for generate; may be repeated: clients choose by name, and the first is the default.",
            show_default="auto",
            rich_help_panel=_DRAFTING,
            autocompletion=complete.drafters,
        ),
    ] = None
    accept: Annotated[
        list[str] | None,
        typer.Option(
            help="Acceptance rule, as for generate; may be repeated. Pairs of drafter and rule share the memory equally.",
            show_default="coupled",
            rich_help_panel=_DRAFTING,
        ),
    ] = None
    speculation: Annotated[
        Literal["auto", "off"],
        typer.Option(help="auto: draft as far as it pays under the load; off: decode plainly.", rich_help_panel=_DRAFTING),
    ] = "auto"
    max_rows: Annotated[int, typer.Option(help="Answers made at once.", rich_help_panel=_LOAD)] = 8
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for the KV cache, such as 512M or 2G.", show_default="by context", rich_help_panel=_LOAD),
    ] = None
    chunk: Annotated[int, typer.Option(help="Prompt tokens per round.", rich_help_panel=_LOAD)] = 256
    p99_ms: Annotated[
        float | None,
        typer.Option(
            "--p99-ms",
            help="Milliseconds that a round may take, which is the time between tokens; prompts and trees respect it.",
            show_default="any",
            rich_help_panel=_LOAD,
        ),
    ] = None
    prefixes: Annotated[
        int, typer.Option(help="Texts kept in the cache for prompts that begin likewise.", rich_help_panel=_LOAD)
    ] = 16

    def drafters(self) -> list[str | None]:
        """The drafters to load. Raises ValueError where none shall draft."""
        if self.speculation == "off":
            if self.drafter:
                raise ValueError("--speculation off drafts nothing; leave --drafter out")
            return [None]
        return [None if name == "none" else name for name in self.drafter or ["auto"]]

    def rules(self) -> list[str]:
        """The acceptance rules. Raises ValueError for an unknown one."""
        from headstart.speculation.rules import parse_rule

        for rule in self.accept or ():
            parse_rule(rule)
        return self.accept or ["coupled"]

    def sizes(self) -> Sizes:
        """Rows, memory, chunk, prefixes and the time of a round."""
        from headstart.serve.lanes import Sizes

        memory = None if self.memory is None else read_bytes(self.memory)
        longest = None if self.p99_ms is None else self.p99_ms / 1000
        return Sizes(self.max_rows, memory, self.chunk, self.prefixes, longest=longest)


@dataclass(frozen=True)
class ClientOptions:
    """Where the server listens, who may ask, and how much."""

    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_CLIENTS)] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.", rich_help_panel=_CLIENTS)] = 8000
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name of the model for clients.", show_default="that of its folder or hub id", rich_help_panel=_CLIENTS),
    ] = None
    api_keys: Annotated[
        str | None,
        typer.Option(
            help="File with API keys, one a line, of which clients need one.",
            show_default="those in the variable HEADSTART_API_KEYS, with commas between them",
            rich_help_panel=_CLIENTS,
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name by which clients may call the server; may be repeated; *: any.",
            show_default="localhost where only this machine can call, else any",
            rich_help_panel=_CLIENTS,
        ),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Web page (scheme, host and port) whose scripts may ask; may be repeated.",
            show_default="none",
            rich_help_panel=_CLIENTS,
        ),
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer.", show_default="by context", rich_help_panel=_LOAD)
    ] = None
    max_queue: Annotated[int, typer.Option(help="Answers that may wait; more are refused (429).", rich_help_panel=_LOAD)] = 256
    max_connections: Annotated[int, typer.Option(help="Open connections; more are refused (503).", rich_help_panel=_LOAD)] = 512
    timeout: Annotated[float, typer.Option(help="Seconds for a request, its waiting included.", rich_help_panel=_LOAD)] = 600.0
    grace: Annotated[float, typer.Option(help="Seconds that requests have after SIGTERM or Ctrl-C.", rich_help_panel=_LOAD)] = 30.0
    request_metrics: Annotated[
        bool, typer.Option("--request-metrics", help="Give every answer its figures of speculation.", rich_help_panel=_CLIENTS)
    ] = False
    vllm_metrics: Annotated[
        bool, typer.Option("--vllm-metrics", help="Show the metrics under vLLM's names too.", rich_help_panel=_CLIENTS)
    ] = False

    def settings(self, model: str | None) -> Settings:
        """The settings of the server. model: as `headstart.load` takes it; None: the embedded one."""
        from headstart.serve.security import read_keys
        from headstart.serve.settings import Settings

        return Settings(
            model=self.served_model_name or served_name(model),
            host=self.host,
            port=self.port,
            max_tokens=self.max_tokens,
            max_queue=self.max_queue,
            timeout=self.timeout,
            grace=self.grace,
            keys=read_keys(self.api_keys),
            origins=tuple(self.allow_origin or ()),
            hosts=tuple(self.allow_host or ()),
            max_connections=self.max_connections,
            with_metrics=self.request_metrics,
            with_vllm_metrics=self.vllm_metrics,
        )


def served_name(model: str | None) -> str:
    """The name of a model for clients: a hub id, or a folder's own name, never its path."""
    if model is None:
        return "headstart-embedded"
    return Path(model).resolve().name if Path(model).is_dir() else model
