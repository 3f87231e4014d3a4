"""What a training run is asked for: a YAML file, options on top, and one sentence for what is wrong with them.

This file knows keys, kinds and limits. It refuses to know models, methods and data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

BUDGETS = ("tokens", "epochs", "steps")

# How a run is watched. All other keys decide its weights, so a run that is continued must keep them.
WATCHING = {"tracker", "threads", "log_every", "eval_every", "save_every", "decode_every", "decode_prompts", "decode_tokens"}

Kind = TypeVar("Kind", bound=BaseModel)

_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(BaseModel):
    """One training run.

    settings: of the method's own config. target: folder or hub id. any_target: learn from the answers of other targets, too.
    loss: weights of the objective. joint: how the target learns too, None where it stays as it is. tokens, epochs, steps: the
    budget, exactly one of them; tokens count prompts and answers, no padding. rows: texts of a batch, each cut to `length` tokens,
    None for 512 or what the target takes. accumulate: batches of a step, on each process. warmup: share of the steps. held_out: a
    share of the texts, or a file. features: folder of a feature store, None to compute features as they are needed. dtype: of the
    target; precision: of the heads' arithmetic. device: "auto" is accelerate's choice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str
    settings: dict[str, Any] = {}
    target: str
    data: tuple[Path, ...] = Field(min_length=1)
    any_target: bool = False
    out: Path
    loss: dict[str, Any] = {}
    joint: dict[str, Any] | None = None

    tokens: _Count | None = None
    epochs: _Count | None = None
    steps: _Count | None = None
    rows: _Count = 8
    length: Annotated[int, Field(ge=4)] | None = None
    accumulate: _Count = 1

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup: _Share = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[_Share, _Share] = (0.9, 0.999)
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu"] = "auto"

    held_out: _Share | Path = 0.05
    features: Path | None = None
    log_every: _Count = 10
    eval_every: _Count | None = None
    save_every: _Count = 200
    decode_every: _Count | None = None
    decode_prompts: _Count = 8
    decode_tokens: _Count = 64
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
    def _has_one_budget(self) -> Self:
        given = [f"{name}={getattr(self, name)}" for name in BUDGETS if getattr(self, name) is not None]
        if self.joint is not None and self.features is not None:
            raise ValueError("features are kept of a target that stays as it is, but joint lets it learn; leave one of them out")
        if len(given) != 1:
            found = f"given {len(given)} times ({', '.join(given)})" if given else "missing"
            raise ValueError(f"the budget is {found}; give exactly one of {', '.join(BUDGETS)}")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to YAML and JSON; paths absolute, so that the file works from anywhere."""
        plain = self.model_dump(mode="json")
        here = {name: str(getattr(self, name).absolute()) for name in ("out", "features") if getattr(self, name)}
        held = {"held_out": str(self.held_out.absolute())} if isinstance(self.held_out, Path) else {}
        target = {"target": str(Path(self.target).absolute())} if Path(self.target).is_dir() else {}
        return plain | here | held | target | {"data": [str(path.absolute()) for path in self.data]}

    def write(self, folder: Path) -> None:
        """As `config.yaml`, which `--config` reads."""
        (folder / "config.yaml").write_text(yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True))


def resolve(path: Path | None, options: Mapping[str, Any], default_target: Callable[[], str] | None = None) -> TrainConfig:
    """The keys of a YAML file with `options` on top; a budget among the options replaces the file's, settings and losses join them.

    default_target: where neither names one. Raises ValueError in one sentence.
    """
    keys = {} if path is None else _read(path)
    if any(name in options for name in BUDGETS):
        keys = {name: value for name, value in keys.items() if name not in BUDGETS}
    joined = {name: {**(keys.get(name) or {}), **options[name]} for name in ("settings", "loss", "joint") if name in options}
    keys = {**keys, **options, **joined}
    if default_target is not None and "target" not in keys:
        keys["target"] = default_target()
    return validate(TrainConfig, keys, "a training run" if path is None else str(path))


def validate(kind: type[Kind], keys: Mapping[str, Any], what: str) -> Kind:
    """`kind` made from `keys`. Raises ValueError with one sentence about the first thing that is wrong; `what` is being made."""
    strange = [str(key) for key in keys if key not in kind.model_fields]
    if strange:
        raise ValueError(f"{what} has no key {', '.join(sorted(strange))}; there are {', '.join(kind.model_fields)}")
    try:
        return kind.model_validate(dict(keys))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{what}: {_sentence(first)}") from None


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"] if not (isinstance(part, str) and "[" in part))
    if error["type"] == "missing":
        return f"{name} is missing"
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"{name} is {error['input']!r}: {said}" if name else said


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"config {path} holds a {type(found).__name__}; write lines of `key: value`")
    return found or {}
