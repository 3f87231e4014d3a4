"""Checks of a reduced draft vocabulary: the ids of the target's tokens that a drafter can propose.

Works on tensors of ids; must not import formats or methods.
"""

from __future__ import annotations

import torch
from torch import Tensor


def id_error(ids: Tensor, vocab: int) -> str | None:
    """What is wrong with a drafter's token ids, or None: ids outside the target's vocabulary, and ids that occur twice.

    ids: [draft vocab] int64, in any order.
    vocab: vocabulary size of the target.
    """
    outside = ((ids < 0) | (ids >= vocab)).nonzero()
    if len(outside):
        index = int(outside[0])
        return f"draft token {index} would be token {int(ids[index])} of the target, which has {vocab}"
    order = ids.argsort(stable=True)
    repeated = (ids[order].diff() == 0).nonzero()
    if len(repeated):
        one, other = order[int(repeated[0])], order[int(repeated[0]) + 1]
        return f"draft tokens {int(one)} and {int(other)} would both be token {int(ids[one])} of the target"
    return None


def native_id_error(ids: Tensor, vocab: int) -> str | None:
    """What is wrong with token ids as native heads store them, or None: they are int64 and ascend, besides what `id_error` asks.

    ids: [draft vocab].
    vocab: vocabulary size of the target.
    """
    if ids.dtype is not torch.int64:
        return f"it is of type {ids.dtype} and should be torch.int64"
    descents = (ids.diff() < 0).nonzero()
    if len(descents):
        index = int(descents[0])
        return f"tokens {int(ids[index])} and {int(ids[index + 1])} stand in this order, and should ascend"
    return id_error(ids, vocab)


def ids_from_offsets(offsets: Tensor) -> Tensor:
    """The token ids [draft vocab] int64 that EAGLE-3's `d2t` means: each entry is a target id minus its index.

    offsets: [draft vocab], any integer type.
    """
    return offsets.long() + torch.arange(len(offsets))


def offsets_error(name: str, offsets: Tensor, vocab: int | None) -> str | None:
    """What is wrong with EAGLE-3's `d2t`, or None.

    name: of the tensor, for the sentence.
    offsets: [draft vocab].
    vocab: vocabulary size of the target; None: not checked.
    """
    if offsets.is_floating_point() or offsets.dtype is torch.bool:
        return f"{name} is of type {offsets.dtype} and should hold whole numbers"
    ids = ids_from_offsets(offsets)
    vocab = vocab or int(ids.max()) + 1
    error = id_error(ids, vocab)
    if error is None:
        return None
    are_ids = id_error(offsets.long(), vocab) is None
    return f"{name} is wrong: {error}" + ("; it holds ids themselves, and should hold offsets" if are_ids else "")


def first_difference(ids: Tensor, is_kept: Tensor) -> int | None:
    """The first token of the target on which a list of ids and a mask disagree; None if they agree.

    ids: [draft vocab] int64, without errors.
    is_kept: [vocab], nonzero for tokens of the draft vocabulary.
    """
    mask = torch.zeros(is_kept.shape, dtype=torch.bool)
    mask[ids] = True
    differs = (mask != is_kept.bool()).nonzero()
    return int(differs[0]) if len(differs) else None
