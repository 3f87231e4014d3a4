"""Whether two answers to one request are identical, and if not, whether a near tie explains the first difference.

Speculative decoding groups the arithmetic of a forward differently, so a logit may differ by a rounding error; where two tokens are
nearly tied, that changes the token. To tell this from a bug, plain decoding computes the logits at the first difference again.
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
# In bf16, logits of 8 to 16 are 1/16 apart, in fp16 1/128; both logits may be off by one step.
_COARSE_TIES = {torch.bfloat16: 0.125, torch.float16: 0.016}


@dataclass(frozen=True)
class Split:
    """The first difference of two answers.

    index: of the first different token.
    tokens: the token of either answer there, None past its end.
    gap: the smallest change of scores or probabilities that makes both tokens possible; infinite where one answer ends.
    tolerance: the gap that rounding in the target's precision explains.
    """

    index: int
    tokens: tuple[int | None, int | None]
    gap: float
    tolerance: float = NEAR_TIE

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding explains the difference."""
        return self.gap < self.tolerance

    def __str__(self) -> str:
        return f"token {self.index}: {self.tokens[0]} or {self.tokens[1]}, gap {self.gap:.2g}"


def find_split(
    target: Target, prompt: Sequence[int], params: SamplingParams, expected: Sequence[int], actual: Sequence[int]
) -> Split | None:
    """The first difference between two answers to a prompt, or None. `params.seed` is the seed of both."""
    if list(expected) == list(actual):
        return None
    pairs = enumerate(zip(expected, actual, strict=False))
    index = next((index for index, (a, b) in pairs if a != b), min(len(expected), len(actual)))
    one, other = (answer[index] if index < len(answer) else None for answer in (expected, actual))
    if one is None or other is None:
        return Split(index, (one, other), torch.inf)
    gap = tie_gap(target, prompt, params, expected[:index], (one, other))
    return Split(index, (one, other), gap, _COARSE_TIES.get(target.dtype, NEAR_TIE))


def tie_gap(target: Target, prompt: Sequence[int], params: SamplingParams, common: Sequence[int], tokens: tuple[int, int]) -> float:
    """How far the choice of a token after prompt and `common` is from a tie of two tokens: 0 is a perfect tie.

    The text is scored again in one plain forward. A token is chosen if it is inside the truncated distribution and no other token
    inside has a higher score (logit plus temperature times noise). The gap is the larger of the two tokens' distances from that.
    """
    assert params.seed is not None, "a drawn seed must be known to be repeated"
    scores, borders = _decision(target, [*prompt, *common], len(prompt), params)
    inside = borders > 0
    return max(_shortfall(scores, borders, inside, token) for token in tokens)


def _shortfall(scores: Tensor, borders: Tensor, inside: Tensor, token: int) -> float:
    """How far a token is from being chosen: from being inside, and from every higher score being lower or outside."""
    higher = inside & (scores > scores[token])
    distances = torch.minimum(scores - scores[token], borders)[higher]
    entry = max(0.0, -float(borders[token]))
    return max(entry, float(distances.amax()) if len(distances) else 0.0)


def _decision(target: Target, text: Sequence[int], num_prompt: int, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Scores [vocab] of the next token, and how far each is inside the truncated distribution (negative: outside) [vocab]."""
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
    """Logits [1, vocab] after a text, in one forward over an empty KV cache."""
    seating = Seating(1, len(text) + 2)
    cache, seat = target.new_cache(seating), seating.take(len(text) + 2)
    assert seat is not None
    forest = merge([text], [0], [True], Drafts.none(target.device), target.min_nodes)
    return target.score(forest, cache, [seat]).logits[:1]


def _borders(logits: Tensor, params: SamplingParams) -> Tensor:
    """How far each token is inside top-k (in logits), top-p and min-p (in probabilities), [vocab]; negative: outside."""
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
