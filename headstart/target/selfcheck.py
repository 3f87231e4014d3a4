"""The self-check of a target when it is loaded: a scored forest gives the logits that the model itself gives to sequential texts.

First, information may pass between tokens through causal attention only. Then the logits of a tree are compared with those of
the sequential texts under the model's own attention, and those of two rows, one beyond a sliding window, with those of each
alone. In half precision the tolerance is a multiple of the model's noise: how far its logits move when every embedding is off by
one rounding step. This module must not import `Target`; it uses the methods of the one that it gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.speculation.tree import Drafts, merge
from headstart.target.cache import Seating
from headstart.target.probing import changed_middle, convolutions, mixers, refusal, reversed_text

if TYPE_CHECKING:
    from headstart.target.target import Target

MAX_CHECK = 600  # tokens; a longer window is not exceeded by the check
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}  # largest difference allowed, in standard deviations of the logits
NOISES = 3.0  # in half precision, in units of the noise; a correct tree differs by less than 2, a wrong one mostly by more than 15
FEW_NOISES = 0.3  # where the same numbers are added in the same order, and only the batches of experts differ
MAX_TOLERANCE = 0.25  # standard deviations; the limit however large the noise is
ATTEMPTS = 3  # in half precision, where a near tie between experts can change an answer by itself
BEFORE = 8  # tokens before the branches whose logits must not change with them


def self_check(target: Target) -> None:
    """Check a target. Raises ValueError, naming the model and the reason, where it is not exact; then the target is released."""
    windows = [limit for window in target.windows for limit in (window.sliding, window.chunk) if limit is not None]
    beyond = min((limit + 5 for limit in windows), default=24)
    length = min(beyond if beyond <= MAX_CHECK else 24, target.context - 8)
    if length < 4:
        return
    if names := convolutions(target):
        _refuse(target, _beside_attention(names))
    attempts = 1 if target.dtype in TOLERANCE else ATTEMPTS
    problems = (_problem(target, length, seed) for seed in range(attempts))
    if all(problem is not None and (last := problem) for problem in problems):
        _refuse(target, last)


def _refuse(target: Target, reason: str) -> None:
    target.release()
    raise refusal(target, reason)


def _problem(target: Target, length: int, seed: int) -> str | None:
    """Why the model cannot be served exactly, by random texts of up to `length` tokens; None if nothing is wrong."""
    texts, branches = _draw(target, (length, max(3, length // 2)), seed)
    expected = [_own_logits(target, text, branches) for text in texts]
    noise = None if target.dtype in TOLERANCE else _noise(target, texts[1], branches[0], expected[1][0])
    same_order = TOLERANCE[target.dtype] if noise is None else FEW_NOISES * noise
    any_order = TOLERANCE[target.dtype] if noise is None else min(NOISES * noise, MAX_TOLERANCE)
    if not _gap(*changed_middle(target, seed)) <= same_order:  # written so that nan fails
        return _beside_attention(mixers(target, seed))
    if not _gap(*reversed_text(target, seed)) <= same_order:
        return "it counts the positions of tokens itself instead of reading position_ids, and in a tree these differ"
    before = [[logits[:-3] for logits in both] for both in expected]
    if not max(float(_gaps(*both).median()) for both in before) <= same_order:
        return "its attention sees later tokens too: the logits of a text change with the tokens that follow"
    for rows in ([0, 1], [0], [1]):
        actual = _tree_logits(target, [texts[row] for row in rows], branches)
        for row, logits in zip(rows, actual, strict=True):
            gap = _gap(torch.cat([expected[row][0][-3:], expected[row][1][-2:]]), logits)
            if not gap <= any_order:
                what = "two rows together" if len(rows) > 1 else "a tree"
                return (
                    f"{what} scored at once differs from the sequential text by {gap:.2g} standard deviations of its logits "
                    f"(allowed: {any_order:.2g})"
                )
    return None


def _beside_attention(names: list[str]) -> str:
    module = ", ".join(names) or "some module"
    state = "a state from token to token (recurrent or convolutional)"
    return f"beside its attention, {module} carries {state}, which a tree cannot share"


def holds_to_the_bit(target: Target) -> bool:
    """Whether the logits of the whole model, with its kernels, have the same bits in a forest and one token at a time.

    Compared are two rows, their prompts in one forward and a tree behind each, with each row alone, its prompt in two forwards and
    one branch.
    """
    length = min(24, target.context - 8)
    if length < 4:
        return True
    texts, branches = _draw(target, (length, max(3, length // 2)), 0)
    forest_logits = _tree_logits(target, texts, branches)
    for text, branch, logits, nodes in zip(texts, branches, forest_logits, ([0, 1, 2], [0, 3, 4]), strict=True):
        if not torch.equal(logits[nodes], _one_by_one(target, text, branch)):
            return False
    return True


def _draw(target: Target, sizes: tuple[int, ...], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random texts of these sizes, and two branches of two tokens that are drafted behind each."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[list[int]] = [torch.randint(0, target.vocab, (size,), generator=generator).tolist() for size in sizes]
    branches: list[list[int]] = torch.randint(0, target.vocab, (2, 2), generator=generator).tolist()
    branches[1][0] = (branches[0][0] + 1) % target.vocab  # siblings are distinct
    return texts, branches


def _one_by_one(target: Target, text: list[int], branch: list[int]) -> Tensor:
    """[1 + branch, vocab] logits of root and branch, one node per forward, behind a prompt that is read in two forwards."""
    seating = Seating(1, len(text) + len(branch) + 1)
    cache, seats = target.new_cache(seating), [seating.take(seating.num_slots) or 0]
    logits: list[Tensor] = []
    cut = (len(text) - 1) // 3
    for stem in (text[:cut], text[cut:-1], text[-1:], *([token] for token in branch)):
        if stem:
            forest = merge([stem], [cache.lengths[seats[0]]], [True], Drafts.none(target.device), target.min_nodes)
            logits.append(target.score(forest, cache, seats).logits[:1])
            cache.commit(seats, forest.stems, [()])
    return torch.cat(logits[-1 - len(branch) :])


def _own_logits(target: Target, text: list[int], branches: list[list[int]]) -> list[Tensor]:
    """For each branch behind the text, [before + 1 + 2, vocab] logits under the model's own attention.

    The rows are up to `BEFORE` tokens before the root, the root, and the two nodes of the branch.
    """
    first = max(0, len(text) - 1 - BEFORE)
    return [
        target.model(input_ids=torch.tensor([text + branch], device=target.device), use_cache=False).logits[0, first:]
        for branch in branches
    ]


def _noise(target: Target, text: list[int], branch: list[int], expected: Tensor) -> float:
    """How far the model's own logits move when every embedding is off by one rounding step: the median of the nodes' `_gaps`."""
    generator = torch.Generator().manual_seed(0)
    step = torch.finfo(target.dtype).eps

    def off_by_one(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        signs = torch.randint(0, 2, out.shape, generator=generator) * 2 - 1
        return out * (1 + step * signs.to(out))

    hook = target.model.get_input_embeddings().register_forward_hook(off_by_one)
    try:
        (logits,) = _own_logits(target, text, [branch])
    finally:
        hook.remove()
    return max(step, float(_gaps(expected, logits).median()))


def _gaps(expected: Tensor, actual: Tensor) -> Tensor:
    """[nodes] root mean square of each node's differences, in standard deviations of the expected logits."""
    expected = expected.double()
    return (expected - actual.double()).square().mean(-1).sqrt() / expected.std()


