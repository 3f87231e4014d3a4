"""The configuration of a training run: the keys of all runs, those of training heads, and those of pretraining a model.

The module must not import models, methods or data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

BUDGETS = ("tokens", "epochs", "steps")

# Keys of logging, evaluation and saving. All other keys decide the weights, so a resumed run must keep them.
WATCHING = {"tracker", "threads", "log_every", "eval_every", "save_every", "decode_every", "decode_prompts", "decode_tokens"}

_Count = Annotated[int, Field(ge=1, lt=2**63)]
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_NotNegative = Annotated[float, Field(ge=0)]


class RunConfig(BaseModel):
    """The keys of every run.

    data: files with texts.
    out: folder that the run writes.
    tokens, epochs, steps: the budget, exactly one of them; tokens without padding.
    rows: texts of a batch.
    length: tokens of a text at most; None: 512, or the model's context if that is shorter.
    accumulate: batches of a step, on each process.
    learning_rate: at the end of the warm-up.
    warmup: share of the steps.
    schedule: of the learning rate after the warm-up.
    floor: share of the learning rate that is left at the end of the schedule.
    weight_decay, betas: of the optimizer.
    clip: greatest norm of the gradient; None: not clipped.
    seed: of all random numbers.
    precision: mixed precision of the arithmetic.
    device: "auto" is accelerate's choice.
    held_out: a share of the texts, or a file.
    log_every, eval_every, save_every: steps between two lines of the log, evaluations, checkpoints; None: never.
    trust_remote_code: whether Python files in the folders of models and tokenizers may run.
    tracker: experiment tracker.
    threads: of torch on the CPU; None: torch's choice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (BUDGETS,)  # exactly one key of each
    path_keys: ClassVar[tuple[str, ...]] = ()  # keys that hold a folder or a hub id

    data: tuple[Path, ...] = Field(min_length=1)
    out: Path

    tokens: _Count | None = None
    epochs: _Count | None = None
    steps: _Count | None = None
    rows: _Count = 8
    length: Annotated[int, Field(ge=4)] | None = None
    accumulate: _Count = 1

    learning_rate: _Positive = 1e-3
    warmup: _Share = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: _Share = 0.0
    weight_decay: _NotNegative = 0.0
    betas: tuple[_Share, _Share] = (0.9, 0.999)
    clip: _Positive | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu"] = "auto"

    held_out: _Share | Path = 0.05
    log_every: _Count = 10
    eval_every: _Count | None = None
    save_every: _Count = 200
    trust_remote_code: bool = False
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "trackio", "aim", "clearml", "comet_ml"] = "none"
    threads: _Count | None = None

    @field_validator("held_out", mode="before")
    @classmethod
    def _share_or_file(cls, value: object) -> object:
        """A string that is a number is a share; any other is a file."""
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return Path(str(value))

    @model_validator(mode="after")
    def _has_one_of_each(self) -> Self:
        for names in self.alternatives:
            chosen = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None]
            if len(chosen) != 1:
                what = "the budget" if names == BUDGETS else " or ".join(names)
                fault = f"given {len(chosen)} times ({', '.join(chosen)})" if chosen else "missing"
                raise ValueError(f"{what} is {fault}; give exactly one of {', '.join(names)}")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Keys and plain values for YAML and JSON; paths are absolute, so that the file works from any folder."""
        values = self.model_dump(mode="json")
        paths = {name: str(value.absolute()) for name, value in self if isinstance(value, Path)}
        folders = {key: str(Path(values[key]).absolute()) for key in self.path_keys if values[key] and Path(values[key]).is_dir()}
        return values | paths | folders | {"data": [str(path.absolute()) for path in self.data]}

    def write(self, folder: Path) -> None:
        """Write `config.yaml`, which `--config` reads. Raises ValueError if it cannot be written."""
        text = yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)
        try:
            (folder / "config.yaml").write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"{folder / 'config.yaml'} cannot be written: {error.strerror}; make room, or name another folder"
            ) from None


class TrainConfig(RunConfig):
    """The keys of training heads for a model.

    method: of the drafter.
    settings: of the method's own config.
    start: folder of heads of this method for a warm start; None: new heads.
    target: folder or hub id.
    any_target: train on the answers of other targets, too.
    loss: weights of the objective.
    joint: keys of `Medusa2Config`, to train the target with its heads; None: the target is frozen.
    data: may be left out where `features` is a store that was written; its texts are then those of the run.
    features: folder of a feature store, which is written first; None: features (tapped hidden states) are computed as needed.
    dtype: of the target.
    decode_every: steps between two real decodes; None: never.
    decode_prompts, decode_tokens: prompts of such a decode, and tokens of each answer.
    """

    path_keys: ClassVar[tuple[str, ...]] = ("target",)

    data: tuple[Path, ...] = ()
    method: str
    settings: dict[str, Any] = {}
    start: Path | None = None
    target: str
    any_target: bool = False
    loss: dict[str, Any] = {}
    joint: dict[str, Any] | None = None
    features: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    decode_every: _Count | None = None
    decode_prompts: _Count = 8
    decode_tokens: _Count = 64

    @model_validator(mode="after")
    def _has_texts(self) -> Self:
        if not self.data and not (self.features is not None and (self.features / "store.json").is_file()):
            raise ValueError("data is missing; name files of texts, or with features a store that `headstart features` wrote")
        return self

    @model_validator(mode="after")
    def _features_need_a_frozen_target(self) -> Self:
        if self.joint is not None and self.features is not None:
            raise ValueError("features are stored for a frozen target, but joint trains it; leave one of them out")
        return self


class FeaturesConfig(BaseModel):
    """The keys of writing features for training.

    data: files with texts; held_out: a further one, for a run that names it so.
    out: folder of the store.
    target, dtype, length, any_target, device, threads, trust_remote_code: as in training.
    methods: whose heads shall be trained on the features, with their default taps.
    taps: further layers to store.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: tuple[Path, ...] = Field(min_length=1)
    held_out: Path | None = None
    out: Path
    target: str
    methods: tuple[str, ...] = ()
    taps: tuple[int, ...] = ()
    length: Annotated[int, Field(ge=4)] | None = None
    any_target: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    threads: _Count | None = None
    trust_remote_code: bool = False


