"""Medusa and Hydra heads as headstart saves them, and how they draft a chain. Must not import vLLM or headstart.

Medusa (Cai et al. 2024, arXiv 2401.10774): head d reads the hidden state whose logits gave the root, and guesses d tokens ahead.
Hydra (Ankner et al. 2024, arXiv 2402.05109): head d also reads the embeddings of the root and of the d - 1 guesses before its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu

FORMAT, VERSION = "headstart", 1
METHODS = ("medusa", "hydra")

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """What heads use of their target.

    embed: the embedding, [rows] int64 -> [rows, hidden].
    logits: the LM head, [rows, hidden] -> [rows, vocab].
    """

    embed: Rows
    logits: Rows


class Heads:
    """Heads of one folder.

    method: "medusa" or "hydra".
    depth: number of heads; the longest chain.
    hidden, vocab: sizes of the target.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.method: str = config["method"]
        self.hidden: int = config["target"]["hidden"]
        self.vocab: int = config["target"]["vocab"]
        self.depth: int = config["settings"]["num_heads"]
        self._num_layers: int = config["settings"]["num_layers"]
        self._has_projection = config["settings"]["projection"] == "own"
        self._tensors = dict(tensors)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Heads:
        """Move the weights, and return the same object."""
        self._tensors = {name: tensor.to(device, dtype) for name, tensor in self._tensors.items()}
        return self

    @torch.inference_mode()
    def draft(self, states: Tensor, roots: Tensor, count: int, target: Target) -> Tensor:
        """The most probable chain of each row: [rows, count] int64.

        states: [rows, hidden], the last hidden states, after the final norm, whose logits gave the roots.
        roots: [rows] int64, the last token of each row.
        count: length of the chains, at most `depth`.
        """
        states = states.to(next(iter(self._tensors.values())).dtype)
        path, read = roots, states
        drafts: list[Tensor] = []
        for depth in range(count):
            if self.method == "hydra":
                read = torch.cat([read, target.embed(path).to(states.dtype)], -1)
            path = self._logits(depth, self._hidden(depth, read), target).argmax(-1)
            drafts.append(path)
        return torch.stack(drafts, 1)

    def _hidden(self, depth: int, read: Tensor) -> Tensor:
        """The state that a head makes of its input: [rows, input width] -> [rows, hidden]."""
        num_blocks = self._num_layers
        if self.method == "hydra":
            fuse = f"heads.{depth}.fuse"
            read, num_blocks = self._linear(f"{fuse}.residual", read) + silu(self._linear(f"{fuse}.linear", read)), num_blocks - 1
        for index in range(num_blocks):
            read = read + silu(self._linear(f"heads.{depth}.blocks.{index}.linear", read))
        return read

    def _logits(self, depth: int, states: Tensor, target: Target) -> Tensor:
        return self._linear(f"heads.{depth}.projection", states) if self._has_projection else target.logits(states)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"))


def read(folder: str | Path) -> Heads:
    """The heads in a folder made by `headstart train` or `headstart import`.

    Raises ValueError, in one sentence, for another folder, and for heads of a method that cannot draft here.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no heads: {error}; name a folder made by `headstart train`") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{folder} holds no heads in headstart's format; name a folder made by `headstart train`")
    if config.get("version") != VERSION:
        raise ValueError(
            f"{folder} has version {config.get('version')} of headstart's format, this reads {VERSION}; update headstart-vllm"
        )
    if config.get("method") not in METHODS:
        raise ValueError(
            f"{folder} holds {config.get('method')} heads, but only {' and '.join(METHODS)} heads draft here; "
            "`headstart export --to vllm` writes eagle, eagle3 and mtp heads for vLLM itself"
        )
    return Heads(config, load_file(folder / "model.safetensors"))
