"""Heads as others publish them, written by hand from random tensors, and the text and target that they are tried on."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from headstart import checkpoint
from headstart.ends import Ends
from headstart.lessons import Batch
from headstart.pretrained import load_model

HIDDEN, VOCAB = 32, 320  # of folders.write_model
Tensors = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


def write(folder: Path, name: str, tensors: Tensors, **config: object) -> Path:
    """One file of tensors, as its suffix says, and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Trial:
    """A target, a text of random tokens, and the target's final states there."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder, torch.float32, "cpu")
        self.facts = checkpoint.facts_of(self.model)
        self.ends = Ends(self.model)
        self.tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            self.states = self.model.model(input_ids=self.tokens).last_hidden_state  # [rows, length, hidden]
            self.embedded = self.ends.embed(self.tokens)

    def logits(self, source: Path) -> list[Tensor]:
        """[heads][rows, length, vocab]: what the heads say at every position, once brought in."""
        heads = checkpoint.published_in(source).read(self.facts, self.model.config).bind(self.ends)
        batch = Batch(self.tokens, torch.ones_like(self.tokens, dtype=torch.bool), self.states, self.states)
        with torch.no_grad():
            return [guess.project(guess.states) for guess in heads.states(batch)]

    def refusal(self, source: Path) -> str:
        """The sentence with which heads are refused."""
        try:
            checkpoint.published_in(source).read(self.facts, self.model.config)
        except ValueError as error:
            return str(error)
        raise AssertionError(f"{source} was not refused")