class PretrainConfig(RunConfig):
    """The keys of pretraining a model, with heads that are trained at the same time or without.

    model, start: exactly one of them. model: a configuration, or a folder with one; the weights are random. start: folder or hub id
    of a model for a warm start.
    tokenizer: folder or hub id; None: that of the model.
    heads: methods that are trained with the trunk, with their settings; `from` among these is a folder of heads for a warm start.
    weight: lambda of the heads' losses until the share `weight_until` of the steps (DeepSeek-V3, arXiv 2412.19437, section 4.2).
    weight_end: lambda afterwards; None: `weight` to the end.
    decay: weight of each depth over that of the one before.
    times: how often an epoch reads a file of the data, by its path or its name. Default: once.
    optimizer: "adamw", or "muon" for the matrices inside layers and AdamW for the rest.
    dtype: in which the model and its heads are stored; they are trained in float32.
    """

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("model", "start"), BUDGETS)
    path_keys: ClassVar[tuple[str, ...]] = ("start", "tokenizer")

    model: Path | None = None
    start: str | None = None
    tokenizer: str | None = None
    heads: dict[str, dict[str, Any]] = {}
    weight: _NotNegative = 0.3
    weight_end: _NotNegative | None = None
    weight_until: Annotated[float, Field(gt=0, le=1)] = 2 / 3
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    times: dict[str, _Positive] = {}
    optimizer: Literal["adamw", "muon"] = "adamw"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    warmup: _Share = 0.03
    weight_decay: _NotNegative = 0.1
    betas: tuple[_Share, _Share] = (0.9, 0.95)
    held_out: _Share | Path = 0.01

    @field_validator("heads", mode="before")
    @classmethod
    def _or_its_defaults(cls, value: object) -> object:
        """A method without settings, as `mtp:` in YAML, has the default ones."""
        return (
            {name: {} if settings is None else settings for name, settings in value.items()} if isinstance(value, dict) else value
        )

    @model_validator(mode="after")
    def _weights_have_heads(self) -> Self:
        keys = ("weight", "weight_end", "weight_until", "decay")
        changed = [name for name in keys if getattr(self, name) != type(self).model_fields[name].default]
        if changed and not self.heads:
            raise ValueError(f"{', '.join(changed)} is about heads that are trained with the trunk, and there are none; give heads")
        if "weight_until" in changed and self.weight_end is None:
            raise ValueError("weight_until says when weight_end replaces weight, and there is none; give weight_end")
        return self

    def heads_weight(self, progress: float) -> float:
        """Weight of the heads' losses when this share of the steps, in [0, 1], is done (DeepSeek-V3, section 4.2)."""
        is_late = self.weight_end is not None and progress >= self.weight_until
        return self.weight_end if is_late and self.weight_end is not None else self.weight

    def as_dict(self) -> dict[str, Any]:
        """Keys and plain values, as for every run; paths in `times` and in `from` of heads are absolute, too."""
        times = {str(Path(name).absolute()) if Path(name) in self.data else name: count for name, count in self.times.items()}
        heads = {name: _with_absolute_path(settings) for name, settings in self.heads.items()}
        return {**super().as_dict(), "heads": heads, "times": times}


def _with_absolute_path(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of heads, with the folder of their warm start as an absolute path."""
    return {name: str(Path(value).absolute()) if name == "from" else value for name, value in settings.items()}
