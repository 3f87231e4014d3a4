"""Ids of the tokens that a drafter can say, where its vocabulary is reduced: whether they are ids, and all different.

This file knows numbers. It refuses to know files and methods.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fault(ids: Tensor, vocab: int) -> str | None:
    """What is wrong with ids of a drafter's tokens, or nothing. ids: [draft vocab], int64, in any order; vocab: of the target."""
    outside = ((ids < 0) | (ids >= vocab)).nonzero()
    if len(outside):
        place = int(outside[0])
        return f"token {place} of theirs would be token {int(ids[place])} of the target, which has {vocab}"
    order = ids.argsort(stable=True)
    twice = (ids[order].diff() == 0).nonzero()
    if len(twice):
        one, other = order[int(twice[0])], order[int(twice[0]) + 1]
        return f"tokens {int(one)} and {int(other)} of theirs would both be token {int(ids[one])} of the target"
    return None


def unlike(ids: Tensor, kept: Tensor) -> int | None:
    """The first token that ids, all right, name and a list of all tokens does not, or the other way round. kept: [vocab], not zero
    for those that can be said."""
    mine = torch.zeros(kept.shape, dtype=torch.bool)
    mine[ids] = True
    differs = (mine != kept.bool()).nonzero()
    return int(differs[0]) if len(differs) else None
