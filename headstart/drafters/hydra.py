"""Hydra (Ankner et al. 2024, arXiv 2402.05109): heads like Medusa's that also read the guesses before theirs.

Head d reads the last hidden state h_t and the embeddings of the root and of the d - 1 guesses on its path, side by side. Hydra++
(`prefix`) first runs one more decoder layer, with its own KV cache, over the states of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.drafters.parts.decoder import Memory, decoder, slot_bytes
from headstart.drafters.parts.expansion import Expansion
from headstart.drafters.parts.grow import Level, grow
from headstart.drafters.parts.heads import Block, Heads, HeadsConfig
from headstart.drafters.parts.llama_layer import llama_block
from headstart.drafters.parts.losses import Batch, HeadOutput, next_embeddings
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept

if TYPE_CHECKING:
    from headstart.target.cache import Seating
    from headstart.target.target import Target


class PrefixConfig(BaseModel):
    """Settings of the decoder layer of Hydra++, a Llama layer; names are those of `LlamaConfig`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    rope_theta: float = Field(default=10000.0, gt=0)
    rms_norm_eps: float = Field(default=1e-5, gt=0)

    @classmethod
    def for_hidden(cls, hidden: int) -> PrefixConfig:
        """The sizes of `llama_block` for a hidden size."""
        return cls(**{name: value for name, value in llama_block(hidden).items() if name in cls.model_fields})

    def block(self, hidden: int) -> dict[str, Any]:
        """Settings of the layer, for `decoder`."""
        sizes = self.model_dump(exclude={"rope_theta"})
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {**llama_block(hidden), **sizes, "head_dim": hidden // self.num_attention_heads, "rope_parameters": rope}


class HydraConfig(HeadsConfig):
    """Settings of Hydra heads, besides those of all heads.

    projection_bias: own LM heads have a bias, as published ones do.
    dropout: in training, before each block and the LM head.
    """

    projection_bias: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)


class HydraPlusConfig(HydraConfig):
    """Settings of Hydra++ heads; published ones have 4 heads of 4 layers.

    prefix: the decoder layer before the heads; None: one with the sizes of `PrefixConfig.for_hidden`.
    """

    prefix: PrefixConfig | None = None


class Fuse(nn.Module):
    """R z + SiLU(W z + b), from state and embeddings side by side to one state. Initially the state itself: R selects it, W is 0.

    width: of the input.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, hidden)
        self.residual = nn.Linear(width, hidden)
        with torch.no_grad():
            for weight in (self.linear.weight, self.linear.bias, self.residual.bias):
                weight.zero_()
            self.residual.weight.copy_(torch.eye(hidden, width))

    def forward(self, z: Tensor) -> Tensor:
        """[..., width] -> [..., hidden]."""
        fused: Tensor = self.residual(z) + nn.functional.silu(self.linear(z))
        return fused


class Head(nn.Module):
    """The head of one depth (from 1), which reads a state and `depth` embeddings side by side."""

    def __init__(self, config: HydraConfig, depth: int, hidden: int, vocab: int) -> None:
        super().__init__()
        self.fuse = Fuse((1 + depth) * hidden, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(config.num_layers - 1))
        self.dropout = nn.Dropout(config.dropout)
        if config.projection == "own":
            self.projection = nn.Linear(hidden, vocab, bias=config.projection_bias)

    def forward(self, z: Tensor) -> Tensor:
        """[..., (1 + depth) * hidden] -> [..., hidden]."""
        x = self.fuse(self.dropout(z))
        for block in self.blocks:
            x = block(self.dropout(x))
        states: Tensor = self.dropout(x)
        return states


class Hydra(Heads):
    """Drafts level by level with heads that depend on the guesses before theirs."""

    name = "hydra"
    config_type = HydraConfig

    def __init__(self, config: HydraConfig, hidden: int, vocab: int) -> None:
        super().__init__(config, hidden, vocab)
        self.heads = nn.ModuleList(Head(config, depth, hidden, vocab) for depth in range(1, config.num_heads + 1))
        self.prefix: Any = None
        self._memory: Memory | None = None

    # -- training --

    def states(self, batch: Batch) -> Iterator[HeadOutput]:
        z = self._prefixed(batch.features)
        embedded = self.embed_head.embed(batch.tokens)  # [rows, length, hidden]
        for depth, head in enumerate(map(self.head, range(self.depth)), 1):
            z = torch.cat([z, next_embeddings(embedded, depth)], -1)
            yield HeadOutput(head(z), self.output_head(depth - 1))

    def _prefixed(self, features: Tensor) -> Tensor:
        """The states that the heads read, of whole texts: [rows, length, hidden] -> [rows, length, hidden]."""
        if self.prefix is None:
            return features
        states: Tensor = self.prefix(inputs_embeds=features, use_cache=False).last_hidden_state
        return states

    # -- drafting --

    def attach(self, target: Target, seating: Seating) -> None:
        super().attach(target, seating)
        if self.prefix is not None:
            self._memory = Memory(self.prefix, seating, target.device, target.dtype, target.runner)
            self.memories = [self._memory]

    @property
    def slot_bytes(self) -> int:
        """Bytes of the prefix layer's keys and values per token, in the precision of its weights."""
        return 0 if self.prefix is None else slot_bytes(self.prefix)

    def encode(self, kept: Kept) -> Tensor:
        features = super().encode(kept)
        return features if self._memory is None else self._memory.extend(features, kept.positions, kept.seats, kept.lengths)

    @torch.inference_mode()
    def propose(self, rows: Rows) -> Drafts:
        roots = torch.tensor([rows.roots[row] for row in rows.drafting]).to(self.device, non_blocking=True)
        expansion = _Expansion(self, rows, roots)
        return grow(rows, expansion.logits(), expansion.expand, calibration=self.calibration, deepest=self.depth)

    def fork(self, source: int, seat: int, length: int) -> None:
        if self._memory is not None:
            self._memory.fork(source, seat, length)

    def free(self, seat: int) -> None:
        if self._memory is not None:
            self._memory.free(seat)


class HydraPlus(Hydra):
    """Hydra++: the heads read the states of one more decoder layer."""

    name = "hydra++"
    config_type = HydraPlusConfig

    def __init__(self, config: HydraPlusConfig, hidden: int, vocab: int) -> None:
        prefix = config.prefix or PrefixConfig.for_hidden(hidden)
        super().__init__(config.model_copy(update={"prefix": prefix}), hidden, vocab)
        self.prefix = decoder(prefix.block(hidden), hidden)


class _Expansion(Expansion):
    """One round. states: one tensor, each node's head input: a state and the embeddings of its path, (2 + depth) * hidden wide."""

    def __init__(self, hydra: Hydra, rows: Rows, roots: Tensor) -> None:
        super().__init__(rows, [torch.cat([hydra.root_states(rows), hydra.embed_head.embed(roots)], -1)[:, None]])
        self.hydra = hydra

    def logits(self) -> Tensor:
        logits: Tensor = self.hydra.output_head(self.depth)(self.hydra.head(self.depth)(self.states[0].flatten(0, 1)))
        return logits

    def run(self, level: Level, parents: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.cat([parents[0], self.hydra.embed_head.embed(level.tokens)], -1)]
