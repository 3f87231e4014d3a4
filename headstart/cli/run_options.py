"""The options that all runs which learn share, and what becomes of them.

An option that is left out changes nothing in the configuration: its default is told in words. This file knows names and help
texts. It refuses to know what is learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headstart.cli.options import TRUST

BUDGET, DATA, OPTIMISER, WATCH = "Budget (one of them)", "Data", "Optimiser", "Watching"

Out = Annotated[Path | None, typer.Option(help="Folder for what is made.", show_default="the config's")]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings; options go on top.", show_default="none")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")]

Finish = Annotated[
    bool, typer.Option("--finish", help="End the run in the folder here: save what its last checkpoint has learned.")
]


def option(help: str, panel: str, default: str | bool = False) -> Any:
    """default: of the configuration, told in words."""
    return typer.Option(help=help, rich_help_panel=panel, show_default=default)


@dataclass(frozen=True)
class BudgetOptions:
    """When a run ends."""

    tokens: Annotated[int | None, option("So many tokens, without padding.", BUDGET)] = None
    epochs: Annotated[int | None, option("Everything so often.", BUDGET)] = None
    steps: Annotated[int | None, option("So many steps.", BUDGET)] = None


@dataclass(frozen=True)
class BatchOptions:
    """How much is learned from at a time."""

    rows: Annotated[int | None, option("Texts of a batch.", DATA, default="8")] = None
    length: Annotated[int | None, option("Tokens of a text at most.", DATA, default="512, or what fits")] = None
    accumulate: Annotated[int | None, option("Batches of a step, on each process.", DATA, default="1")] = None


@dataclass(frozen=True)
class OptimiserOptions:
    """How weights change."""

    learning_rate: Annotated[float | None, option("At its highest.", OPTIMISER, default="0.001")] = None
    schedule: Annotated[
        Literal["cosine", "linear", "constant"] | None, option("How it falls after the warm-up.", OPTIMISER, default="cosine")
    ] = None
    floor: Annotated[float | None, option("Share of it that is left at the end.", OPTIMISER, default="0")] = None
    clip: Annotated[float | None, option("Longest gradient.", OPTIMISER, default="1")] = None
    seed: Annotated[int | None, option("Repeats a run.", OPTIMISER, default="0")] = None
    precision: Annotated[
        Literal["no", "bf16", "fp16"] | None, option("Mixed precision of what learns.", OPTIMISER, default="no")
    ] = None
    device: Annotated[Literal["auto", "cpu"] | None, option("auto is accelerate's choice.", OPTIMISER, default="auto")] = None
    threads: Annotated[int | None, option("Threads of the processor.", OPTIMISER, default="torch's")] = None
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help=TRUST, rich_help_panel=OPTIMISER, show_default=False)
    ] = None


@dataclass(frozen=True)
class LoggingOptions:
    """What is said and kept while it learns."""

    log_every: Annotated[int | None, option("Steps between lines of the log.", WATCH, default="10")] = None
    eval_every: Annotated[int | None, option("Steps between tests on held-out texts.", WATCH, default="at the end")] = None
    save_every: Annotated[int | None, option("Steps between checkpoints.", WATCH, default="200")] = None
    tracker: Annotated[str | None, option("none, tensorboard, wandb, ...", WATCH, default="none")] = None


def given_options(*groups: Any, **more: Any) -> dict[str, Any]:
    """The options that were not left out, by name. groups: dataclasses of options."""
    every = {field.name: getattr(group, field.name) for group in groups for field in fields(group)} | more
    return {name: value for name, value in every.items() if value is not None}


def config_path(config: Path | None, out: Path | None, finish: bool) -> Path | None:
    """The file of settings: of a run that is to be finished, the one in its own folder, unless another is named. Raises ValueError
    where there is none."""
    if not finish or config is not None:
        return config
    own = None if out is None else out / "config.yaml"
    if own is None or not own.is_file():
        where = "no folder is named" if out is None else f"{out} holds no config.yaml of one"
        raise ValueError(f"--finish ends a run that was stopped, but {where}; name the run's folder with --out")
    return own


def parse_pairs(texts: Sequence[str] | None, option: str) -> dict[str, Any] | None:
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
