"""Short training runs: what they left behind, and runs that are killed."""

import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from headstart.training import loop as loops
from headstart.training.dataset import Dataset
from headstart.training.train import train


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
    """Run in a child that dies: in `step:N`, or when checkpoint N is all written (`written:N`) or has its name (`renamed:N`)."""
    moment, _, number = at.partition(":")
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    child = os.fork()
    if not child:
        set_pace, rename = loops.Loop._set_learning_rate, os.rename

        def pacing(self):
            set_pace(self)
            if moment == "step" and self.state.step == int(number):
                die()

        def renaming(old, new):
            is_it = str(new).endswith(f"{int(number):08d}")
            if is_it and moment == "written":
                die()
            rename(old, new)
            if is_it and moment == "renamed":
                die()

        loops.Loop._set_learning_rate, os.rename = pacing, renaming
        try:
            train(config, resume=resume)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def dataset_of(model_folder: Path, data: Path) -> Dataset:
    from headstart.target.tokenizer_loading import load_tokenizer
    from headstart.text.conversations import read_examples
    from headstart.training.dataset import split

    return split(read_examples([data], load_tokenizer(model_folder))[0], 0.0)
