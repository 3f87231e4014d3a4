"""The children that drafters' logits give with noise that is already known. Must not import models or drafters."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from headstart.speculation.distribution import SamplingTensors, Truncation


class Chooser(Protocol):
    """A way to choose children, such as `choose`."""

    def __call__(
        self,
        logits: Tensor,
        rows: Tensor,
        noise: Tensor | None,
        sampling: SamplingTensors,
        divisors: Tensor,
        k: int,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """The k children of each line with the highest score, which is logit + temperature * noise, and their chances.

        logits: [n, vocab], or [n, draft_vocab] with `ids`, of any floating dtype.
        rows: [n] int64, the row of each line.
        noise: [rows, vocab] float32; None: no noise.
        sampling: the settings of all rows.
        divisors: [rows] or [1], calibration temperature: a chance is a softmax of scores over it, 0 outside the truncation.
        ids: [draft_vocab] token of each column; None: the column itself.
        Returns tokens [n, k] int64, best first, and chances [n, k] float32. None where it cannot.
        """


def choose(
    logits: Tensor, rows: Tensor, noise: Tensor | None, sampling: SamplingTensors, divisors: Tensor, k: int, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A `Chooser` made of tensor operations, for every device; it leaves open which of equal scores comes first."""
    logits = widened(logits)
    own = sampling.rows(rows)
    scores = logits
    if noise is not None:
        noise = noise if len(noise) == 1 else noise[rows]  # a single row's broadcasts
        scores = torch.addcmul(logits, own.temperature[:, None], noise if ids is None else noise[:, ids])
    best = scores.topk(k, -1)
    divisor = (divisors if len(divisors) == 1 else divisors[rows])[:, None]
    # The same division in both terms: a chance that rounding puts above one would rank a child before its parent.
    chances = torch.exp(best.values / divisor - torch.logsumexp(scores / divisor, -1, keepdim=True))
    if sampling.is_truncated:
        is_inside = Truncation(logits, own).admits(best.indices)
        chances = chances * (is_inside | own.is_greedy[:, None])
    return best.indices if ids is None else ids[best.indices], chances.float()


def widened(logits: Tensor) -> Tensor:
    """The logits in float32 or wider."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
