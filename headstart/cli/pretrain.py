"""`pretrain`: a model trained from scratch or from another one's weights, with heads at the same time."""

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

_MODEL, _HEADS = "Model (give --model or --start)", "Heads"


@dataclass(frozen=True)
class TrunkOptions:
    """The model to train."""

    model: Annotated[
        Path | None, option("config.json of any causal LM, or a folder with one; weights are initialised at random.", _MODEL)
    ] = None
    start: Annotated[str | None, option("Folder or hub id of a model to start from (warm start).", _MODEL)] = None
    tokenizer: Annotated[str | None, option("Folder or hub id of the tokenizer.", _MODEL, default="the model's")] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        option("Data type in which the model is saved.", _MODEL, default="float32"),
    ] = None


@dataclass(frozen=True)
class DataOptions:
    """The texts to train on."""

    data: Annotated[
        list[Path] | None,
        option("JSONL (text or messages), packed or not, plain text, or tokens in .npy; may be repeated.", DATA),
    ] = None
    times: Annotated[
        list[str] | None, option("How often an epoch reads a file, such as wiki.jsonl=2 or web.npy=0.3; may be repeated.", DATA)
    ] = None
    held_out: Annotated[
        str | None,
        option("Fraction of the documents to hold out for evaluation, or a file of held-out texts.", DATA, default="0.01"),
    ] = None


@dataclass(frozen=True)
class HeadsOptions:
    """Heads that are trained with the trunk."""

    heads: Annotated[
        list[str] | None,
        option("Method, such as mtp, mtp-parallel or 'mtp={depth: 3}'; may be repeated.", _HEADS, default="none"),
    ] = None
    weight: Annotated[float | None, option("Weight of the heads' losses (lambda).", _HEADS, default="0.3")] = None
    weight_end: Annotated[float | None, option("Weight of the heads' losses later in the run.", _HEADS, default="unchanged")] = None
    weight_until: Annotated[float | None, option("Fraction of the steps before --weight-end.", _HEADS, default="2/3")] = None
    decay: Annotated[float | None, option("Weight of each depth's loss relative to the depth before.", _HEADS, default="1")] = None


@dataclass(frozen=True)
class TrunkOptimiserOptions:
    """Settings of the optimizer whose defaults are those of a whole model."""

    optimizer: Annotated[
        Literal["adamw", "muon"] | None,
        option("muon updates matrices with Muon and the rest with AdamW.", OPTIMISER, default="adamw"),
    ] = None
    warmup: Annotated[float | None, option("Fraction of the steps that warm up the learning rate.", OPTIMISER, default="0.03")] = (
        None
    )
    weight_decay: Annotated[float | None, option("Weight decay of matrices.", OPTIMISER, default="0.1")] = None


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
    metrics = run(resolve(config_path(config, out, finish), options, kind=PretrainConfig), resume=resume, finish=finish)
    if json:
        print(json_format.dumps(metrics))


def _heads(texts: Sequence[str] | None) -> dict[str, Any] | None:
    """Settings by method; a method without settings has the default ones."""
    return parse_pairs(None if texts is None else [text if "=" in text else f"{text}={{}}" for text in texts], "heads")
