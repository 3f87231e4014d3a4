"""`train`: heads for a model, trained on texts."""

import json as json_format
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from headstart.cli import completion as complete
from headstart.cli.options import Json, quieten
from headstart.cli.run_options import (
    DATA,
    LOGGING,
    OPTIMISER,
    BatchOptions,
    BudgetOptions,
    Config,
    Finish,
    LoggingOptions,
    OptimiserOptions,
    Out,
    Resume,
    config_path,
    given_options,
    option,
    parse_pairs,
)


@dataclass(frozen=True)
class DataOptions:
    """The target and the texts that its heads are trained on."""

    target: Annotated[
        str | None,
        option("Folder or hub id of the model to train heads for, or a folder with an adapter.", DATA, default="embedded"),
    ] = None
    data: Annotated[
        list[Path] | None, option("JSONL (distilled, messages or text), packed or not, or plain text; may be repeated.", DATA)
    ] = None
    any_target: Annotated[
        bool | None, typer.Option("--any-target", help="Also train on answers that other models gave.", rich_help_panel=DATA)
    ] = None
    held_out: Annotated[
        str | None, option("Fraction of the texts to hold out for evaluation, or a file of held-out texts.", DATA, default="0.05")
    ] = None
    features: Annotated[
        Path | None,
        option("Folder of the target's hidden states, as `features` writes it; a new one is filled.", DATA, default="none"),
    ] = None


@dataclass(frozen=True)
class HeadsOptimiserOptions:
    """Settings of the optimizer whose defaults are those of heads, and the precision of the target."""

    warmup: Annotated[float | None, option("Fraction of the steps that warm up the learning rate.", OPTIMISER, default="0.1")] = (
        None
    )
    weight_decay: Annotated[float | None, option("Weight decay of matrices.", OPTIMISER, default="0")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"] | None,
        option("Data type of the target.", OPTIMISER, default="auto"),
    ] = None


@dataclass(frozen=True)
class DecodingOptions:
    """How often heads decode held-out prompts during training."""

    decode_every: Annotated[
        int | None, option("Steps between speculative decodes of held-out prompts, which measure tau.", LOGGING, default="never")
    ] = None
    decode_prompts: Annotated[int | None, option("Number of held-out prompts to decode.", LOGGING, default="8")] = None


def train(
    budget: BudgetOptions,
    data: DataOptions,
    batches: BatchOptions,
    optimiser: OptimiserOptions,
    heads_optimiser: HeadsOptimiserOptions,
    logging: LoggingOptions,
    decoding: DecodingOptions,
    method: Annotated[
        str | None,
        typer.Argument(
            help="Method: medusa, hydra, hydra++, eagle, eagle3, mtp or mtp-parallel.",
            show_default="from --config",
            autocompletion=complete.methods,
        ),
    ] = None,
    out: Out = None,
    config: Config = None,
    start: Annotated[
        Path | None, typer.Option(help="Folder of heads to start from (warm start).", show_default="new heads")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="Setting of the method, such as num_heads=5; may be repeated.", show_default="none")
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="Weight of a loss (hard, soft, tv, alpha, lk, decay), such as lk=1; may be repeated.", show_default="soft=1"
        ),
    ] = None,
    joint: Annotated[
        list[str] | None,
        typer.Option(help="Train the target too (Medusa-2), such as mode=lora; may be repeated.", show_default="frozen"),
    ] = None,
    resume: Resume = False,
    finish: Finish = False,
    json: Json = False,
) -> None:
    """Train heads for a model.

    Example: headstart train medusa --target ./talk13M --data answers.jsonl --epochs 2 --out ./heads
    """
    mappings = {"settings": parse_pairs(set, "set"), "loss": parse_pairs(loss, "loss"), "joint": parse_pairs(joint, "joint")}
    options = given_options(
        budget, data, batches, optimiser, heads_optimiser, logging, decoding, method=method, out=out, start=start, **mappings
    )
    from headstart.bench.held_out import decode_held_out
    from headstart.training.train import resolve
    from headstart.training.train import train as run

    quieten()
    run_config = resolve(config_path(config, out, finish), options, default_target=_embedded)
    decode = partial(decode_held_out, max_tokens=run_config.decode_tokens) if run_config.decode_every else None
    metrics = run(run_config, resume=resume, finish=finish, decode=decode)
    if json:
        print(json_format.dumps(metrics))


def _embedded() -> str:
    from headstart.target.loading import embedded

    return str(embedded("target"))
