"""What a drafter learns from, and by which loss: batches, objectives, and losses that never hold all logits at once.

At a position t of a text, the drafter knows the features up to t and the root, token t+1; what it guesses at depth d is token
t+1+d. Losses are sums over positions, so that a step may be split over batches and processes in any way.
This file knows positions and laws. It refuses to know drafters, targets and optimisers.
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
    """Texts and what the target made of them.

    tokens: [rows, length] int64, padded on the right. loss_mask: [rows, length] bool, the tokens that an assistant said: neither
    prompt nor padding. features: [rows, length, taps * hidden], what the drafter reads. last_hidden: [rows, length, hidden], the
    target's final, normed states: the teacher's logits are their projection.
    """

    tokens: Tensor
    loss_mask: Tensor
    features: Tensor
    last_hidden: Tensor

    def counted(self, depth: int) -> Tensor:
        """[rows, length] bool: positions t at which a guess of this depth counts: the root and all guesses are an assistant's."""
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
    """How much each loss weighs, and how much less each deeper guess counts.

    Where a drafter's vocabulary is reduced, all sums are over the tokens that it has, with the teacher's own masses: a position
    counts by the mass that its distribution has there (EAGLE-3 renormalises, and leaves out those whose best token is not among
    them).
    hard: cross-entropy with the text's own token. soft: with the teacher's distribution (KL but for a constant), which is all
    there is where
    no loss is given a weight. tv: total variation,
    1 - alpha, where alpha = sum(min(p, q)) is the chance that a drawn guess is accepted. alpha: -log alpha. lk: KL and tv mixed
    by exp(-3 alpha), KL first and acceptance later (LK losses, arXiv 2602.23881). decay: weight of each depth over that of the
    one before. temperature: of both laws, in all but `hard`.
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
    def _is_soft(cls, given: Any) -> Any:
        """A teacher's distribution says more per token than its token: heads learn in half the steps (docs/log.md)."""
        return given if not isinstance(given, dict) or LOSSES & given.keys() else {**given, "soft": 1.0}

    @model_validator(mode="after")
    def _has_a_loss(self) -> Objective:
        if not self.hard + self.has_teacher:
            raise ValueError("every loss has weight 0; give one of hard, soft, tv, alpha, lk a positive weight")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether the target's own laws are needed."""
        return self.soft + self.tv + self.alpha + self.lk > 0

    def __call__(self, logits: Tensor, tokens: Tensor, teacher_logits: Tensor | None, ids: Tensor | None = None) -> Tensor:
        """Loss of each position, [n]. logits: [n, vocab], or [n, len(ids)] with `ids` the ascending target ids of its columns;
        teacher_logits: [n, vocab], may be None without a teacher; tokens: [n] int64."""
        loss = logits.new_zeros(logits.shape[0], dtype=torch.float32)
        if self.hard:
            loss = loss + self.hard * F.cross_entropy(logits.float(), columns(tokens, ids), reduction="none", ignore_index=NONE)
        if not self.has_teacher:
            return loss
        assert teacher_logits is not None, "this objective needs a teacher"
        own = torch.log_softmax(self._tempered(logits), -1)
        distribution = torch.softmax(self._tempered(teacher_logits), -1)
        distribution = distribution if ids is None else distribution[:, ids]
        if self.soft:
            loss = loss - self.soft * (distribution * own).sum(-1)
        if self.tv + self.alpha + self.lk:
            alpha = torch.minimum(own.exp(), distribution).sum(-1)
            loss = loss + self.tv * (1 - alpha)
            if self.alpha:
                loss = loss - self.alpha * alpha.clamp(min=1e-6).log()
            if self.lk:
                share = torch.exp(-3 * alpha.detach())
                divergence = (torch.special.entr(distribution) * -1 - distribution * own).sum(-1)
                loss = loss + self.lk * (share * divergence + (1 - share) * (1 - alpha))
        return loss

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits.float() if self.temperature == 1 else logits.float() / self.temperature


NONE = -100  # cross_entropy's own mark of a token that does not count


def columns(tokens: Tensor, ids: Tensor | None) -> Tensor:
    """Where each token stands among ascending `ids`, or `NONE`. tokens: int64 of any shape; ids: None for all tokens."""
    if ids is None:
        return tokens
    places = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
    return torch.where(ids[places] == tokens, places, NONE)


@dataclass(frozen=True, eq=False)
class OutputHead:
    """From states to logits, [n, width] -> [n, vocab], and the weights on that way which may learn. ids: where the vocabulary is
    reduced, the ascending target ids of the logits' columns, [draft vocab]."""

    to_logits: Callable[[Tensor], Tensor]
    weights: Sequence[nn.Parameter] = ()
    ids: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        return self.to_logits(states)


class HeadOutput(NamedTuple):
    """What a drafter says at one depth, teacher-forced. states: [rows, length, width]; output_head: to [n, vocab]."""

    states: Tensor
    output_head: OutputHead


@dataclass(frozen=True, eq=False)
class Metrics:
    """Sums over positions, one entry per depth, on the device: they add up over batches and processes.

    losses: of the unweighted losses. counts: positions. hits: where the best guess was the token. runs: where it was so at this
    depth and all before. All [depth] float32.
    """

    losses: Tensor
    counts: Tensor
    hits: Tensor
    runs: Tensor

    @property
    def top1(self) -> Tensor:
        """[depth] share of positions at which the best guess was right, whatever happened before."""
        return self.hits / self.counts.clamp(min=1)

    @property
    def tau(self) -> Tensor:
        """Tokens per round, a scalar, that a chain of best guesses would give on this text."""
        return 1 + (self.runs / self.counts.clamp(min=1)).sum()

    def stacked(self) -> Tensor:
        """[4, depth], for one reduction."""
        return torch.stack([self.losses, self.counts, self.hits, self.runs])

    @classmethod
    def of(cls, stacked: Tensor) -> Metrics:
        """The inverse of `stacked`."""
        return cls(*stacked)

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics.of(self.stacked() + other.stacked())
