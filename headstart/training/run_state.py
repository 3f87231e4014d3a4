"""Checkpoints of a run: written beside, then renamed, so that one that is there is whole.

`FOLDER/checkpoint/step-00000200/` holds what accelerate knows (weights, optimiser, random states, loss scale) and `state.json`,
what the loop knows. This file knows folders. It refuses to know what is trained.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from headstart.formats.disk import sync
from headstart.text.jsonl import read_object
from headstart.training.run_config import WATCHING

if TYPE_CHECKING:
    from accelerate import Accelerator

HOME, STATE, WRITING = "checkpoint", "state.json", ".writing"


@dataclass
class State:
    """Where a run is. batches: read so far, of all processes. tokens: in them. seconds: of training. window: sums of the
    metrics since the last line of the log, as nested lists."""

    step: int = 0
    batches: int = 0
    tokens: int = 0
    seconds: float = 0.0
    window: list[list[float]] = field(default_factory=list)
    window_loss: float = 0.0


@dataclass(frozen=True)
class Identity:
    """What must be the same when a run goes on. config: all of it. texts, target: digests. per_step: batches of a step, of all
    processes."""

    config: dict[str, Any]
    texts: str
    target: str
    per_step: int

    def check(self, found: dict[str, Any], folder: Path) -> None:
        """Raise ValueError, naming the first key, if a checkpoint is of another run."""
        free = WATCHING | {"accumulate", "out", "features", "trust_remote_code"}  # `per_step` stands for the first
        for key, value in self.config.items():
            before = found["config"].get(key)
            if key not in free and before != value:
                raise ValueError(
                    f"the run in {folder} was started with {key}={before}, so it cannot go on with {key}={value}; "
                    "leave it as it was, or name another folder"
                )
        for key, what in (("texts", "other texts"), ("target", "another target"), ("per_step", "other batches per step")):
            if found[key] != getattr(self, key):
                raise ValueError(f"the run in {folder} was started with {what} ({found[key]}, now {getattr(self, key)})")


class Checkpoints:
    """The checkpoints of one output folder; only the newest is kept."""

    def __init__(self, out: Path, accelerator: Accelerator) -> None:
        self.out, self.home, self.accelerator = out, out / HOME, accelerator

    def newest(self) -> Path | None:
        """The folder of the last whole checkpoint."""
        found = sorted(self.home.glob("step-*")) if self.home.is_dir() else []
        return found[-1] if found else None

    def save(self, state: State, identity: Identity) -> None:
        """Raises ValueError if the disk is full; the checkpoint before stays whole."""
        beside = self.home / WRITING
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(beside))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                (beside / STATE).write_text(json.dumps({**asdict(state), "identity": asdict(identity)}))
                self._publish(beside, f"step-{state.step:08d}")
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            self._explain(error, state.step)
        self.accelerator.wait_for_everyone()

    def load(self, identity: Identity) -> State:
        """Put everything back as it was at the newest checkpoint; the start if there is none."""
        newest = self.newest()
        if newest is None:
            return State()
        try:
            found = read_object(newest / STATE)
            state = State(**{entry.name: found[entry.name] for entry in fields(State)})
            of_run = Identity(**found["identity"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"checkpoint {newest} is damaged: {error}; delete {self.home} to start again") from None
        identity.check(asdict(of_run), self.out)
        try:
            self.accelerator.load_state(str(newest))
        except Exception as error:  # of accelerate, torch, pickle and safetensors, which share no base class
            said = " ".join(str(error).split())[:300]
            raise ValueError(f"checkpoint {newest} cannot be read: {said}; delete {self.home} to start again") from None
        return state

    def remove(self) -> None:
        """When a run has ended."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.home, ignore_errors=True)

    def _publish(self, beside: Path, name: str) -> None:
        for path in (*(p for p in beside.rglob("*") if p.is_file()), beside):
            sync(path)
        final = self.home / name
        if final.exists():  # saved at this very step before; it is the same
            shutil.rmtree(beside)
            return
        os.rename(beside, final)
        sync(self.home)
        for older in self.home.glob("step-*"):
            if older.name < name:
                shutil.rmtree(older, ignore_errors=True)

    def _explain(self, error: Exception, step: int) -> None:
        shutil.rmtree(self.home / WRITING, ignore_errors=True)
        newest = self.newest()
        whole = (
            f"the one of step {int(newest.name[5:])} is whole, so make room and go on with --resume"
            if newest
            else "there is none yet"
        )
        said = " ".join(str(error).split())
        raise ValueError(f"the checkpoint of step {step} cannot be written to {self.home} ({said}); {whole}") from error
