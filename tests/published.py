"""Heads as others publish them, written by hand from random tensors, and the text and target that they are tried on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """A target, a text of random tokens, and the target's final states there. outputs: of all its layers."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.model = load_model(folder, dtype, "cpu")
        self.facts = checkpoint.facts_of(self.model)
        self.ends = Ends(self.model)
        self.tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            found = self.model.model(input_ids=self.tokens, output_hidden_states=True)
            self.states, self.outputs = found.last_hidden_state, found.hidden_states[1:]  # [rows, length, hidden]
            self.embedded = self.ends.embed(self.tokens)

    def read(self, source: Path, taps: Sequence[int] = ()) -> Any:
        """The heads there, brought in for this target, in its precision."""
        found = checkpoint.published_in(source).suited(self.facts, lambda: self.ends, taps)
        return found.read(self.facts, self.model.config).to(self.model.dtype).bind(self.ends)

    def logits(self, source: Path) -> list[Tensor]:
        """[heads][rows, length, vocab]: what the heads say at every position, once brought in."""
        heads = self.read(source)
        read = torch.cat([self.outputs[tap] if tap >= 0 else self.states for tap in heads.taps], -1)
        batch = Batch(self.tokens, torch.ones_like(self.tokens, dtype=torch.bool), read, self.states)
        with torch.no_grad():
            return [guess.project(guess.states) for guess in heads.states(batch)]

    def refusal(self, source: Path, taps: Sequence[int] = ()) -> str:
        """The sentence with which heads are refused."""
        try:
            self.read(source, taps)
        except ValueError as error:
            return str(error)
        raise AssertionError(f"{source} was not refused")
