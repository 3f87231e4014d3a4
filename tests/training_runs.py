"""Helpers for tests of training: short runs, their weights and logs, and runs that are killed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from headstart.training.dataset import Dataset
from headstart.training.loop import Loop
from headstart.training.train import resolve, train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(one: Path, other: Path, how: str = "") -> None:
    """how: what happened to the second run, for the message of a failure."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys(), how
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == [], how


def log(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def killed(config, at: str, resume: bool = False) -> None:
    """Train in a child process that is killed.

    at: in step N (`step:N`), or when checkpoint N is written (`written:N`) or renamed (`renamed:N`).
    """
    moment, _, number = at.partition(":")
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    child = os.fork()
    if not child:
        set_learning_rate, rename = Loop._set_learning_rate, os.rename

        def set_learning_rate_or_die(self):
            set_learning_rate(self)
            if moment == "step" and self.state.step == int(number):
                die()

        def rename_or_die(old, new):
            is_checkpoint = str(new).endswith(f"{int(number):08d}")
            if is_checkpoint and moment == "written":
                die()
            rename(old, new)
            if is_checkpoint and moment == "renamed":
                die()

        Loop._set_learning_rate, os.rename = set_learning_rate_or_die, rename_or_die
        try:
            train(config, resume=resume)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def check_resumed(asked, folder: Path, keys: dict[str, Any], at: str) -> None:
    """A run of `asked(**keys)`, killed `at` a moment and resumed, has the weights and losses of one that was not."""
    train(resolve(None, asked(**keys, out=folder / "uninterrupted")))
    config = resolve(None, asked(**keys))
    killed(config, at)
    train(config, resume=True)
    assert_same_bits(folder / "uninterrupted", folder / "heads")
    assert log(folder / "heads") == log(folder / "uninterrupted")


def dataset_of(model_folder: Path, data: Path) -> Dataset:
    from headstart.target.tokenizer_loading import load_tokenizer
    from headstart.text.conversations import read_examples
    from headstart.training.dataset import split

    return split(read_examples([data], load_tokenizer(model_folder))[0], 0.0)
