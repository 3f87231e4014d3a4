"""One attention call for all rows of a forward, padded to the longest: for devices where a call costs more than the padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.target.attention import AttentionParams
from headstart.target.flat_mask import FlatMask
from headstart.target.row_mask import Window


def padded_attention(query: Tensor, keys: Tensor, values: Tensor, flat: FlatMask, params: AttentionParams) -> Tensor:
    """Attention of all rows as one batch of rows, with torch's `scaled_dot_product_attention` where it has what a layer needs.

    query: [heads, nodes, dim]; keys: [kv_heads, slots, dim]; values: [kv_heads, slots, value_dim], of the whole KV cache.
    Returns [heads, nodes, value_dim], finite and without meaning for dead nodes.
    """
    heads, kv_heads = query.shape[0], keys.shape[0]
    nodes = _nodes(flat)
    rows, most_nodes = nodes.shape
    row_queries = query[:, nodes].transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads * most_nodes, -1)
    row_keys, row_values = _of_rows(keys, flat), _of_rows(values, flat)
    mask = flat.once(("mask", params.window, query.dtype), lambda: _mask(flat, params.window, query.dtype))
    if params.softcap is None and params.sinks is None:
        key = ("grouped", params.window, query.dtype, heads // kv_heads)
        grouped = flat.once(key, lambda: mask.repeat(1, 1, heads // kv_heads, 1))
        out = F.scaled_dot_product_attention(row_queries, row_keys, row_values, attn_mask=grouped, scale=params.scaling)
    else:
        out = _weigh((row_queries @ row_keys.mT).reshape(rows, heads, most_nodes, -1), mask, params).to(values.dtype).reshape(
            rows, kv_heads, heads // kv_heads * most_nodes, -1) @ row_values  # fmt: skip
    out = out.reshape(rows, heads, most_nodes, -1)
    row, place = flat.once("places", lambda: _places(flat))
    return out[row, :, place].transpose(0, 1)


def _places(flat: FlatMask) -> tuple[Tensor, Tensor]:
    """[nodes] int64 twice, the row and the column of each node in `_nodes`; any for a dead node."""
    row = flat.rows.clamp(max=flat.num_rows - 1)
    return row, (torch.arange(len(row), device=row.device) - flat.firsts[row]).clamp(0, flat.most_nodes - 1)


def _nodes(flat: FlatMask) -> Tensor:
    """[rows, most_nodes] int64, the nodes of each row; what is behind a row's last node is not read."""
    return flat.once("nodes", lambda: _from(flat.firsts, flat.most_nodes).clamp(max=len(flat.rows) - 1))


def _slots(flat: FlatMask) -> Tensor:
    """[rows, context] int64, the slots of each row; behind its last one any slot."""
    return flat.once("slots", lambda: _from(flat.starts, flat.context).clamp(max=flat.sink))


def _from(firsts: Tensor, count: int) -> Tensor:
    """[rows, count] int64, `count` numbers from the first of each row. firsts: [rows + 1]."""
    return firsts[:-1, None] + torch.arange(count, device=firsts.device)


def _of_rows(store: Tensor, flat: FlatMask) -> Tensor:
    """[kv_heads, slots, dim] of the KV cache -> [rows, kv_heads, context, dim]; of one row without a copy."""
    return store[None, :, flat.seat] if flat.seat is not None else store[:, _slots(flat)].transpose(0, 1)


def _mask(flat: FlatMask, window: Window, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [rows, 1, most_nodes, context].

    Padding attends to all slots: its output is not read, and a softmax over nothing would be nan.
    """
    nodes = _nodes(flat)
    is_padding = flat.rows[nodes] != torch.arange(len(nodes), device=nodes.device)[:, None]
    visible = flat.sees(nodes[..., None], _slots(flat)[:, None], window) | is_padding[..., None]
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[:, None]


def _weigh(scores: Tensor, mask: Tensor, params: AttentionParams) -> Tensor:
    """The softmax with a soft cap and sinks. scores: [rows, heads, nodes, context], not scaled yet. Returns the same shape."""
    scores = scores * params.scaling
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    scores = scores + mask
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if params.sinks is None:
        return torch.softmax(scores, -1, dtype=dtype)
    sinks = params.sinks.reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], -1), -1, dtype=dtype)[..., :-1]
