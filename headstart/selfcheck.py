"""Does a model that is scored as a forest say what it says of its own accord? Asked once, when it is loaded.

A tree is compared with the sequential text, by the attention the model came with, and two rows together with each alone, one of
them beyond a sliding window. This file knows the question. It refuses to know how a forest is scored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headstart.cache import Seating
from headstart.tree import Drafts, merge

if TYPE_CHECKING:
    from headstart.target import Target

MAX_CHECK = 600  # tokens; a longer window is not run into at load


def self_check(target: Target) -> None:
    windows = [limit for reach in target.reaches for limit in (reach.window, reach.chunk) if limit is not None]
    beyond = min((limit + 5 for limit in windows), default=24)
    length = min(beyond if beyond <= MAX_CHECK else 24, target.context - 8)
    if length < 4:
        return
    texts, branches = _draw(target, (length, max(3, length // 2)))
    expected = [_own_logits(target, text, branches) for text in texts]
    for rows in ([0, 1], [0], [1]):
        found = _tree_logits(target, [texts[row] for row in rows], branches)
        for row, logits in zip(rows, found, strict=True):
            _compare(target, expected[row], logits, "two rows together" if len(rows) > 1 else "a tree")


def holds_to_the_bit(target: Target) -> bool:
    """Whether logits have the same bits in a crowd of trees and one token at a time: the whole model, with its kernels.

    Two rows, their prompts read at once, with a tree behind each; then each row alone, its prompt cut elsewhere, one branch.
    """
    length = min(24, target.context - 8)
    if length < 4:
        return True
    texts, branches = _draw(target, (length, max(3, length // 2)))
    crowd = _tree_logits(target, texts, branches)
    for text, branch, found, nodes in zip(texts, branches, crowd, ([0, 1, 2], [0, 3, 4]), strict=True):
        if not torch.equal(found[nodes], _one_by_one(target, text, branch)):
            return False
    return True


def _draw(target: Target, sizes: tuple[int, ...]) -> tuple[list[list[int]], list[list[int]]]:
    """Random texts of these sizes, and two branches of two tokens to hang on each."""
    generator = torch.Generator().manual_seed(0)
    texts: list[list[int]] = [torch.randint(0, target.vocab, (size,), generator=generator).tolist() for size in sizes]
    branches: list[list[int]] = torch.randint(0, target.vocab, (2, 2), generator=generator).tolist()
    branches[1][0] = (branches[0][0] + 1) % target.vocab  # siblings are distinct
    return texts, branches


def _one_by_one(target: Target, text: list[int], branch: list[int]) -> Tensor:
    """[1 + branch, vocab]: the prompt in two parts, then root and branch, one node a forward."""
    seating = Seating(1, len(text) + len(branch) + 1)
    cache, seats = target.new_cache(seating), [seating.take(seating.num_slots) or 0]
    lines: list[Tensor] = []
    cut = (len(text) - 1) // 3
    for stem in (text[:cut], text[cut:-1], text[-1:], *([token] for token in branch)):
        if stem:
            forest = merge([stem], [cache.lengths[seats[0]]], [True], Drafts.none(target.device), target.min_nodes)
            lines.append(target.score(forest, cache, seats).logits[:1])
            cache.commit(seats, forest.stems, [()])
    return torch.cat(lines[-1 - len(branch) :])


def _own_logits(target: Target, text: list[int], branches: list[list[int]]) -> Tensor:
    """[1 + 4, vocab] by the model's own attention, one forward per branch: root, then each branch's two nodes."""
    with target.original() as model:
        out = [
            model(input_ids=torch.tensor([text + branch], device=target.device), use_cache=False).logits[0, len(text) - 1 :]
            for branch in branches
        ]
    return torch.cat([out[0][:1], out[0][1:], out[1][1:]])


def _tree_logits(target: Target, texts: list[list[int]], branches: list[list[int]]) -> list[Tensor]:
    """The same nodes by two forwards of forests: the prompts without their roots, then roots and both branches at once."""
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


def _compare(target: Target, expected: Tensor, found: Tensor, what: str) -> None:
    tolerance = {torch.float64: 1e-5, torch.float32: 2e-3}.get(target.dtype, 0.25)
    gap = float((expected.double() - found.double()).abs().max() / expected.double().std())
    if not gap <= tolerance:
        target.release()
        raise ValueError(
            f"{target.name} ({type(target.model).__name__}) cannot be a target: {what} scored at once differs from the sequential "
            f"text by {gap:.2g} standard deviations of its logits (allowed: {tolerance:g})"
        )
