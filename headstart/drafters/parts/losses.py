"""What a drafter's loss is made of: batches of texts, the objective, output heads and metrics.

At position t, the drafter knows the features up to t and the root, token t+1; its guess at depth d is token t+1+d. Losses are sums
over positions, so a step may be split over batches and processes. Must not import a method, a target or an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

LOSSES = {"hard", "soft", "tv", "alpha", "lk"}
CHUNK = 256  # positions whose logits exist at once: 8 MiB of float32 at a vocabulary of 8k, 128 MiB at 128k


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts and the target's hidden states on them.

    tokens: [rows, length] int64, padded on the right.
    loss_mask: [rows, length] bool, the tokens that an assistant wrote: neither prompt nor padding.
    features: [rows, length, taps * hidden], the tapped hidden states, which the drafter reads.
    last_hidden: [rows, length, hidden], the last hidden states, normed: the teacher's logits are their projection.
    """

    tokens: Tensor
    loss_mask: Tensor
    features: Tensor
    last_hidden: Tensor

    def counted(self, depth: int) -> Tensor:
        """[rows, length] bool: positions at which a guess of this depth counts, since it, its root and all between are an
        assistant's."""
        length = self.tokens.shape[1]
        result = torch.zeros_like(self.loss_mask)
        if length > depth + 1:
            windows = self.loss_mask[:, 1:].unfold(1, depth + 1, 1)  # [rows, length - 1 - depth, depth + 1]
            result[:, : length - 1 - depth] = windows.all(-1)
        return result


def next_embeddings(embedded: Tensor, depth: int) -> Tensor:
    """The embeddings of the tokens `depth` places later, [rows, length, width] as `embedded` is.

    The last `depth` positions get those of the row's first tokens; they never count (`Batch.counted`).
    """
    return embedded.roll(-depth, 1)


class Objective(BaseModel):
    """The weight of each loss, and by how much deeper guesses count less. Without any weight: `soft` alone.

    Where a drafter's vocabulary is reduced, all sums are over the tokens that it has, with the teacher's own probabilities: a
    position counts by the probability that the teacher gives to these tokens (EAGLE-3 renormalises, and leaves out positions whose
    likeliest token is not among them).

    hard: cross-entropy with the text's own token.
    soft: cross-entropy with the teacher's distribution; the KL divergence, up to a constant.
    tv: total variation, 1 - alpha, where alpha = sum(min(p, q)) is the probability that a drawn guess is accepted.
    alpha: -log alpha.
    lk: KL divergence and total variation, mixed by exp(-3 alpha): KL first, acceptance later (LK losses, arXiv 2602.23881).
    decay: weight of each depth over that of the one before.
    temperature: softmax temperature of both distributions, in all losses except `hard`.

    Raises ValueError where every loss has weight 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hard: float = Field(default=0.0, ge=0)
    soft: float = Field(default=0.0, ge=0)
    tv: float = Field(default=0.0, ge=0)
    alpha: float = Field(default=0.0, ge=0)
    lk: float = Field(default=0.0, ge=0)
    decay: float = Field(default=1.0, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _is_soft(cls, settings: Any) -> Any:
        """With the teacher's distribution, heads need half the steps that they need with its token (docs/log.md)."""
        return settings if not isinstance(settings, dict) or LOSSES & settings.keys() else {**settings, "soft": 1.0}

    @model_validator(mode="after")
    def _has_a_loss(self) -> Objective:
        if not self.hard + self.has_teacher:
            raise ValueError("every loss has weight 0; give one of hard, soft, tv, alpha, lk a positive weight")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether the target's distributions are needed."""
        return self.soft + self.tv + self.alpha + self.lk > 0

    def __call__(self, logits: Tensor, tokens: Tensor, teacher_logits: Tensor | None, ids: Tensor | None = None) -> Tensor:
        """The loss of each position, [n] float32.

        logits: [n, vocab], or [n, draft vocab] with `ids`.
        tokens: [n] int64, the text's own.
        teacher_logits: [n, vocab]; None only where `has_teacher` is False.
        ids: [draft vocab] ascending target ids of the logits' columns; None: the vocabulary is the target's.
        """
        loss = logits.new_zeros(logits.shape[0], dtype=torch.float32)
        if self.hard:
            loss = loss + self.hard * F.cross_entropy(logits.float(), columns(tokens, ids), reduction="none", ignore_index=NONE)
        if not self.has_teacher:
            return loss
        assert teacher_logits is not None, "this objective needs a teacher"
        log_probs = torch.log_softmax(self._tempered(logits), -1)
        distribution = torch.softmax(self._tempered(teacher_logits), -1)
        distribution = distribution if ids is None else distribution[:, ids]
        if self.soft:
            loss = loss - self.soft * (distribution * log_probs).sum(-1)
        if self.tv + self.alpha + self.lk:
            alpha = torch.minimum(log_probs.exp(), distribution).sum(-1)
            loss = loss + self.tv * (1 - alpha)
            if self.alpha:
                loss = loss - self.alpha * alpha.clamp(min=1e-6).log()
            if self.lk:
                share = torch.exp(-3 * alpha.detach())
                divergence = (torch.special.entr(distribution) * -1 - distribution * log_probs).sum(-1)
                loss = loss + self.lk * (share * divergence + (1 - share) * (1 - alpha))
        return loss

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits.float() if self.temperature == 1 else logits.float() / self.temperature


