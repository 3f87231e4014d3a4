"""`distill`: the target's own answers, as training data for heads."""

import json as json_format
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headstart.cli.options import DraftingOptions, Json, ModelOptions, quieten

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from headstart.distill.distill import DistillProgress
    from headstart.distill.teacher import Settings, Teacher

_SAMPLING, _ENDPOINT = "Sampling", "Generation by a server"


@dataclass(frozen=True)
class ServerOptions:
    """The server that answers, if any; else the engine of this package does."""

    endpoint: Annotated[
        str | None,
        typer.Option(
            help="URL of an OpenAI-compatible server of the same model, with its /v1; --model gives the tokenizer.",
            show_default=False,
            rich_help_panel=_ENDPOINT,
        ),
    ] = None
    endpoint_model: Annotated[
        str | None, typer.Option(help="Name of the model on the server.", show_default=False, rich_help_panel=_ENDPOINT)
    ] = None
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the API key.", show_default=False, rich_help_panel=_ENDPOINT)
    ] = None

    def teacher(
        self, model: ModelOptions, drafting: DraftingOptions, temperature: float, rows: int
    ) -> "tuple[PreTrainedTokenizerBase, Teacher]":
        """The tokenizer, and what answers prompts with it. Raises ValueError for options that do not go together."""
        if self.endpoint is not None:
            return self._remote(self.endpoint, model, rows)
        if self.endpoint_model is not None or self.api_key_env is not None:
            raise ValueError("--endpoint-model and --api-key-env are for an --endpoint; give its URL, or leave them out")
        from headstart.distill.teacher import EngineTeacher

        llm = model.load(**drafting.settings(model.model, temperature), max_rows=rows)
        return llm.tokenizer, EngineTeacher(llm)

    def _remote(self, endpoint: str, model: ModelOptions, rows: int) -> "tuple[PreTrainedTokenizerBase, Teacher]":
        if self.endpoint_model is None:
            raise ValueError("--endpoint needs --endpoint-model, the name by which the server calls its model")
        if self.api_key_env is not None and self.api_key_env not in os.environ:
            raise ValueError(f"--api-key-env names {self.api_key_env}, which is not set")
        from headstart.distill.endpoint import EndpointTeacher
        from headstart.target.loading import embedded
        from headstart.target.tokenizer_loading import load_tokenizer

        quieten()
        tokenizer = load_tokenizer(model.model or embedded("target"), model.trust_remote_code)
        return tokenizer, EndpointTeacher(endpoint, self.endpoint_model, tokenizer, os.environ.get(self.api_key_env or ""), rows)


def distill(
    *,
    model: ModelOptions,
    drafting: DraftingOptions,
    prompts: Annotated[
        Path,
        typer.Argument(
            help="JSONL with messages, turns, prompt, instruction or text; or a text file with one prompt per line.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write the answers to; an existing one is continued.", show_default=False)],
    mode: Annotated[
        Literal["continue", "chat"],
        typer.Option(help="continue: generate the first reply; chat: generate every reply of a conversation anew."),
    ] = "continue",
    beginning: Annotated[
        int | None, typer.Option(help="For texts to be continued: use only the first N tokens as the prompt.", show_default="all")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N prompts.", show_default="all")] = None,
    rows: Annotated[int, typer.Option(help="Conversations to generate at once (batch size).")] = 16,
    drop_cut: Annotated[
        bool, typer.Option("--drop-cut", help="Drop conversations that reached --max-tokens or the context.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of a reply.", rich_help_panel=_SAMPLING)] = 512,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.", rich_help_panel=_SAMPLING)] = 0.7,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the k most probable tokens only.", rich_help_panel=_SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most probable tokens that make up this probability.", rich_help_panel=_SAMPLING),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the answers.", rich_help_panel=_SAMPLING)] = 0,
    server: ServerOptions,
    json: Json = False,
) -> None:
    """Generate training data for heads.

    Writes a model's own answers to prompts. An answer depends on its prompt and the seed only, so an interrupted run continues
    where it stopped: run the same command again.

    Example: headstart distill prompts.jsonl --model ./talk13M --out answers.jsonl --mode chat --max-tokens 256
    """
    from headstart.distill.distill import distill as write
    from headstart.distill.teacher import Settings
    from headstart.text.prompts import read_prompts

    settings = Settings(temperature, top_p, top_k, max_tokens, seed, mode, beginning, drop_cut)
    if not prompts.is_file():
        raise ValueError(f"there is no file {str(prompts)!r} of prompts")
    tokenizer, teacher = server.teacher(model, drafting, temperature, rows)
    chat_prompts = read_prompts(prompts, limit, is_chat=tokenizer.chat_template is not None)
    began = time.perf_counter()
    try:
        with _progress(len(chat_prompts)) as on_progress:
            so_far = write(teacher, chat_prompts, settings, out, on_progress)
    except KeyboardInterrupt:
        print(
            f"headstart: interrupted; {out} keeps the finished conversations, and the same command goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    _print(so_far, out, time.perf_counter() - began, settings, teacher, json)


@contextmanager
def _progress(total: int) -> "Iterator[Callable[[DistillProgress], None]]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar, began = progress.add_task("answering", total=total), time.perf_counter()

        def on_progress(so_far: "DistillProgress") -> None:
            rate = so_far.num_tokens / max(1e-9, time.perf_counter() - began)
            progress.update(bar, completed=so_far.num_done, description=f"answering, {rate:.0f} tokens/s")

        yield on_progress


def _print(so_far: "DistillProgress", out: Path, seconds: float, settings: "Settings", teacher: "Teacher", as_json: bool) -> None:
    for outcome, reasons in (("skipped", so_far.skipped), ("ended early", so_far.shortened)):
        for reason, count in reasons.items():
            print(f"headstart: {count} conversations {outcome}: {reason}", file=sys.stderr)
    if as_json:
        counts = vars(so_far) | {"num_skipped": so_far.skipped.total()}
        result = {"out": str(out), "seconds": seconds, "target": teacher.info, "settings": vars(settings), **counts}
        print(json_format.dumps(result))
        return
    parts = [
        f"{so_far.num_answered} conversations",
        f"{so_far.num_tokens} tokens in {seconds:.1f} s",
        f"{so_far.num_cut} cut for length",
    ]
    parts += [f"{so_far.num_dropped} dropped"] if settings.drop_cut else []
    parts += [f"{so_far.num_found} were there already"] if so_far.num_found else []
    print(f"{out}: {', '.join(parts)}")
