"""The log of a training run: lines or a progress bar on standard error, and `log.jsonl` in the run's folder."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from headstart.drafters.parts.losses import Metrics

LOG = "log.jsonl"


def summarize_metrics(metrics: Metrics, loss: float, prefix: str = "") -> dict[str, Any]:
    """The values of the log, by name.

    metrics, loss: sums over positions.
    prefix: before each name.

    `loss`: nats per position of the loss mask. `top1`: accuracy of the best token by depth, in [0, 1]. `tau`: acceptance length
    that a chain of best tokens would have.
    """
    count = float(metrics.counts[0])
    top1 = [round(share, 5) for share in metrics.top1.tolist()]
    return {
        f"{prefix}loss": loss / count if count else math.nan,
        f"{prefix}top1": top1,
        f"{prefix}tau": round(float(metrics.tau), 4),
    }


SummarizeMetrics = Callable[[Metrics, float, str], dict[str, Any]]  # (metrics, summed loss, prefix) -> values by name


class RunLog:
    """The log of one run. Only the main process writes; in other processes it does nothing.

    out: folder of the run.
    is_main: whether this is the main process.
    """

    def __init__(self, out: Path, is_main: bool) -> None:
        self._path, self._is_main = out / LOG, is_main
        self.console = Console(stderr=True, quiet=not is_main, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def rewind(self, step: int) -> None:
        """Remove the lines that a killed run wrote after its last checkpoint. step: of that checkpoint."""
        if not self._is_main or not self._path.exists():
            return
        lines = self._path.read_text().splitlines()
        kept = [line for line in lines if _step(line) <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept))

    @contextmanager
    def running(self, step: int, steps: int) -> Iterator[None]:
        """A context with a progress bar, where standard error is a terminal."""
        if not (self._is_main and sys.stderr.isatty()):
            yield
            return
        columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as self._progress:
            self._task = self._progress.add_task("", total=steps, completed=step)
            yield
        self._progress = None

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line to `log.jsonl`. Raises ValueError if it cannot be written."""
        if not self._is_main:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise ValueError(
                f"the log {self._path} cannot be written: {error.strerror}; make room and go on with --resume"
            ) from None

    def print_progress(self, values: Mapping[str, Any], steps: int, seconds_left: float) -> None:
        """Print the values of a step, or show them in the progress bar."""
        summary = f"{_numbers(values)}  {values['tokens_per_second']:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, description=summary)
        else:
            self.print(f"step {values['step']}/{steps}  {summary}  {_clock(seconds_left)} left")

    def print(self, sentence: str) -> None:
        """Print a sentence on standard error."""
        self.console.print(sentence, markup=False)


def flatten(values: Mapping[str, Any]) -> dict[str, float]:
    """The values with lists split into single numbers, which is what trackers take: top1 becomes top1/1, top1/2, ..."""
    result: dict[str, float] = {}
    for name, value in values.items():
        result |= {f"{name}/{depth}": entry for depth, entry in enumerate(value, 1)} if isinstance(value, list) else {name: value}
    return result


def _numbers(values: Mapping[str, Any]) -> str:
    """The losses, accuracies and acceptance lengths among the values, in one line."""
    shown = {name: value for name, value in values.items() if name.endswith(("loss", "top1", "tau"))}
    return "  ".join(f"{name.replace('_', ' ').replace('top1', 'top-1')} {_digits(name, value)}" for name, value in shown.items())


def _digits(name: str, value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{share:.3f}" for share in value)
    return f"{value:.4f}" if name.endswith("loss") else f"{value:.3f}"


def format_held_out(values: Mapping[str, Any]) -> str:
    """The values of held-out texts in one line."""
    unprefixed = {name.removeprefix("held_out_"): value for name, value in values.items()}
    return f"held out: {_numbers(unprefixed)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _step(line: str) -> float:
    """The step of a line of the log; infinite if a kill cut the line short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
