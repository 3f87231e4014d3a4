"""What a step learns: a module from texts to a loss. Here the target is frozen and only the drafter learns.

A loss_module is a `torch.nn.Module` whose `forward(texts) -> (loss, Metrics)` sums over positions, whose parameters are all that is
trained and saved, and whose `groups` say how. This file knows lessons. It refuses to know methods, steps and files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from headstart.drafters.parts.losses import Batch, Metrics, Objective
from headstart.training.dataset import TextBatch

Source = Callable[[TextBatch], Batch]


class FrozenTarget(nn.Module):
    """The drafter learns from a target that stays as it is. source: what the target makes of texts, no parameters of its own."""

    def __init__(self, drafter: Any, objective: Objective, source: Source) -> None:
        super().__init__()
        self.drafter = drafter
        self.objective = objective
        self.source = source

    def forward(self, texts: TextBatch) -> tuple[Tensor, Metrics]:
        """The summed loss, a scalar, and metrics."""
        found: tuple[Tensor, Metrics] = self.drafter.loss(self.source(texts), self.objective)
        return found

    def groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters for the optimiser, with `peak`, the learning rate at the end of the warm-up."""
        return decaying(self.drafter.parameters(), learning_rate, weight_decay)


def decaying(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and biases and norms, which do not."""
    learned = [weight for weight in parameters if weight.requires_grad]
    matrices, vectors = [w for w in learned if w.dim() > 1], [w for w in learned if w.dim() <= 1]
    groups = [(matrices, weight_decay), (vectors, 0.0)]
    return [
        {"params": members, "weight_decay": decay, "lr": learning_rate, "peak": learning_rate}
        for members, decay in groups
        if members
    ]
