"""Multi-token prediction with parallel heads (Gloeckle et al. 2024, arXiv 2404.19737): one decoder layer per guess on one trunk.

The target's last layer is the head of the next token. Each head here is one more such layer, which reads what the last layer reads
and predicts, through its own norm and the target's LM head, a later token. No head knows the guesses of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.drafters.parts.decoder import decoder
from headstart.drafters.parts.decoder_heads import DecoderHeads
from headstart.drafters.parts.drafter_loss import loss_by_depth
from headstart.drafters.parts.grow import compose
from headstart.drafters.parts.llama_layer import llama_block
from headstart.drafters.parts.losses import Batch, HeadOutput, Objective
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept


class ParallelConfig(BaseModel):
    """Settings of parallel MTP heads.

    num_heads: number of heads, without the target's own; the paper's n is one more.
    block: configuration of a head's decoder layer, as transformers has it; None: a layer like the target's last one.
    tap: the target layer whose output the heads read; by default the last but one, whose output the last layer reads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_heads: int = Field(default=3, ge=1, le=64)
    block: dict[str, Any] | None = None
    tap: int = -2


class ParallelMtp(DecoderHeads):
    """Drafts with parallel decoder layers."""

    name = "mtp-parallel"
    config_type = ParallelConfig

    def __init__(self, config: ParallelConfig, hidden: int, vocab: int) -> None:
        block = config.block or llama_block(hidden)
        super().__init__(config.model_copy(update={"block": block}), hidden, vocab)
        self.taps = (config.tap,)
        self.heads = nn.ModuleList(decoder(block, hidden) for _ in range(config.num_heads))

    @property
    def decoders(self) -> Sequence[Any]:
        return [self.head(depth) for depth in range(self.depth)]

    def states(self, batch: Batch) -> Iterator[HeadOutput]:
        for depth in range(self.depth):
            out = self.head(depth)(inputs_embeds=batch.features, use_cache=False)
            yield HeadOutput(out.last_hidden_state, self.output_head(depth))

    def parts(self, batch: Batch, objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
        """One part per head."""
        for loss, column in loss_by_depth(self.states(batch), batch, objective, self.embed_head.logits):
            yield loss, column[:, None]

    def encode(self, kept: Kept) -> Tensor:
        """[kept, heads * hidden] each head's state of each kept token."""
        features = super().encode(kept)
        return torch.cat([memory.extend(features, kept.positions, kept.seats, kept.lengths) for memory in self.memories], -1)

    @torch.inference_mode()
    def propose(self, rows: Rows) -> Drafts:
        states = self.root_states(rows).unflatten(-1, (self.depth, self.hidden))
        logits = [self.embed_head.logits(states[:, depth]) for depth in range(min(self.depth, rows.max_depth))]
        return compose(rows, logits, self.calibration)

    def fork(self, source: int, seat: int, length: int) -> None:
        for memory in self.memories:
            memory.fork(source, seat, length)