NONE = -100  # cross_entropy's own mark of a token that does not count


def columns(tokens: Tensor, ids: Tensor | None) -> Tensor:
    """The index of each token in ascending `ids`, or `NONE` where it is not there.

    tokens: int64 of any shape.
    ids: None: the tokens themselves are returned.
    """
    if ids is None:
        return tokens
    indices = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
    return torch.where(ids[indices] == tokens, indices, NONE)


@dataclass(frozen=True, eq=False)
class OutputHead:
    """From a drafter's states to its logits, [n, width] -> [n, vocab].

    to_logits: computes them.
    weights: the parameters that `to_logits` uses and that may learn.
    ids: [draft vocab] ascending target ids of the logits' columns where the vocabulary is reduced; None: it is the target's.
    """

    to_logits: Callable[[Tensor], Tensor]
    weights: Sequence[nn.Parameter] = ()
    ids: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        return self.to_logits(states)


class HeadOutput(NamedTuple):
    """A drafter's output at one depth, teacher-forced.

    states: [rows, length, width].
    output_head: turns states into logits.
    """

    states: Tensor
    output_head: OutputHead


@dataclass(frozen=True, eq=False)
class Metrics:
    """Sums over positions, [depth] float32 each, on the device; they add up over batches and processes.

    losses: of the losses, without the weight of their depth.
    counts: number of positions.
    hits: number of positions at which the best guess was the token.
    runs: number of positions at which the best guesses of this depth and all before were the tokens.
    """

    losses: Tensor
    counts: Tensor
    hits: Tensor
    runs: Tensor

    @property
    def top1(self) -> Tensor:
        """[depth] top-1 accuracy: share of positions at which the best guess was right, whatever the guesses before."""
        return self.hits / self.counts.clamp(min=1)

    @property
    def tau(self) -> Tensor:
        """Acceptance length (tokens per target forward) of a chain of best guesses on these texts, a scalar."""
        return 1 + (self.runs / self.counts.clamp(min=1)).sum()

    def stacked(self) -> Tensor:
        """[4, depth] all fields in their order, for one reduction."""
        return torch.stack([self.losses, self.counts, self.hits, self.runs])

    @classmethod
    def of(cls, stacked: Tensor) -> Metrics:
        """The inverse of `stacked`."""
        return cls(*stacked)

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics.of(self.stacked() + other.stacked())
