"""`pretrain`: a model from scratch, or from where another one ended, with heads that learn at the same time."""

import json as json_format
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from headstart.cli.options import Json, quieten
from headstart.cli.run_options import (
    DATA,
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

_MODEL, _HEADS = "Model (one of --model and --start)", "Heads"


@dataclass(frozen=True)
class TrunkOptions:
    """What learns."""

    model: Annotated[
        Path | None, option("config.json of any causal LM, or a folder with one; its weights are drawn at random.", _MODEL)
    ] = None
    start: Annotated[str | None, option("Folder or hub id of a model to go on from.", _MODEL)] = None
    tokenizer: Annotated[str | None, option("Folder or hub id of the tokenizer.", _MODEL, default="the model's")] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, option("In which it is stored.", _MODEL, default="float32")
    ] = None


@dataclass(frozen=True)
class DataOptions:
    """What is learned from."""

    data: Annotated[
        list[Path] | None,
        option("JSONL (text or messages), packed or not, plain text, or tokens in .npy; may be given again.", DATA),
    ] = None
    times: Annotated[
        list[str] | None, option("How often an epoch reads a file, as wiki.jsonl=2 or web.npy=0.3; may be given again.", DATA)
    ] = None
    held_out: Annotated[str | None, option("Share of the documents to test on, or a file.", DATA, default="0.01")] = None


@dataclass(frozen=True)
class HeadsOptions:
    """Heads that learn with the trunk."""

    heads: Annotated[
        list[str] | None,
        option("A method, as mtp, mtp-parallel or 'mtp={depth: 3}'; may be given again.", _HEADS, default="none"),
    ] = None
    weight: Annotated[float | None, option("Of their losses (lambda).", _HEADS, default="0.3")] = None
    weight_end: Annotated[float | None, option("Of their losses later on.", _HEADS, default="as before")] = None
    weight_until: Annotated[float | None, option("Share of the steps before that.", _HEADS, default="2/3")] = None
    decay: Annotated[float | None, option("Weight of each deeper guess over the one before.", _HEADS, default="1")] = None


@dataclass(frozen=True)
class TrunkOptimiserOptions:
    """How weights change while there is everything to learn."""

    optimizer: Annotated[
        Literal["adamw", "muon"] | None, option("muon is for matrices; the rest has adamw.", OPTIMISER, default="adamw")
    ] = None
    warmup: Annotated[float | None, option("Share of the steps that lead up to the learning rate.", OPTIMISER, default="0.03")] = (
        None
    )
    weight_decay: Annotated[float | None, option("Of matrices.", OPTIMISER, default="0.1")] = None


def pretrain(
    trunk: TrunkOptions,
    budget: BudgetOptions,
    data: DataOptions,
    batches: BatchOptions,
    heads: HeadsOptions,
    optimiser: OptimiserOptions,
    trunk_optimiser: TrunkOptimiserOptions,
    logging: LoggingOptions,
    out: Out = None,
    config: Config = None,
    resume: Resume = False,
    finish: Finish = False,
    json: Json = False,
) -> None:
    """Train a model from scratch, with heads that predict several tokens at once.

    Example: headstart pretrain --model config.json --tokenizer ./words --data wiki.jsonl --tokens 20000000 --heads mtp --out ./mine
    """
    groups = (trunk, budget, data, batches, heads, optimiser, trunk_optimiser, logging)
    mappings = {"heads": _heads(heads.heads), "times": parse_pairs(data.times, "times")}
    options = given_options(*groups, **mappings, out=out)
    from headstart.training.config_file import resolve
    from headstart.training.pretrain import pretrain as run
    from headstart.training.run_config import PretrainConfig

    quieten()
    told = run(resolve(config_path(config, out, finish), options, kind=PretrainConfig), resume=resume, finish=finish)
    if json:
        print(json_format.dumps(told))


def _heads(texts: Sequence[str] | None) -> dict[str, Any] | None:
    """`mtp` alone has the settings that nobody gave."""
    return parse_pairs(None if texts is None else [text if "=" in text else f"{text}={{}}" for text in texts], "heads")
