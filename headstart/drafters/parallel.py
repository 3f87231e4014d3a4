"""Multi-token prediction in parallel (Gloeckle et al. 2024, arXiv 2404.19737): one decoder layer per guess, all on one trunk.

The target's last layer is the head of the next token; head d beside it is one more such layer, which reads what the last layer
reads and says, through a norm of its own and the target's head, the token d places later. Guesses know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.drafters.grow import compose
from headstart.drafters.heads import Heads
from headstart.drafters.layers import Memory, block_of, decoder, llama_block, slot_bytes
from headstart.lessons import Batch, Guess, Objective, Voice, depths
from headstart.sampling import Rows
from headstart.tree import Drafts, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from headstart.cache import Seating
    from headstart.target import Target


class ParallelConfig(BaseModel):
    """num_heads: beside the target's own; the paper's n is one more. block: configuration of a head's decoder layer, as
    transformers has it; None for the target's own kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_heads: int = Field(default=3, ge=1, le=64)
    block: dict[str, Any] | None = None


class ParallelMtp(Heads):
    """Drafts with parallel layers."""

    name = "mtp-parallel"
    config_type = ParallelConfig
    taps = (-2,)
    joins_pretraining = True

    def __init__(self, config: ParallelConfig, hidden: int, vocab: int) -> None:
        block = config.block or llama_block(hidden)
        super().__init__(config.model_copy(update={"block": block}), hidden, vocab)
        self.heads = nn.ModuleList(decoder(block, hidden) for _ in range(config.num_heads))
        self._memories: list[Memory] = []  # one per head

    @classmethod
    def fitted(cls, config: ParallelConfig, target: PreTrainedConfig) -> ParallelConfig:
        return config if config.block else config.model_copy(update={"block": block_of(target)})

    @property
    def remembered(self) -> int:
        return self.hidden * self.depth

    def start(self) -> Self:
        return self

    def speech(self, depth: int) -> Voice:
        return Voice(self.ends.project, self.ends.parameters)

    def states(self, batch: Batch) -> Iterator[Guess]:
        for depth in range(self.depth):
            out = self.head(depth)(inputs_embeds=batch.features, use_cache=False)
            yield Guess(out.last_hidden_state, self.speech(depth))

    def parts(self, batch: Batch, objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
        """Head after head."""
        for loss, column in depths(self.states(batch), batch, objective, self.ends.project):
            yield loss, column[:, None]

    @property
    def slot_bytes(self) -> int:
        return sum(slot_bytes(self.head(depth)) for depth in range(self.depth))

    def attach(self, target: Target, seating: Seating) -> None:
        super().attach(target, seating)
        heads = map(self.head, range(self.depth))
        self._memories = [Memory(head, seating, target.device, target.dtype) for head in heads]

    def digest(self, kept: Kept) -> Tensor:
        """[kept, heads * hidden]: what each head makes of each kept token."""
        features = super().digest(kept)
        return torch.cat([memory.extend(features, kept.positions, kept.seats, kept.lengths) for memory in self._memories], -1)

    @torch.inference_mode()
    def propose(self, rows: Rows) -> Drafts:
        states = self.drafting(rows).unflatten(-1, (self.depth, self.hidden))
        logits = [self.ends.project(states[:, depth]) for depth in range(min(self.depth, rows.max_depth))]
        return compose(rows, logits, self.calibration)

    def fork(self, source: int, seat: int, length: int) -> None:
        for memory in self._memories:
            memory.fork(source, seat, length)

    def free(self, seat: int) -> None:
        for memory in self._memories:
            memory.free(seat)
