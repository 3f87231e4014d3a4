"""EAGLE (Li et al. 2024, arXiv 2401.15077): one decoder layer that guesses the target's next final state, and speaks by its head.

EAGLE-2 (arXiv 2406.16858) is the same head drafting with growing trees. It learns to be close to the state that the target will
have, and to say what that state says; teacher forcing is one step deep, with noise on the states in place of its own mistakes.
More `steps` unroll it on its own states.
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


class EagleConfig(RecurrentConfig):
    """bias: of the projection, which some published heads have. noise: half the width of the uniform noise on the target's states
    while it learns. regression: weight of the distance between its states and the target's, smooth L1, beside that of the losses
    of its laws; published are 1 and 0.1."""

    bias: bool = False
    noise: float = Field(default=0.1, ge=0)
    regression: float = Field(default=10.0, ge=0)


class Eagle(Recurrent):
    """Drafts with a layer that hands its guess of the target's state on."""

    name = "eagle"
    config_type = EagleConfig

    def __init__(self, config: EagleConfig, hidden: int, vocab: int) -> None:
        super().__init__(config, hidden, vocab)
        self.fc = nn.Linear(2 * hidden, hidden, bias=config.bias)
        self.block = without_norms(decoder(self.config.block, hidden))

    def init_from_target(self) -> Self:
        """It begins by handing the state on, so that it says at first what the target would."""
        with torch.no_grad():
            self.fc.weight[:, self.hidden :] = torch.eye(self.hidden)
        return super().init_from_target()

    def project_taps(self, features: Tensor) -> Tensor:
        if not (self.training and self.config.noise):
            return features
        noise = 2 * torch.rand_like(features) - 1
        return features + float(self.config.noise) * noise

    def layer_input(self, states: Tensor, embedded: Tensor) -> Tensor:
        """The embedding first."""
        read: Tensor = self.fc(torch.cat([embedded, states], -1))
        return read

    def loss(self, batch: Batch, objective: Objective) -> tuple[Tensor, Metrics]:
        """That of its laws, and the distance of its states to those that they stand for."""
        guesses = list(self.states(batch))
        loss, metrics = drafter_loss(iter(guesses), batch, objective, self.embed_head.logits)
        return loss + self.config.regression * torch.stack([*_distances(guesses, batch, objective.decay)]).sum(), metrics


def _distances(guesses: Sequence[HeadOutput], batch: Batch, decay: float) -> Iterator[Tensor]:
    """Smooth L1 of each guess, the mean over a state, summed over the positions that count, weighted as its law."""
    for depth, guess in enumerate(guesses, 1):
        rows, places = batch.counted(depth).nonzero(as_tuple=True)
        own, wanted = guess.states[rows, places], batch.last_hidden[rows, places + depth].detach()  # where the target learns, too
        apart = nn.functional.smooth_l1_loss(own.float(), wanted.float(), reduction="none")
        yield decay ** (depth - 1) * apart.mean(-1).sum()
