"""Size, training and held-out metrics of the heads that were measured, as recorded in their folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from headstart.bench.runner import split_spec
from headstart.engine.drafter_loading import folder_of
from headstart.formats import describe, detect
from headstart.target.target import Target
from headstart.training.run_log import LOG

CURVE = ("loss", "tau", "held_out_loss", "held_out_tau")
MAX_POINTS = 200  # of the training texts


@dataclass(frozen=True)
class Trained:
    """Heads in a folder. What their training did not record is None or empty.

    folder: as named in the run.
    method: medusa, mtp, ...
    parameters: number of weights.
    megabytes: of the weights in the target's precision.
    tokens: that they were trained on.
    minutes: of training.
    top1: top-1 accuracy on held-out texts, by depth.
    tau: acceptance length of a chain of top-1 drafts on held-out texts.
    curve: points of the training: step, tokens so far, and what was logged there, see `training_curve`.
    """

    folder: str
    method: str
    parameters: int
    megabytes: float
    tokens: int | None
    minutes: float | None
    top1: list[float]
    tau: float | None
    curve: list[dict[str, float]] = field(default_factory=list)


def trained(runs: Sequence[str], target: Target) -> list[Trained]:
    """One entry per folder of heads among the drafters of `runs`. Raises ValueError for a folder that holds something else."""
    folders = dict.fromkeys(folder_of(split_spec(run)[0], target.name) for run in runs)
    return [_read(folder, target.dtype) for folder in folders if folder]


def _read(folder: Path, dtype: torch.dtype) -> Trained:
    described = describe(folder)
    training, parameters = described.training, detect(folder).parameters or 0
    seconds, top1 = _number(training.get("seconds")), training.get("held_out_top1")
    return Trained(
        folder=str(folder),
        method=described.method,
        parameters=parameters,
        megabytes=parameters * dtype.itemsize / 1e6,
        tokens=None if (tokens := _number(training.get("tokens"))) is None else int(tokens),
        minutes=None if seconds is None else seconds / 60,
        top1=[share for share in map(_number, top1) if share is not None] if isinstance(top1, list) else [],
        tau=_number(training.get("held_out_tau")),
        curve=training_curve(folder),
    )


def training_curve(folder: Path) -> list[dict[str, float]]:
    """The loss and tau (acceptance length) that the training logged, in order; empty for a folder without a log.

    folder: of the heads.
    Each point has `step`, `tokens` (read so far; estimated for held-out texts), and of `CURVE` what the log has.
    At most about `MAX_POINTS` points are of training texts.
    """
    path = folder / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    points: list[dict[str, float]] = []
    last: dict[str, float] = {}
    for logged in filter(None, map(_logged, lines)):
        if "tokens" in logged:
            last = logged
        elif last.get("step"):
            logged["tokens"] = last["tokens"] * logged["step"] / last["step"]
        points.append(logged)
    training = [point for point in points if "tau" in point]
    dropped = {id(point) for index, point in enumerate(training) if index % (len(training) // MAX_POINTS + 1)}
    return [point for point in points if id(point) not in dropped and "tokens" in point and {*CURVE} & {*point}]


def _logged(line: str) -> dict[str, float] | None:
    """The numbers of a line of the log; None for a line that was cut short, or is of something else."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or _number(values.get("step")) is None:
        return None
    return {name: value for name in ("step", "tokens", *CURVE) if (value := _number(values.get(name))) is not None}


def _number(value: Any) -> float | None:
    """None for anything but a number: the folder may come from anyone."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


Column = tuple[str, Callable[[Trained], str]]
_COLUMNS: tuple[Column, ...] = (
    ("heads", lambda one: Path(one.folder).resolve().name),
    ("method", lambda one: one.method),
    ("parameters", lambda one: f"{one.parameters:,}"),
    ("MB", lambda one: f"{one.megabytes:.1f}"),
    ("training tokens", lambda one: "" if one.tokens is None else f"{one.tokens:,}"),
    ("training minutes", lambda one: "" if one.minutes is None else f"{one.minutes:.1f}"),
    ("held-out top-1 by depth", lambda one: " ".join(f"{share:.3f}" for share in one.top1)),
    ("held-out tau", lambda one: "" if one.tau is None else f"{one.tau:.2f}"),
)


def table(heads: Sequence[Trained]) -> Table:
    """One line per folder."""
    result = Table(title="heads", title_justify="left")
    for index, (name, _) in enumerate(_COLUMNS):
        result.add_column(name, justify="right" if index > 1 else "left", overflow="fold")
    for one in heads:
        result.add_row(*(write(one) for _, write in _COLUMNS))
    return result
