"""The loss module of pretraining: a trunk and its heads are trained together from the first step.

    loss = CE(next token) + weight(progress) * sum over heads of (sum_d decay^(d-1) CE(token d + 1 ahead) / sum_d decay^(d-1))

Gradients of the heads reach the trunk through the hidden states they read, with the memory of one head
(`headstart.drafters.parts.drafter_loss.backward_by_part`). The module must not import methods or the training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.drafters.parts.drafter_loss import backward_by_part, chunked_loss
from headstart.drafters.parts.heads import Heads
from headstart.drafters.parts.losses import Metrics, Objective, OutputHead
from headstart.target.embed_head import EmbedHead
from headstart.target.hidden_states import hidden_states
from headstart.training.dataset import TextBatch
from headstart.training.features import as_batch, layers
from headstart.training.frozen_target import parameter_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEXT = Objective(hard=1.0)


class PretrainLoss(nn.Module):
    """A loss module that trains a trunk and its heads.

    trunk: a causal LM.
    heads: by method, bound to the trunk.
    weight: progress of the run, in [0, 1] -> weight of the heads' losses.
    decay: weight of each depth over that of the one before.

    Metrics have a column for the next token, then one for every depth of each method's heads, in order.
    """

    def __init__(self, trunk: PreTrainedModel, heads: Mapping[str, Heads], weight: Callable[[float], float], decay: float) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)
        self.weight = weight
        self.objective = Objective(hard=1.0, decay=decay)
        self._embed_head = EmbedHead(trunk)
        self._num_layers = int(trunk.config.get_text_config().num_hidden_layers)
        taps = {tap for member in heads.values() for tap in member.taps}
        self._layers = layers(sorted(taps), self._num_layers)
        embed_and_head = trunk.get_input_embeddings(), trunk.get_output_embeddings()
        self._shared = [weight for layer in embed_and_head for weight in layer.parameters()]  # trained by the heads' losses, too

    def forward(self, texts: TextBatch, progress: float = 0.0) -> tuple[Tensor, Metrics]:
        """The summed loss, a scalar, and metrics. progress: share of the run that is done, in [0, 1]."""
        texts = texts.to(next(self.parameters()).device)
        states = hidden_states(self.trunk, texts.tokens, self._layers)
        total, column = self._trunk_loss(texts, states[self._num_layers - 1])
        weight, stacked = self.weight(progress), [column]
        for drafter in self.heads.values():
            loss, metrics = self._heads_loss(drafter, texts, states)
            total = total + weight * loss
            stacked.append(metrics.stacked())
        return total, Metrics.of(torch.cat(stacked, 1))

    def _trunk_loss(self, texts: TextBatch, last_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the next token, a scalar, and its column of the metrics, [4, 1]."""
        where = texts.loss_mask[:, 1:].nonzero(as_tuple=True)
        tokens = texts.tokens[where[0], where[1] + 1]
        output_head = OutputHead(self._embed_head.logits, self._embed_head.parameters)
        loss, hits = chunked_loss(output_head, last_hidden[where], tokens, None, NEXT, self._embed_head.logits)
        right = hits.sum().float()
        return loss, torch.stack([loss.detach(), torch.tensor(float(len(tokens))).to(right), right, right])[:, None]

    def _heads_loss(self, drafter: Any, texts: TextBatch, states: dict[int, Tensor]) -> tuple[Tensor, Metrics]:
        """The loss of one method's heads, averaged over depths with the weights of `decay`, and its metrics."""
        batch = as_batch(texts, states, [tap % self._num_layers for tap in drafter.taps])
        weights = [*drafter.parameters(), *self._shared]
        loss, metrics = backward_by_part(
            lambda features: drafter.parts(replace(batch, features=features), self.objective), batch.features, weights
        )
        return loss / sum(self.objective.decay**depth for depth in range(drafter.depth)), metrics

    def summarize_metrics(self, metrics: Metrics, loss: float, prefix: str) -> dict[str, Any]:
        """The values of the log: loss and top-1 of the next token; top-1 by depth and tau of a chain for each method's heads."""
        stacked = metrics.stacked()
        values: dict[str, Any] = {f"{prefix}loss": float(stacked[0, 0] / stacked[1, 0].clamp(min=1))}
        values[f"{prefix}next_top1"] = round(float(metrics.top1[0]), 5)
        first = 1
        for name, drafter in self.heads.items():
            depth = int(drafter.depth)  # type: ignore[arg-type]
            of_heads = Metrics.of(stacked[:, first : first + depth])
            values[f"{prefix}{name}_top1"] = [round(share, 5) for share in of_heads.top1.tolist()]
            values[f"{prefix}{name}_tau"] = round(float(of_heads.tau), 4)
            first += depth
        return values

    def groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for one optimizer of all parameters."""
        return parameter_groups(self.parameters(), learning_rate, weight_decay)

    def split(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The matrices inside layers, which Muon trains, and all other parameters."""
        shared = {id(weight) for weight in self._shared}
        matrices = [weight for weight in self.parameters() if weight.dim() == 2 and id(weight) not in shared]
        ids = {id(weight) for weight in matrices}
        return matrices, [weight for weight in self.parameters() if id(weight) not in ids]
