"""Tree attention of all rows with torch's FlexAttention: the mask is a function of a node and a slot, and a table names the blocks.

Keys and values stay where they are in the KV cache, and only the blocks of slots that a block of nodes sees are read. Shapes
depend on the number of nodes and on the size of the cache, not on the context, so that one graph serves all contexts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from headstart.target.attention import AttentionParams
from headstart.target.flat_mask import FlatMask, sees
from headstart.target.row_mask import Window

BLOCK = 128  # nodes and slots of a block
MAX_SHAPES = 64  # of queries and windows for which it is compiled; beyond, torch would compute every score
_flex_attention: Callable[..., Any] = flex_attention  # its overloads do not take keyword arguments from a dictionary


def flex_kernel(query: Tensor, keys: Tensor, values: Tensor, flat: FlatMask, params: AttentionParams) -> Tensor:
    """Attention of all rows, compiled on a GPU; elsewhere torch's own definition of it, which computes every score.

    query: [heads, nodes, dim]; keys: [kv_heads, slots, dim]; values: [kv_heads, slots, value_dim], of the whole KV cache.
    Returns [heads, nodes, value_dim], zeros for nodes that see nothing.
    """
    attention = compiled_flex() if query.device.type == "cuda" else plain_flex
    return _attend(attention, query, keys, values, flat, params)


def _attend(
    attention: Callable[..., Any], query: Tensor, keys: Tensor, values: Tensor, flat: FlatMask, params: AttentionParams
) -> Tensor:
    """As `flex_kernel`, with this `flex_attention`."""
    options: dict[str, Any] = {
        "score_mod": None if params.softcap is None else _capped(params.softcap),
        "block_mask": block_mask(flat, params.window, keys.shape[1]),
        "scale": params.scaling,
        "enable_gqa": query.shape[0] != keys.shape[0],
    }
    if params.sinks is None:
        out: Tensor = attention(query[None], keys[None], values[None], **options)[0]
        return out
    out, aux = attention(query[None], keys[None], values[None], return_aux=AuxRequest(lse=True), **options)
    share = torch.sigmoid(aux.lse[0] - params.sinks.reshape(-1, 1))  # of the softmax's mass that is not the sink's
    return out[0] * share[..., None].to(out.dtype)


def plain_flex(*tensors: Tensor, **options: Any) -> Any:
    """`flex_attention` without compilation, and without its warning that this is slow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return _flex_attention(*tensors, **options)


@cache
def compiled_flex() -> Callable[..., Any]:
    """`flex_attention`, compiled once per shape of queries and cache; torch's limit of shapes is raised for it."""
    compiled = torch.compile(_flex_attention, dynamic=False)

    def attention(*tensors: Tensor, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            return compiled(*tensors, **options)

    return attention


def block_mask(flat: FlatMask, window: Window, num_slots: int) -> BlockMask:
    """FlexAttention's mask for a window, made once per forward: which blocks are read, and what is visible inside them.

    num_slots: slots of the KV cache, the sink included.
    """
    return flat.once(("blocks", window), lambda: _block_mask(flat, window, num_slots))


def _block_mask(flat: FlatMask, window: Window, num_slots: int) -> BlockMask:
    read = read_blocks(flat, window, num_slots)
    indices = torch.argsort((~read).to(torch.int32), dim=-1, stable=True).to(torch.int32)  # read ones first, ascending
    return BlockMask.from_kv_blocks(
        read.sum(-1, dtype=torch.int32)[None, None],
        indices[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(flat, window),
        seq_lengths=(len(flat.rows), num_slots),
    )


def read_blocks(flat: FlatMask, window: Window, num_slots: int) -> Tensor:
    """[blocks of nodes, blocks of slots] bool: which blocks hold a slot that a node of the block may see."""
    blocks = torch.arange(-(-num_slots // BLOCK), device=flat.rows.device)
    num_columns = flat.columns.new_zeros(len(flat.starts)).scatter_reduce(0, flat.rows, flat.columns + 1, "amax")
    last = flat.starts + flat.committed + num_columns - 1
    of_row = (flat.lowest(window)[:, None] // BLOCK <= blocks) & (blocks <= last[:, None] // BLOCK)
    rows = F.pad(flat.rows, (0, -len(flat.rows) % BLOCK), value=-1).reshape(-1, BLOCK)
    has_row = (rows[..., None] == torch.arange(len(flat.starts), device=rows.device)).any(1)
    return (has_row[..., None] & of_row).any(1)


def _mask_mod(flat: FlatMask, window: Window) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod`: whether a node sees a slot."""
    tensors = flat.tensors()

    def is_seen(_batch: Tensor, _head: Tensor, node: Tensor, slot: Tensor) -> Tensor:
        return sees(tensors, node, slot, window)

    return is_seen


def _capped(softcap: float) -> Callable[..., Tensor]:
    """FlexAttention's `score_mod` of a soft cap."""

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _node: Tensor, _slot: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return capped
