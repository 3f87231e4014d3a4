"""The options that `train` and `pretrain` share, and how they become settings of a run.

An option that is left out changes nothing in the configuration, so its default is shown in words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headstart.cli.options import TRUST

BUDGET, DATA, OPTIMISER, LOGGING = "Budget (give one)", "Data", "Optimizer", "Logging and checkpoints"

Out = Annotated[Path | None, typer.Option(help="Folder of the run and its result.", show_default="from --config")]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings; options override it.", show_default="none")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in the folder.")]

Finish = Annotated[
    bool, typer.Option("--finish", help="End the stopped run in the folder: save the weights of its last checkpoint as the result.")
]


def option(help: str, panel: str, default: str | bool = False) -> Any:
    """A command-line option. default: the configuration's default in words."""
    return typer.Option(help=help, rich_help_panel=panel, show_default=default)


@dataclass(frozen=True)
class BudgetOptions:
    """When the run ends."""

    tokens: Annotated[int | None, option("Tokens to train on, without padding.", BUDGET)] = None
    epochs: Annotated[int | None, option("Passes over the data.", BUDGET)] = None
    steps: Annotated[int | None, option("Optimizer steps.", BUDGET)] = None


@dataclass(frozen=True)
class BatchOptions:
    """The size of batches and steps."""

    rows: Annotated[int | None, option("Texts per batch.", DATA, default="8")] = None
    length: Annotated[int | None, option("Maximum number of tokens of a text.", DATA, default="512, or what fits")] = None
    accumulate: Annotated[int | None, option("Gradient accumulation: batches per step, on each process.", DATA, default="1")] = None


@dataclass(frozen=True)
class OptimiserOptions:
    """The optimizer and its learning-rate schedule."""

    learning_rate: Annotated[float | None, option("Peak learning rate.", OPTIMISER, default="0.001")] = None
    schedule: Annotated[
        Literal["cosine", "linear", "constant"] | None,
        option("Learning-rate schedule after the warm-up.", OPTIMISER, default="cosine"),
    ] = None
    floor: Annotated[float | None, option("Final learning rate, as a fraction of the peak.", OPTIMISER, default="0")] = None
    clip: Annotated[float | None, option("Maximum gradient norm.", OPTIMISER, default="1")] = None
    seed: Annotated[int | None, option("Random seed.", OPTIMISER, default="0")] = None
    precision: Annotated[
        Literal["no", "bf16", "fp16"] | None, option("Mixed precision of the trained weights.", OPTIMISER, default="no")
    ] = None
    device: Annotated[Literal["auto", "cpu"] | None, option("Device; auto: accelerate chooses.", OPTIMISER, default="auto")] = None
    threads: Annotated[int | None, option("CPU threads.", OPTIMISER, default="torch's")] = None
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help=TRUST, rich_help_panel=OPTIMISER, show_default=False)
    ] = None


@dataclass(frozen=True)
class LoggingOptions:
    """What is logged, evaluated and saved during training."""

    log_every: Annotated[int | None, option("Steps between log lines.", LOGGING, default="10")] = None
    eval_every: Annotated[int | None, option("Steps between evaluations on held-out texts.", LOGGING, default="at the end")] = None
    save_every: Annotated[int | None, option("Steps between checkpoints.", LOGGING, default="200")] = None
    tracker: Annotated[str | None, option("Experiment tracker: none, tensorboard, wandb, ...", LOGGING, default="none")] = None


def given_options(*groups: Any, **more: Any) -> dict[str, Any]:
    """The options that were given, by name. groups: dataclasses of options. more: single options."""
    options = {field.name: getattr(group, field.name) for group in groups for field in fields(group)} | more
    return {name: value for name, value in options.items() if value is not None}


def config_path(config: Path | None, out: Path | None, finish: bool) -> Path | None:
    """The file of settings: `config`, or with --finish the one in the run's folder.

    Raises ValueError where --finish has neither.
    """
    if not finish or config is not None:
        return config
    saved = None if out is None else out / "config.yaml"
    if saved is None or not saved.is_file():
        reason = "no folder is named" if out is None else f"{out} holds no config.yaml of one"
        raise ValueError(f"--finish ends a run that was stopped, but {reason}; name the run's folder with --out")
    return saved


def parse_pairs(texts: Sequence[str] | None, option: str) -> dict[str, Any] | None:
    """Settings from NAME=VALUE, such as {"a": 1} from `a=1`; values are read as YAML.

    Raises ValueError for what is not NAME=VALUE.
    """
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
