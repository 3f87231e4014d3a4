"""What drafters have in common whose layer is fed its own output: EAGLE and EAGLE-3.

The layer reads pairs: a state, and the embedding of the token behind it. At first the states are the target's; from the first
guess on they are what the layer itself made. The pair of the token at position i sits at position i. A method's own file says
how a pair is read and how a state speaks. This file refuses to know any method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.drafters.parts.decoder import unrolled
from headstart.drafters.parts.decoder_heads import Layered
from headstart.drafters.parts.expansion import Expansion
from headstart.drafters.parts.grow import Level, grow
from headstart.drafters.parts.llama_layer import llama_block, llama_block_of
from headstart.drafters.parts.losses import Batch, HeadOutput, next_embeddings
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept


class RecurrentConfig(BaseModel):
    """depth: how deep it drafts. steps: how many guesses in a row it learns from, each made from what the one before made of
    itself; deeper ones are drafted all the same. block: configuration of its layers, as transformers has it, None for one of
    Llama's with the sizes of the target's. embedding: the target's table, or one of its own, which does not learn either."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int = Field(default=5, ge=1, le=64)
    steps: int = Field(default=1, ge=1, le=64)
    block: dict[str, Any] | None = None
    context: int | None = Field(default=None, ge=1)
    embedding: Literal["shared", "own"] = "shared"


class Recurrent(Layered):
    """Drafts level by level with one decoder, which hands its output on."""

    joins_pretraining = False
    block: Any  # the decoder
    ids: Tensor | None  # [draft vocab] ascending target ids, where the vocabulary is reduced

    def __init__(self, config: Any, hidden: int, vocab: int) -> None:
        config = config.model_copy(update={"block": config.block or llama_block(hidden)})
        super().__init__(config, hidden, vocab)
        self.width = int(config.block["hidden_size"])  # of its states
        if self.width != hidden and config.embedding == "shared":
            raise ValueError(
                f"the drafter's layer has a hidden size of {self.width}, the target and its embedding, which it reads, one of "
                f"{hidden}; give the block that size"
            )
        self.register_buffer("ids", None)
        if config.embedding == "own":
            self.embedding = nn.Embedding(vocab, self.width).requires_grad_(False)

    @classmethod
    def resolve_config(cls, config: Any, target: Any) -> Any:
        return config if config.block else config.model_copy(update={"block": llama_block_of(target)})

    @property
    def depth(self) -> int:
        return int(self.config.depth)

    @property
    def decoders(self) -> Sequence[Any]:
        return [self.block]

    @property
    def state_width(self) -> int:
        return self.width

    def embed(self, tokens: Tensor) -> Tensor:
        """[...] int64 -> [..., width]"""
        embedded: Tensor = self.embed_head.embed(tokens) if self.config.embedding == "shared" else self.embedding(tokens)
        return embedded

    def project_taps(self, features: Tensor) -> Tensor:
        """The states that come from the target: [..., taps * hidden] -> [..., width]."""
        return features

    def layer_input(self, states: Tensor, embedded: Tensor) -> Tensor:
        """What the decoder reads of pairs: [..., width] twice -> [..., its input]."""
        raise NotImplementedError

    def next_state(self, states: Tensor) -> Tensor:
        """What is handed on of the decoder's output, [..., width] -> the same."""
        return states

    def init_from_target(self) -> Self:
        """Raises ValueError for an embedding of its own that cannot begin as the target's, for it never learns."""
        if self.config.embedding == "own":
            if self.width != self.hidden:
                raise ValueError(
                    f"an embedding {self.width} wide cannot begin as the target's of {self.hidden}; give the block that hidden "
                    "size, or go on from heads that have one"
                )
            with torch.no_grad():
                self.embedding.weight.copy_(self.embed_head.embed_weight)
        return self

    # -- learning --

    def states(self, batch: Batch) -> Iterator[HeadOutput]:
        """One guess per unrolled step, all `depth` of them while nothing is learned (training-time test, arXiv 2503.01840)."""
        from transformers import DynamicCache

        count = min(self.config.steps, self.depth) if self.training else self.depth
        cache = DynamicCache() if count > 1 else None
        embedded, states = self.embed(batch.tokens), self.project_taps(batch.features)
        positions = torch.arange(batch.tokens.shape[1], device=states.device)
        for step in range(count):
            read = self.layer_input(states, next_embeddings(embedded, step + 1))
            states = self.next_state(unrolled(self.block, read, step, positions + step, cache))
            yield HeadOutput(states, self.output_head(step))

    # -- drafting --

    def encode(self, kept: Kept) -> Tensor:
        states = self.project_taps(super().encode(kept))
        read = self.layer_input(states, self.embed(kept.nexts))
        return self.next_state(self.memories[0].extend(read, kept.positions, kept.seats, kept.lengths))

    @torch.inference_mode()
    def propose(self, rows: Rows) -> Drafts:
        rows = self._within_context(rows)
        if not rows.drafting:
            return Drafts.none(self.device)
        expansion = _Expansion(self, rows)
        return grow(rows, expansion.logits(), expansion.expand, self.ids, calibration=self.calibration, deepest=self.depth)

    def _within_context(self, rows: Rows) -> Rows:
        """The same round; rows are drafted only as deep as their positions go. The deepest guess is never read."""
        if (most := self.config.context) is None:
            return rows
        left = [1 + most - self.memories[0].length(seat) for seat in rows.seats]
        return replace(rows, depths=tuple(max(0, min(pair)) for pair in zip(rows.depths, left, strict=True)))

    def fork(self, source: int, seat: int, length: int) -> None:
        self.memories[0].fork(source, seat, length)


class _Expansion(Expansion):
    """One round. states: what the decoder hands on of each node."""

    def __init__(self, drafter: Recurrent, rows: Rows) -> None:
        super().__init__(rows, [drafter.drafting(rows)[:, None]])
        self.drafter = drafter

    def logits(self) -> Tensor:
        return self.drafter.output_head(self.depth)(self.states[0].flatten(0, 1))

    def run(self, level: Level, parents: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs = self.drafter.layer_input(parents[0], self.drafter.embed(level.tokens))
        memory = self.drafter.memories[0]
        return [self.drafter.next_state(self.read(level, memory, inputs, self.positions(level, memory)))]
