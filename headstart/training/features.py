"""Features (tapped hidden states) of the target for texts, computed with the model as they are needed.

The module must not import drafters or the training loop; `feature_store` reads features that were computed before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from headstart.drafters.parts.losses import Batch
from headstart.target.hidden_states import hidden_states
from headstart.training.dataset import PAD, TextBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 16  # lengths are padded to a multiple of it: kernels then give a text the same bits in every batch (measured on CPUs)


class Online:
    """Computes features and last hidden states with the model and its own attention.

    model: the target; it is frozen here.
    taps: layers that a drafter reads, as `Target.score` counts them.
    """

    def __init__(self, model: PreTrainedModel, taps: Sequence[int]) -> None:
        self.model = model.eval().requires_grad_(False)
        num_layers = int(model.config.get_text_config().num_hidden_layers)
        self.layers = layers(taps, num_layers)
        self._taps = [tap % num_layers for tap in taps]

    def __call__(self, texts: TextBatch) -> Batch:
        """The batch of a loss, on the model's device."""
        texts = texts.to(self.model.device)
        return as_batch(texts, self.states(texts.tokens), self._taps)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> dict[int, Tensor]:
        """[rows, length] -> the output of each tapped layer and of the last, which is normed, each [rows, length, hidden]."""
        length = tokens.shape[1]
        padded = functional.pad(tokens, (0, self._padded(length) - length), value=PAD)
        with torch.autocast(tokens.device.type, enabled=False):
            states = hidden_states(self.model, padded, self.layers)
        return {layer: state[:, :length] for layer, state in states.items()}

    def _padded(self, length: int) -> int:
        """A length in whole blocks, where the model's context has room for them."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        padded = -(-length // BLOCK) * BLOCK
        return length if context is not None and padded > context else padded


def layers(taps: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The tapped layers and the last, ascending, each once. Raises ValueError if the target has too few layers."""
    if missing := [tap for tap in taps if not -num_layers <= tap < num_layers]:
        raise ValueError(
            f"these heads read layer {missing[0]}, and the target has {num_layers}; choose another method, or more layers"
        )
    return tuple(sorted({*(tap % num_layers for tap in taps), num_layers - 1}))


def as_batch(texts: TextBatch, states: dict[int, Tensor], taps: Sequence[int]) -> Batch:
    """The batch of a loss.

    states: output of each layer in `layers`, [rows, length, hidden].
    taps: layers whose states are joined into features, [rows, length, taps * hidden].

    Features are float32, like the weights that are trained; last hidden states keep the dtype of the target.
    """
    last = states[max(states)]
    features = torch.cat([states[tap] for tap in taps], -1) if taps else last[..., :0]
    return Batch(texts.tokens, texts.loss_mask, features.float(), last)
