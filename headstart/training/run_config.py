"""What a run is asked for: the keys of all runs, those of training heads, and those of pretraining a model.

This file knows keys, kinds and limits. It refuses to know files, models, methods and data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

BUDGETS = ("tokens", "epochs", "steps")

# How a run is watched. All other keys decide its weights, so a run that is continued must keep them.
WATCHING = {"tracker", "threads", "log_every", "eval_every", "save_every", "decode_every", "decode_prompts", "decode_tokens"}

_Count = Annotated[int, Field(ge=1, lt=2**63)]
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_NotNegative = Annotated[float, Field(ge=0)]


class RunConfig(BaseModel):
    """What every run is asked for.

    tokens, epochs, steps: the budget, exactly one of them; tokens without padding. rows: texts of a batch, each of `length` tokens
    at most, None for 512 or what the model takes. accumulate: batches of a step, on each process. warmup: share of the steps.
    floor: share of the learning rate that is left at the end of the schedule. held_out: a share of the texts, or a file. precision:
    of the arithmetic. device: "auto" is accelerate's choice. trust_remote_code: whether Python files in the folders of models and
    tokenizers may run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (BUDGETS,)  # exactly one key of each
    places: ClassVar[tuple[str, ...]] = ()  # keys that hold a folder or a hub id

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
        """A text that is a number is a share."""
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return Path(str(value))

    @model_validator(mode="after")
    def _has_one_of_each(self) -> Self:
        for names in self.alternatives:
            given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None]
            if len(given) != 1:
                what = "the budget" if names == BUDGETS else " or ".join(names)
                found = f"given {len(given)} times ({', '.join(given)})" if given else "missing"
                raise ValueError(f"{what} is {found}; give exactly one of {', '.join(names)}")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to YAML and JSON; paths absolute, so that the file works from anywhere."""
        plain = self.model_dump(mode="json")
        paths = {name: str(value.absolute()) for name, value in self if isinstance(value, Path)}
        places = {name: str(Path(plain[name]).absolute()) for name in self.places if plain[name] and Path(plain[name]).is_dir()}
        return plain | paths | places | {"data": [str(path.absolute()) for path in self.data]}

    def write(self, folder: Path) -> None:
        """As `config.yaml`, which `--config` reads. Raises ValueError on a full disk."""
        text = yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)
        try:
            (folder / "config.yaml").write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"{folder / 'config.yaml'} cannot be written: {error.strerror}; make room, or name another folder"
            ) from None


class TrainConfig(RunConfig):
    """Training heads for a model.

    settings: of the method's own config. start: folder of heads of this method to go on from, None for new ones. target: folder or
    hub id. any_target: learn from the answers of other targets, too. loss: weights of the objective. joint: how the target learns
    too, None where it stays as it is. features: folder of a feature store, None to compute features as they are needed. dtype: of
    the target.
    """

    places: ClassVar[tuple[str, ...]] = ("target",)

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
    def _has_features_that_last(self) -> Self:
        if self.joint is not None and self.features is not None:
            raise ValueError("features are kept of a target that stays as it is, but joint lets it learn; leave one of them out")
        return self


class PretrainConfig(RunConfig):
    """Pretraining a model, with heads that learn at the same time or without.

    model: a configuration, or a folder with one; the weights are random. start: folder or hub id of a model to go on from. One of
    them. tokenizer: folder or hub id, None for that of the model. heads: methods that learn with the trunk, with their settings;
    `from` among these is a folder of heads to go on from.
    weight: lambda of the heads' losses until the share `weight_until` of the steps, `weight_end` afterwards (DeepSeek-V3,
    arXiv 2412.19437, section 4.2), None for `weight` to the end. decay: weight of each deeper guess over that of the one before.
    times: how often an epoch reads a file of the data, by its path or its name; once where it does not say. dtype: in which the
    model and its heads are stored; they learn in float32.
    """

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("model", "start"), BUDGETS)
    places: ClassVar[tuple[str, ...]] = ("start", "tokenizer")

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
        """A method that nothing is said about, as `mtp:` in YAML."""
        return {name: {} if given is None else given for name, given in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _honours_what_it_is_told(self) -> Self:
        own = ("weight", "weight_end", "weight_until", "decay")
        told = [name for name in own if getattr(self, name) != type(self).model_fields[name].default]
        if told and not self.heads:
            raise ValueError(f"{', '.join(told)} is about heads that learn with the trunk, and there are none; give heads")
        if "weight_until" in told and self.weight_end is None:
            raise ValueError("weight_until says when weight gives way to weight_end, and there is none; give weight_end")
        return self

    def heads_weight(self, progress: float) -> float:
        """Weight of the heads' losses when this share of the steps, in [0, 1], is done (DeepSeek-V3, section 4.2)."""
        is_late = self.weight_end is not None and progress >= self.weight_until
        return self.weight_end if is_late and self.weight_end is not None else self.weight

    def as_dict(self) -> dict[str, Any]:
        """As that of all runs; files that `times` names by their path are the absolute ones."""
        times = {str(Path(name).absolute()) if Path(name) in self.data else name: count for name, count in self.times.items()}
        heads = {name: _from_anywhere(settings) for name, settings in self.heads.items()}
        return {**super().as_dict(), "heads": heads, "times": times}


def _from_anywhere(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of heads, with the folder that they go on from as an absolute path."""
    return {name: str(Path(value).absolute()) if name == "from" else value for name, value in settings.items()}
