"""Checkpoints of a run: written to a temporary folder, then renamed, so that every checkpoint is complete.

`FOLDER/checkpoint/step-00000200/` holds the state of accelerate (weights, optimizer, random states, loss scale) and `state.json`,
the state of the loop. The module must not import what is trained.
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
    """Where a run is.

    step: steps done.
    batches: batches read, by all processes.
    tokens: tokens in them, without padding.
    seconds: of training.
    window: sums of the metrics since the last line of the log, as nested lists, [4, depths].
    window_loss: sum of the loss since then.
    """

    step: int = 0
    batches: int = 0
    tokens: int = 0
    seconds: float = 0.0
    window: list[list[float]] = field(default_factory=list)
    window_loss: float = 0.0


@dataclass(frozen=True)
class Identity:
    """What must be the same when a run is resumed.

    config: all keys and values.
    texts: digest of the dataset.
    target: digest of the target, or the model that pretraining starts from.
    per_step: batches of a step, of all processes.
    """

    config: dict[str, Any]
    texts: str
    target: str
    per_step: int

    def check(self, stored: dict[str, Any], folder: Path) -> None:
        """Raise ValueError, naming the first key that differs, if a checkpoint is of another run."""
        may_change = WATCHING | {"accumulate", "out", "features", "trust_remote_code"}  # `per_step` is checked instead of the first
        for key, value in self.config.items():
            before = stored["config"].get(key)
            if key not in may_change and before != value:
                raise ValueError(
                    f"the run in {folder} was started with {key}={before}, so it cannot go on with {key}={value}; "
                    "leave it as it was, or name another folder"
                )
        for key, what in (("texts", "other texts"), ("target", "another target"), ("per_step", "other batches per step")):
            if stored[key] != getattr(self, key):
                raise ValueError(f"the run in {folder} was started with {what} ({stored[key]}, now {getattr(self, key)})")


class Checkpoints:
    """The checkpoints of one output folder; only the newest is kept."""

    def __init__(self, out: Path, accelerator: Accelerator) -> None:
        self.out, self.home, self.accelerator = out, out / HOME, accelerator

    def newest(self) -> Path | None:
        """The folder of the last complete checkpoint, or None."""
        folders = sorted(self.home.glob("step-*")) if self.home.is_dir() else []
        return folders[-1] if folders else None

    def save(self, state: State, identity: Identity) -> None:
        """Write a checkpoint and delete the older ones. Raises ValueError if the disk is full; the older one is then kept."""
        temporary = self.home / WRITING
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                (temporary / STATE).write_text(json.dumps({**asdict(state), "identity": asdict(identity)}))
                self._publish(temporary, f"step-{state.step:08d}")
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            self._raise_not_written(error, state.step)
        self.accelerator.wait_for_everyone()

    def load(self, identity: Identity) -> State:
        """Restore the newest checkpoint; returns the initial state if there is none.

        Raises ValueError for a checkpoint that is damaged or of another run.
        """
        newest = self.newest()
        if newest is None:
            return State()
        try:
            stored = read_object(newest / STATE)
            state = State(**{entry.name: stored[entry.name] for entry in fields(State)})
            stored_identity = Identity(**stored["identity"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"checkpoint {newest} is damaged: {error}; delete {self.home} to start again") from None
        identity.check(asdict(stored_identity), self.out)
        try:
            self.accelerator.load_state(str(newest))
        except Exception as error:  # errors of accelerate, torch, pickle and safetensors share no base class
            message = " ".join(str(error).split())[:300]
            raise ValueError(f"checkpoint {newest} cannot be read: {message}; delete {self.home} to start again") from None
        return state

    def remove(self) -> None:
        """Delete all checkpoints, when the run has ended."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.home, ignore_errors=True)

    def _publish(self, temporary: Path, name: str) -> None:
        """Rename a complete checkpoint and delete the older ones."""
        for path in (*(p for p in temporary.rglob("*") if p.is_file()), temporary):
            sync(path)
        final = self.home / name
        if final.exists():  # this step was saved before, with the same content
            shutil.rmtree(temporary)
            return
        os.rename(temporary, final)
        sync(self.home)
        for older in self.home.glob("step-*"):
            if older.name < name:
                shutil.rmtree(older, ignore_errors=True)

    def _raise_not_written(self, error: Exception, step: int) -> None:
        shutil.rmtree(self.home / WRITING, ignore_errors=True)
        newest = self.newest()
        way_out = (
            f"the one of step {int(newest.name[5:])} is complete, so make room and go on with --resume"
            if newest
            else "there is none yet; make room and start again"
        )
        message = " ".join(str(error).split())
        raise ValueError(f"the checkpoint of step {step} cannot be written to {self.home} ({message}); {way_out}") from error
