"""`train`: heads for a model, from texts."""

import json as json_format
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headstart.cli import completion as complete
from headstart.cli.options import Json, quieten
from headstart.cli.run_options import (
    DATA,
    OPTIMISER,
    WATCH,
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

if TYPE_CHECKING:
    from headstart.training.run_config import TrainConfig

TEMPERATURE = 0.7  # of the decodes in between: greedy answers of small models loop, which flatters drafters


@dataclass(frozen=True)
class DataOptions:
    """What is learned from, and for which model."""

    target: Annotated[
        str | None, option("Folder or hub id of the model to learn for, or a folder with an adapter.", DATA, default="embedded")
    ] = None
    data: Annotated[
        list[Path] | None, option("JSONL (distilled, messages or text), packed or not, or plain text; may be given again.", DATA)
    ] = None
    any_target: Annotated[
        bool | None, typer.Option("--any-target", help="Learn from other models' answers, too.", rich_help_panel=DATA)
    ] = None
    held_out: Annotated[str | None, option("Share of the texts to test on, or a file.", DATA, default="0.05")] = None
    features: Annotated[
        Path | None, option("Folder to keep the target's states in, for later epochs and runs.", DATA, default="none")
    ] = None


@dataclass(frozen=True)
class HeadsOptimiserOptions:
    """What keeps weights from changing too much."""

    warmup: Annotated[float | None, option("Share of the steps that lead up to the learning rate.", OPTIMISER, default="0.1")] = (
        None
    )
    weight_decay: Annotated[float | None, option("Of matrices.", OPTIMISER, default="0")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"] | None,
        option("Precision of the target.", OPTIMISER, default="auto"),
    ] = None


@dataclass(frozen=True)
class DecodingOptions:
    """How heads are tried out while they learn."""

    decode_every: Annotated[int | None, option("Steps between real decodes of held-out prompts.", WATCH, default="never")] = None
    decode_prompts: Annotated[int | None, option("How many of them.", WATCH, default="8")] = None


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
            help="medusa, hydra, hydra++, eagle, eagle3, mtp or mtp-parallel.",
            show_default="the config's",
            autocompletion=complete.methods,
        ),
    ] = None,
    out: Out = None,
    config: Config = None,
    start: Annotated[Path | None, typer.Option(help="Folder of heads to go on from.", show_default="new heads")] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="A setting of the method, as num_heads=5; may be given again.", show_default="none")
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="Weight of a loss (hard, soft, tv, alpha, lk, decay), as lk=1; may be given again.", show_default="soft=1"
        ),
    ] = None,
    joint: Annotated[
        list[str] | None,
        typer.Option(help="Let the target learn too (Medusa-2), as mode=lora; may be given again.", show_default="frozen"),
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
    from headstart.training.train import resolve
    from headstart.training.train import train as run

    quieten()
    whole = resolve(config_path(config, out, finish), options, default_target=_embedded)
    told = run(whole, resume=resume, finish=finish, decode=_decoder(whole) if whole.decode_every else None)
    if json:
        print(json_format.dumps(told))


def _embedded() -> str:
    from headstart.target.loading import embedded

    return str(embedded("target"))


def _decoder(config: "TrainConfig") -> "Callable[[Any, Any, Sequence[Sequence[int]]], float]":
    """What `headstart.training.train` may not know: how heads are used."""
    from headstart.engine.engine import Engine
    from headstart.speculation.params import SamplingParams
    from headstart.target.target import Target

    def decode(model: Any, heads: Any, prompts: Sequence[Sequence[int]]) -> float:
        target = Target(model, check=False)
        try:
            engine = Engine(target, heads, max_rows=len(prompts))
            room = target.context - config.decode_tokens
            for seed, prompt in enumerate(prompts):
                params = SamplingParams(max_tokens=config.decode_tokens, temperature=TEMPERATURE, ignore_eos=True)
                engine.add(list(prompt[-room:]), params, seed=seed)
            for _ in engine.run():
                pass
            return float(engine.stats.tau)
        finally:
            target.release()

    return decode
