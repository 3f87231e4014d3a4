"""The loss module of a frozen target: only the drafter is trained.

A loss module is a `torch.nn.Module` whose `forward(texts, progress) -> (loss, Metrics)` sums over positions, whose parameters are
all that is trained and saved, and whose `groups` are the parameter groups of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from headstart.drafters.parts.losses import Batch, Metrics, Objective
from headstart.training.dataset import TextBatch

Source = Callable[[TextBatch], Batch]


class FrozenTarget(nn.Module):
    """A loss module that trains a drafter on a frozen target.

    drafter: heads, bound to the target.
    objective: weights of the losses.
    source: texts -> features and last hidden states of the target; it has no parameters of its own.
    """

    def __init__(self, drafter: Any, objective: Objective, source: Source) -> None:
        super().__init__()
        self.drafter = drafter
        self.objective = objective
        self.source = source

    def forward(self, texts: TextBatch, progress: float = 0.0) -> tuple[Tensor, Metrics]:
        """The summed loss, a scalar, and metrics. progress: share of the run that is done; this loss does not depend on it."""
        summed: tuple[Tensor, Metrics] = self.drafter.loss(self.source(texts), self.objective)
        return summed

    def groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer, with `peak`, the learning rate at the end of the warm-up."""
        return parameter_groups(self.drafter.parameters(), learning_rate, weight_decay)


def parameter_groups(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with weight decay, biases and norms without."""
    trained = [weight for weight in parameters if weight.requires_grad]
    matrices, vectors = [w for w in trained if w.dim() > 1], [w for w in trained if w.dim() <= 1]
    groups = [(matrices, weight_decay), (vectors, 0.0)]
    return [
        {"params": members, "weight_decay": decay, "lr": learning_rate, "peak": learning_rate}
        for members, decay in groups
        if members
    ]
