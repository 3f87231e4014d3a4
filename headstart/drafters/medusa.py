"""Medusa (Cai et al. 2024, arXiv 2401.10774): heads that guess the tokens after the root in parallel, from one hidden state.

Head d reads the target's last hidden state h_t, whose logits gave the root x_{t+1}, and guesses x_{t+1+d} without the tokens
between. All paths of a tree share the heads' logits, so one choice per depth is enough.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from headstart.drafters.parts.grow import compose
from headstart.drafters.parts.heads import Block, Heads, HeadsConfig
from headstart.drafters.parts.losses import Batch, HeadOutput
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts


class MedusaConfig(HeadsConfig):
    """Settings of Medusa heads; published ones have 5 heads (trees use 4) of 1 layer, with their own LM heads."""


class Head(nn.Module):
    """`num_layers` residual blocks, and an LM head (`projection`) unless that is shared."""

    def __init__(self, config: MedusaConfig, hidden: int, vocab: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(hidden) for _ in range(config.num_layers)))
        if config.projection == "own":
            self.projection = nn.Linear(hidden, vocab, bias=False)


class Medusa(Heads):
    """Drafts with parallel heads."""

    name = "medusa"
    config_type = MedusaConfig

    def __init__(self, config: MedusaConfig, hidden: int, vocab: int) -> None:
        super().__init__(config, hidden, vocab)
        self.heads = nn.ModuleList(Head(config, hidden, vocab) for _ in range(config.num_heads))

    def states(self, batch: Batch) -> Iterator[HeadOutput]:
        for depth in range(self.depth):
            yield HeadOutput(self.head(depth).blocks(batch.features), self.output_head(depth))

    @torch.inference_mode()
    def propose(self, rows: Rows) -> Drafts:
        states = self.root_states(rows)
        logits = [self._logits(states, depth) for depth in range(min(self.depth, rows.max_depth))]
        return compose(rows, logits, self.calibration)

    def _logits(self, states: Tensor, depth: int) -> Tensor:
        """[rows, hidden] -> [rows, vocab]."""
        logits: Tensor = self.output_head(depth)(self.head(depth).blocks(states))
        return logits
