"""Whether two answers to one request are the same, and how near a tie it was where they part.

Speculation regroups the arithmetic of a forward, so in fp32 or bf16 a score may move by a rounding; where two tokens are as good
as tied, that decides. This file tells such a flip from a bug: the scores at the first difference are computed again, the plain
way. It refuses to know how the answers came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.speculation.distribution import History, SamplingTensors
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import NO_DRAFTS
from headstart.speculation.rows import Paths, Rows
from headstart.speculation.tree import Drafts, merge
from headstart.target.cache import Seating
from headstart.target.target import Target

NEAR_TIE = 1e-4  # in fp32
# Coarser types: logits of 8 to 16 lie 1/16 (bf16) or 1/128 (fp16) apart, and either of two may move by that much.
_COARSE_TIES = {torch.bfloat16: 0.125, torch.float16: 0.016}


@dataclass(frozen=True)
class Split:
    """Where two answers part. place: index of the first different token; tokens: what either says there, None past its end;
    gap: the smallest change of scores or chances that makes both tokens possible, infinite where one answer just ends.
    tolerance: the gap that a rounding of the target's precision explains."""

    place: int
    tokens: tuple[int | None, int | None]
    gap: float
    tolerance: float = NEAR_TIE

    @property
    def is_near_tie(self) -> bool:
        return self.gap < self.tolerance

    def __str__(self) -> str:
        return f"token {self.place}: {self.tokens[0]} or {self.tokens[1]}, gap {self.gap:.2g}"


def find_split(
    target: Target, prompt: Sequence[int], params: SamplingParams, expected: Sequence[int], found: Sequence[int]
) -> Split | None:
    """The first difference between two answers to a prompt, or None if there is none. `params.seed` is the seed both used."""
    if list(expected) == list(found):
        return None
    place = next((at for at, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found)))
    mine, other = (answer[place] if place < len(answer) else None for answer in (expected, found))
    if mine is None or other is None:
        return Split(place, (mine, other), torch.inf)
    gap = tie_gap(target, prompt, params, expected[:place], (mine, other))
    return Split(place, (mine, other), gap, _COARSE_TIES.get(target.dtype, NEAR_TIE))


def tie_gap(target: Target, prompt: Sequence[int], params: SamplingParams, common: Sequence[int], tokens: tuple[int, int]) -> float:
    """How far the decision after prompt and `common` is from letting either of two tokens win: 0 is a perfect tie.

    The text is scored again in one plain forward. A token wins if it is inside the truncated law and no other token inside
    scores more (logit plus temperature times noise); the gap is the larger of what the two tokens are short of that.
    """
    assert params.seed is not None, "a drawn seed must be known to be repeated"
    scores, borders = _decision(target, [*prompt, *common], len(prompt), params)
    inside = borders > 0
    return max(_shortfall(scores, borders, inside, token) for token in tokens)


def _shortfall(scores: Tensor, borders: Tensor, inside: Tensor, token: int) -> float:
    """What a token is short of winning: of being inside, and of beating or seeing outside each token that scores more."""
    rivals = inside & (scores > scores[token])
    obstacles = torch.minimum(scores - scores[token], borders)[rivals]
    entry = max(0.0, -float(borders[token]))
    return max(entry, float(obstacles.amax()) if len(obstacles) else 0.0)


def _decision(target: Target, text: Sequence[int], num_prompt: int, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Scores [vocab] of the next token, and how far each token is inside the truncated law (negative: outside) [vocab]."""
    sampling = SamplingTensors.of([params], [params.seed or 0], target.device)
    history = History(1, target.vocab, target.device)
    history.start(0, text[:num_prompt], text[num_prompt:])
    rows = Rows((0,), (text[-1],), (len(text) - 1,), (0,), NO_DRAFTS, sampling, target.vocab, history=history)
    paths = Paths(torch.zeros(1, dtype=torch.int64, device=target.device), sampling.seeds.new_empty(1, 0), sampling.seeds)
    logits = rows.adjust(_next_logits(target, text), paths)
    scores = logits.double() + params.temperature * rows.noise(1).double()
    if params.temperature == 0:
        return scores[0], torch.full_like(scores[0], torch.inf)
    return scores[0], _borders(logits[0].double(), params)


def _next_logits(target: Target, text: Sequence[int]) -> Tensor:
    """[1, vocab] after a text, in one forward over an empty cache."""
    seating = Seating(1, len(text) + 2)
    cache, seat = target.new_cache(seating), seating.take(len(text) + 2)
    assert seat is not None
    forest = merge([text], [0], [True], Drafts.none(target.device), target.min_nodes)
    return target.score(forest, cache, [seat]).logits[:1]


def _borders(logits: Tensor, params: SamplingParams) -> Tensor:
    """[vocab] how far each token is inside top-k (in logits), top-p and min-p (in chances); negative: outside."""
    order = logits.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    sorted_logits, border = logits[order], torch.full_like(logits, torch.inf)
    k = params.top_k or len(order)
    if k < len(order):
        border = torch.where(rank < k, logits - sorted_logits[k], logits - sorted_logits[k - 1])
    chances = torch.softmax(torch.where(rank < k, logits / params.temperature, -torch.inf), -1)
    if params.top_p is not None and params.top_p < 1:
        before = (chances[order].cumsum(0) - chances[order])[rank]
        border = torch.minimum(border, params.top_p - before)
    if params.min_p:
        border = torch.minimum(border, chances - params.min_p * chances.max())
    return border
