"""EAGLE (Li et al. 2024, arXiv 2401.15077): one decoder layer that predicts the target's next state, and the target's LM head.

EAGLE-2 (arXiv 2406.16858) is the same drafter with dynamic trees. The loss compares both the states and the distributions with the
target's. Training unrolls one step, with noise on the states in place of the drafter's own errors; `steps` unrolls more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from pydantic import Field
from torch import Tensor, nn

from headstart.drafters.parts.decoder import decoder
from headstart.drafters.parts.drafter_loss import drafter_loss
from headstart.drafters.parts.llama_layer import without_norms
from headstart.drafters.parts.losses import Batch, HeadOutput, Metrics, Objective
from headstart.drafters.parts.recurrent import Recurrent, RecurrentConfig
from headstart.target.steps import Steps


class EagleConfig(RecurrentConfig):
    """Settings of EAGLE, besides those of all drafters that read their own output.

    bias: the projection has one, as some published ones do.
    noise: half the width of the uniform noise on the target's states in training.
    regression: weight of the smooth L1 distance between its states and the target's, relative to the `Objective`; published: 1,
        with 0.1 for the distributions.
    """

    bias: bool = False
    noise: float = Field(default=0.1, ge=0)
    regression: float = Field(default=10.0, ge=0)


class Eagle(Recurrent):
    """Drafts with a decoder layer that predicts the target's states and reads its predictions."""

    name = "eagle"
    config_type = EagleConfig

    def __init__(self, config: EagleConfig, hidden: int, vocab: int) -> None:
        super().__init__(config, hidden, vocab)
        self.fc = nn.Linear(2 * hidden, hidden, bias=config.bias)
        self.block = without_norms(decoder(self.config.block, hidden))

    def init_from_target(self) -> Self:
        """Initialise the projection so that it passes the state on: the first guesses are then close to the target's."""
        with torch.no_grad():
            self.fc.weight[:, self.hidden :] = torch.eye(self.hidden)
        return super().init_from_target()

    def project_taps(self, features: Tensor) -> Tensor:
        if not (self.training and self.config.noise):
            return features
        noise = 2 * torch.rand_like(features) - 1
        return features + float(self.config.noise) * noise

    def layer_input(self, states: Tensor, embedded: Tensor) -> Tensor:
        """The projection of [embedding, state]."""
        projected: Tensor = self.fc(torch.cat([embedded, states], -1))
        return projected

    def record_input(self, steps: Steps, states: int, embedded: int) -> Sequence[int]:
        return [steps.linear(self.fc, steps.join(embedded, states))]

    def loss(self, batch: Batch, objective: Objective) -> tuple[Tensor, Metrics]:
        """The loss of all heads, plus the distance of its states to the target's that they predict."""
        outputs = list(self.states(batch))
        loss, metrics = drafter_loss(iter(outputs), batch, objective, self.embed_head.logits)
        return loss + self.config.regression * torch.stack([*_distances(outputs, batch, objective.decay)]).sum(), metrics


def _distances(outputs: Sequence[HeadOutput], batch: Batch, decay: float) -> Iterator[Tensor]:
    """Yields for each depth the smooth L1 distance of its states, a scalar with the depth's weight.

    It is the mean over a state, summed over the positions that count.
    """
    for depth, output in enumerate(outputs, 1):
        rows, positions = batch.counted(depth).nonzero(as_tuple=True)
        # Detached, as the target may be trained in the same run.
        actual, expected = output.states[rows, positions], batch.last_hidden[rows, positions + depth].detach()
        distance = nn.functional.smooth_l1_loss(actual.float(), expected.float(), reduction="none")
        yield decay ** (depth - 1) * distance.mean(-1).sum()