def _gap(expected: Tensor, actual: Tensor) -> float:
    """The largest difference, in standard deviations; in half precision, where single differences are noise, the worst `_gaps`."""
    if expected.dtype in TOLERANCE:
        return float((expected.double() - actual.double()).abs().max() / expected.double().std())
    return float(_gaps(expected, actual).max())


def _tree_logits(target: Target, texts: list[list[int]], branches: list[list[int]]) -> list[Tensor]:
    """For each text, [1 + 4, vocab] logits of its root and of both branches: one forward for the prompts, one for all trees."""
    capacity = max(map(len, texts)) + 8
    seating = Seating(len(texts), capacity * len(texts))
    cache = target.new_cache(seating)
    seats = [seating.take(capacity) or 0 for _ in texts]
    prompts = merge(
        [text[:-1] for text in texts], [0] * len(texts), [False] * len(texts), Drafts.none(target.device), target.min_nodes
    )
    target.score(prompts, cache, seats)
    cache.commit(seats, prompts.stems, [()] * len(texts))
    tokens = [token for branch in branches for token in branch]
    rows = [row for row in range(len(texts)) for _ in tokens]
    parents = [parent + 4 * row if parent >= 0 else parent for row in range(len(texts)) for parent in (-1, 0, -1, 2)]
    drafts = Drafts.of(tokens * len(texts), parents, rows, [1, 2, 1, 2] * len(texts), [1.0] * len(rows), device=target.device)
    forest = merge([text[-1:] for text in texts], [len(text) - 1 for text in texts], [True] * len(texts), drafts, target.min_nodes)
    return list(target.score(forest, cache, seats).logits[: 5 * len(texts)].split(5))
