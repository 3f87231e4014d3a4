"""`train`: heads for a model, from texts."""

import json as json_format
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headstart.cli.settings import Json, quieten

if TYPE_CHECKING:
    from headstart.training.config import TrainConfig

_BUDGET, _STEP, _OPTIMISER, _WATCH = "Budget (one of them)", "Data", "Optimiser", "Watching"
TEMPERATURE = 0.7  # of the decodes in between: greedy answers of small models loop, which flatters drafters


def _option(help: str, panel: str, default: str | bool = False) -> Any:
    """default: of the configuration, told in words; an option that is left out changes nothing there."""
    return typer.Option(help=help, rich_help_panel=panel, show_default=default)


@dataclass(frozen=True)
class Budget:
    """When a run ends."""

    tokens: Annotated[int | None, _option("So many tokens of prompts and answers.", _BUDGET)] = None
    epochs: Annotated[int | None, _option("Every text so often.", _BUDGET)] = None
    steps: Annotated[int | None, _option("So many steps.", _BUDGET)] = None


@dataclass(frozen=True)
class Reading:
    """What is learned from, and how much at a time."""

    target: Annotated[str | None, _option("Folder or hub id of the model to learn for.", _STEP, default="embedded")] = None
    data: Annotated[
        list[Path] | None, _option("JSONL (distilled, messages or text), packed or not, or plain text; may be given again.", _STEP)
    ] = None
    any_target: Annotated[
        bool | None, typer.Option("--any-target", help="Learn from other models' answers, too.", rich_help_panel=_STEP)
    ] = None
    held_out: Annotated[str | None, _option("Share of the texts to test on, or a file.", _STEP, default="0.05")] = None
    rows: Annotated[int | None, _option("Texts of a batch.", _STEP, default="8")] = None
    length: Annotated[int | None, _option("Tokens of a text at most.", _STEP, default="512, or what fits")] = None
    accumulate: Annotated[int | None, _option("Batches of a step, on each process.", _STEP, default="1")] = None
    features: Annotated[
        Path | None, _option("Folder to keep the target's states in, for later epochs and runs.", _STEP, default="none")
    ] = None


@dataclass(frozen=True)
class Optimiser:
    """How weights change."""

    learning_rate: Annotated[float | None, _option("At its highest.", _OPTIMISER, default="0.001")] = None
    warmup: Annotated[float | None, _option("Share of the steps that lead up to it.", _OPTIMISER, default="0.1")] = None
    schedule: Annotated[
        Literal["cosine", "linear", "constant"] | None, _option("How it falls after that.", _OPTIMISER, default="cosine")
    ] = None
    weight_decay: Annotated[float | None, _option("Of matrices.", _OPTIMISER, default="0")] = None
    clip: Annotated[float | None, _option("Longest gradient.", _OPTIMISER, default="1")] = None
    seed: Annotated[int | None, _option("Repeats a run.", _OPTIMISER, default="0")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"] | None,
        _option("Precision of the target.", _OPTIMISER, default="auto"),
    ] = None
    precision: Annotated[
        Literal["no", "bf16", "fp16"] | None, _option("Mixed precision of what learns.", _OPTIMISER, default="no")
    ] = None
    device: Annotated[Literal["auto", "cpu"] | None, _option("auto is accelerate's choice.", _OPTIMISER, default="auto")] = None
    threads: Annotated[int | None, _option("Threads of the processor.", _OPTIMISER, default="torch's")] = None


@dataclass(frozen=True)
class Watching:
    """What is said and kept while it learns."""

    log_every: Annotated[int | None, _option("Steps between lines of the log.", _WATCH, default="10")] = None
    eval_every: Annotated[int | None, _option("Steps between tests on held-out texts.", _WATCH, default="at the end")] = None
    save_every: Annotated[int | None, _option("Steps between checkpoints.", _WATCH, default="200")] = None
    decode_every: Annotated[int | None, _option("Steps between real decodes of held-out prompts.", _WATCH, default="never")] = None
    decode_prompts: Annotated[int | None, _option("How many of them.", _WATCH, default="8")] = None
    tracker: Annotated[str | None, _option("none, tensorboard, wandb, ...", _WATCH, default="none")] = None


def train(
    budget: Budget,
    reading: Reading,
    optimiser: Optimiser,
    watching: Watching,
    method: Annotated[str | None, typer.Argument(help="medusa, hydra or hydra++.", show_default="the config's")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the heads.", show_default="the config's")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options go on top.", show_default="none")] = None,
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
        typer.Option(
            help="Let the target learn too (Medusa-2), as mode=lora or heads=FOLDER; may be given again.", show_default="frozen"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    json: Json = False,
) -> None:
    """Train heads for a model.

    Example: headstart train medusa --target ./talk13M --data answers.jsonl --epochs 2 --out ./heads
    """
    options: dict[str, Any] = {"method": method, "out": out}
    for group in (budget, reading, optimiser, watching):
        options |= {field.name: getattr(group, field.name) for field in fields(group)}
    options |= {"settings": _pairs(set, "set"), "loss": _pairs(loss, "loss"), "joint": _pairs(joint, "joint")}
    given = {name: value for name, value in options.items() if value is not None}
    from headstart.train import resolve
    from headstart.train import train as run

    quieten()
    whole = resolve(config, given, default_target=_embedded)
    told = run(whole, resume=resume, decode=_decoder(whole) if whole.decode_every else None)
    if json:
        print(json_format.dumps(told))


def _pairs(texts: Sequence[str] | None, option: str) -> dict[str, Any] | None:
    """`a=1` is {"a": 1}; values are read as YAML."""
    if texts is None:
        return None
    import yaml

    result: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--{option} is {text!r}; write NAME=VALUE")
        try:
            result[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(
                f"--{option} {name} is {value!r}, which cannot be read; write a number, a word or {{key: value}}"
            ) from None
    return result


def _embedded() -> str:
    from headstart.pretrained import embedded

    return str(embedded("target"))


def _decoder(config: "TrainConfig") -> "Callable[[Any, Any, Sequence[Sequence[int]]], float]":
    """What `headstart.train` may not know: how heads are used."""
    from headstart.engine import Engine
    from headstart.sampling import SamplingParams
    from headstart.target import Target

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
