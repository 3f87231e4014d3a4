"""Attention whose bits do not depend on where a node's ancestors are stored.

Speculation stores a node's ancestors sometimes as committed slots, sometimes among this round's drafts with siblings in
between. Ordinary attention then adds the same numbers in another order, and the last bit changes. Here every sum has one order:

    scores       reduce over the width of a head only
    maximum      does not depend on the order
    denominator  in fp64, of weights rounded to multiples of 2^-30: a sum of integers, exact in any order
    output       positions in blocks of `BLOCK`, one block after the other; inside a block the matrix product adds one slot
                 after the other, so that a hidden slot, whose weight is zero, changes nothing

    slots      [0 ..... 128) [128 ..... 256) [256 .. committed) [committed ........ context)
    products   one           one             one: what is left of block 2, with all drafts; then one per later block of drafts

That a product adds in slot order, and that a row's bits depend on that row only, are properties of a matrix library:
`is_order_proof` measures them, and `wide`, in fp64, is used where they do not hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from headstart.target.attention import AttentionParams, reference_attention
from headstart.target.row_mask import RowMask, Window

BLOCK = 128  # positions added in one matrix product
MAX_SLOTS = 192  # MKL splits a longer sum; measured, like the next two
MIN_KEYS = 16  # MKL uses another kernel for fewer columns (12)
MIN_ROWS = 8  # MKL uses another kernel for fewer rows; in heads wider than 128, for fewer than twice as many
MIN_WORK = 400  # rows * width below which torch does not call MKL


def ordered(query: Tensor, keys: Tensor, values: Tensor, row_mask: RowMask, params: AttentionParams) -> Tensor:
    """Attention with one order of addition: the same bits whether an ancestor is committed or a draft.

    query: [heads, nodes, dim]; keys: [kv_heads, context, dim]; values: [kv_heads, context, value_dim], in any float dtype.
    Returns [heads, nodes, value_dim] in the query's dtype; products are fp32, the denominator fp64.
    """
    heads, nodes, width = query.shape
    batch = keys.shape[0]
    if batch == 1:  # one product alone is split over threads by its size; several are not: repeat the keys
        batch = 2 if heads % 2 == 0 else heads
        keys, values = keys.expand(batch, -1, -1), values.expand(batch, -1, -1)
    rows = query.reshape(batch, -1, width).float()  # grouped queries become query rows: no key is repeated
    num_rows, min_rows = rows.shape[1], max(_min_rows(width), _min_rows(values.shape[-1]))
    scores = _scores(_pad_rows(rows, min_rows), keys.float(), params)
    _hide(scores, row_mask, params.window, num_rows)
    sinks = None if params.sinks is None else params.sinks.reshape(batch, -1, 1).repeat_interleave(nodes, 1)
    weights, total = _weigh(scores, None if sinks is None else _pad_rows(sinks.float(), min_rows))
    out = _weighted_sum(weights, values.float(), row_mask).div_(total)
    return out[:, :num_rows].reshape(heads, nodes, -1).to(query.dtype)


def wide(query: Tensor, keys: Tensor, values: Tensor, row_mask: RowMask, params: AttentionParams) -> Tensor:
    """Attention in fp64, rounded to the query's dtype: the order of addition shows in about one value of 1e9.

    query: [heads, nodes, dim]; keys: [kv_heads, context, dim]; values: [kv_heads, context, value_dim].
    Returns [heads, nodes, value_dim].
    """
    return reference_attention(query.double(), keys.double(), values.double(), row_mask, params).to(query.dtype)


def _pad_rows(x: Tensor, min_rows: int) -> Tensor:
    """[batch, n, dim] -> [batch, max(n, min_rows), dim], padded with zeros."""
    missing = min_rows - x.shape[1]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


def _scores(rows: Tensor, keys: Tensor, params: AttentionParams) -> Tensor:
    """[batch, rows, dim], [batch, context, dim] -> [batch, rows, context], before masking."""
    context = keys.shape[1]
    rows, keys = rows * params.scaling, _pad_rows(keys, MIN_KEYS)  # scaled before the product: `alpha` would round otherwise
    scores = torch.bmm(rows, keys.mT)[..., :context]
    return scores if params.softcap is None else scores.div_(params.softcap).tanh_().mul_(params.softcap)


def _hide(scores: Tensor, row_mask: RowMask, window: Window, num_rows: int) -> None:
    """Add the attention mask to the scores in place; without a window, only among this forward's nodes."""
    key = ("mask", window, scores.shape[1])
    if key not in row_mask.notes:
        mask = row_mask.mask(window, torch.float32)
        if mask is not None:
            first = 0 if window.hides(row_mask.context) else row_mask.committed
            mask = _pad_rows(mask[None, :, first:].repeat(1, num_rows // row_mask.nodes, 1), scores.shape[1])
        row_mask.notes[key] = mask
    mask = row_mask.notes[key]
    if mask is not None:
        scores[..., -mask.shape[-1] :].add_(mask)


def _weigh(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax's numerators, [batch, rows, context], and its denominator, [batch, rows, 1]; overwrites the scores."""
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    weights = scores.sub_(top).exp_()
    total = weights.double().add_(2.0**22).sub_(2.0**22).sum(-1, keepdim=True)  # near 2^22, fp64 has 30 binary places
    if sinks is not None:
        total += (sinks - top).exp_()
    return weights, total.float()


def _weighted_sum(weights: Tensor, values: Tensor, row_mask: RowMask) -> Tensor:
    """[batch, rows, context], [batch, context, dim] -> [batch, rows, dim], added block after block in the order of positions."""
    out: Tensor | None = None
    for first, last, members in _blocks(row_mask):
        part = weights[..., first:last]
        product = _product(part if members is None else part * members, values[:, first:last])
        out = product if out is None else out.add_(product)
    assert out is not None, "a node sees at least itself"
    return out


def _blocks(row_mask: RowMask) -> list[tuple[int, int, Tensor | None]]:
    """`_runs`, computed once for all layers of a forward."""
    if "runs" not in row_mask.notes:
        row_mask.notes["runs"] = _runs(row_mask)
    runs: list[tuple[int, int, Tensor | None]] = row_mask.notes["runs"]
    return runs


def _runs(row_mask: RowMask) -> list[tuple[int, int, Tensor | None]]:
    """(first, last, members) for each block of positions, ascending: the run of slots [first, last) that holds the block.

    members: where drafts lie on both sides of a block's border, the run holds slots of other blocks too, because drafts of all
        depths are mixed: then [last - first] bool, true for the slots of this block; else None.
    """
    straight = row_mask.context if row_mask.tree_mask is None else row_mask.committed  # in these slots, slot = position
    runs = {first // BLOCK: (first, min(first + BLOCK, straight)) for first in range(0, straight, BLOCK)}
    if row_mask.tree_mask is None:
        return [(first, last, None) for first, last in runs.values()]
    drafts: list[int] = (row_mask.positions // BLOCK).tolist()
    for slot, block in enumerate(drafts, straight):
        runs[block] = (runs.get(block, (slot, slot))[0], slot + 1)
    if len(set(drafts)) == 1:  # all drafts are in one block
        return [(first, last, None) for _, (first, last) in sorted(runs.items())]
    blocks = torch.tensor([slot // BLOCK for slot in range(straight)] + drafts)
    return [(first, last, blocks[first:last] == block) for block, (first, last) in sorted(runs.items())]


def _product(weights: Tensor, values: Tensor) -> Tensor:
    """[batch, rows, slots] @ [batch, slots, dim], added in slot order for any number of slots.

    Where there are too many slots for one product, no single node sees all of them, so half of the rows see fewer. A path has at
    most `BLOCK` slots in a block, so the halving ends.
    """
    if weights.shape[-1] > MAX_SLOTS:
        visible = weights.count_nonzero((0, 1)).nonzero()[:, 0]
        if len(visible) > MAX_SLOTS:
            return torch.cat([_product(half, values) for half in weights.chunk(2, 1)], 1)
        weights, values = weights[..., visible], values[:, visible]
    num_rows = weights.shape[1]
    return torch.bmm(_pad_rows(weights, _min_rows(values.shape[-1])), values)[:, :num_rows]


def _min_rows(width: int) -> int:
    """The number of rows below which a product of this width takes another kernel, with another order of addition."""
    group = MIN_ROWS if width <= 128 else 2 * MIN_ROWS
    return max(1, math.ceil(MIN_WORK / width / group)) * group  # a full group of rows takes no longer than a part of one


def is_order_proof(heads: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype) -> bool:
    """Measure, in a fraction of a second, whether `ordered` gives the same bits on this machine for heads of this shape.

    In texts of up to 300 tokens, the last node alone behind committed slots is compared with the same node at the end of a long
    stem, and with the same node in a tree that has an unrelated draft before every ancestor.

    heads, kv_heads: number of query heads and key-value heads. width, value_width: of a head's keys and values.
    dtype: of the KV cache.
    """
    generator = torch.Generator().manual_seed(width)
    length, params = 300, AttentionParams(0.1, Window())  # no power of two: scaling rounds

    def draw(count: int, size: int) -> Tensor:
        return torch.randn(count, length, size, generator=generator)

    # The query is in fp32, and therefore the result: rounding it to bf16 would hide most differences.
    query, keys, values = draw(heads, width), draw(kv_heads, width).to(dtype), draw(kv_heads, value_width).to(dtype)
    for last in (20, 129, 299):
        text = slice(0, last + 1)
        alone = RowMask(0, 1, 0, last, None, torch.tensor([last]))
        expected = ordered(query[:, last : last + 1], keys[:, text], values[:, text], alone, params)[:, 0]
        for num_drafted in (1, 3, 8, 17):
            committed = last + 1 - num_drafted
            order = [*range(committed), *(token for slot in range(committed, last + 1) for token in (last - slot, slot))]
            positions = torch.tensor([slot for slot in range(committed, last + 1) for _ in range(2)])
            lineage = torch.eye(2 * num_drafted, dtype=torch.bool)
            lineage[1::2, 1::2] |= torch.ones(num_drafted, num_drafted, dtype=torch.bool).tril()
            tree = RowMask(0, 2 * num_drafted, 0, committed, lineage, positions)
            drafted = ordered(query[:, order[committed:]], keys[:, order], values[:, order], tree, params)[:, -1]
            stem = RowMask(0, last + 1 - committed, 0, committed, None, positions[::2])
            in_stem = ordered(query[:, committed : last + 1], keys[:, text], values[:, text], stem, params)[:, -1]
            if not (torch.equal(expected, drafted) and torch.equal(expected, in_stem)):
                return False
    return True
