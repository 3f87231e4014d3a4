"""Tree attention of a flat forest over a KV cache: the function that transformers calls in every layer, and two kernels for it.

A node attends to its row's committed slots and to its own ancestors (`RowMask`; tree attention of SpecInfer, Miao et al. 2023).
This module must not import models or tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.target.cache import KVCache
from headstart.target.flat_mask import FlatMask
from headstart.target.row_mask import RowMask, Window

NAME = "headstart"

# Keywords that transformers passes to every attention function and that have no effect here.
_HARMLESS = {"dropout", "position_ids", "is_causal", "use_cache", "past_key_values", "position_embeddings", "output_hidden_states"}


@dataclass(frozen=True)
class AttentionParams:
    """What a layer passes to its attention besides query, keys, values and mask.

    scaling: factor of the scores.
    window: how far back the layer attends.
    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2); None: unchanged.
    sinks: [heads] an extra logit per head, which takes part in the softmax and has no value (GPT-OSS); None: no sinks.
    """

    scaling: float
    window: Window
    softcap: float | None = None
    sinks: Tensor | None = None


class RowsKernel(ABC):
    """Attention of all rows of a layer in one call."""

    @abstractmethod
    def __call__(
        self, metadata: AttentionMetadata, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """Write the nodes' keys and values into the KV cache behind those of their rows, and attend.

        layer: whose part of the cache it is.
        query: [heads, nodes, dim]; key: [kv_heads, nodes, dim]; value: [kv_heads, nodes, value_dim]. Dead nodes are the last ones.
        Returns [nodes, heads, value_dim], zeros for dead nodes.
        """


# One row: query [heads, nodes, dim], keys [kv_heads, context, dim], values [kv_heads, context, value_dim]; the result is of the
# shape [heads, nodes, value_dim].
Kernel = Callable[[Tensor, Tensor, Tensor, RowMask, AttentionParams], Tensor]

# The same for all rows at once: query [heads, nodes, dim], keys and values of the whole KV cache -> [heads, nodes, value_dim]
FlatKernel = Callable[[Tensor, Tensor, Tensor, FlatMask, AttentionParams], Tensor]


def torch_attention(query: Tensor, keys: Tensor, values: Tensor, row_mask: RowMask, params: AttentionParams) -> Tensor:
    """torch's `scaled_dot_product_attention`; `reference_attention` for layers with a soft cap or sinks, which it does not have.

    Grouped-query attention: the query heads of a group become more query rows, so no key is repeated.
    query: [heads, nodes, dim]; keys: [kv_heads, context, dim]; values: [kv_heads, context, value_dim].
    Returns [heads, nodes, value_dim].
    """
    if params.softcap is not None or params.sinks is not None:
        return reference_attention(query, keys, values, row_mask, params)
    heads, nodes, _ = query.shape
    groups = heads // keys.shape[0]
    mask = row_mask.mask(params.window, query.dtype)
    if groups > 1:
        query = query.reshape(keys.shape[0], groups * nodes, -1)
        mask = mask if mask is None else mask.repeat(groups, 1)
    out = F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=mask, scale=params.scaling)
    return out.reshape(heads, nodes, -1)


def reference_attention(query: Tensor, keys: Tensor, values: Tensor, row_mask: RowMask, params: AttentionParams) -> Tensor:
    """Attention as its definition says, with soft caps and sinks: the reference that every other kernel is compared with.

    query: [heads, nodes, dim]; keys: [kv_heads, context, dim]; values: [kv_heads, context, value_dim].
    Returns [heads, nodes, value_dim].
    """
    heads, nodes, _ = query.shape
    query = query.reshape(keys.shape[0], -1, query.shape[-1])
    scores = (query @ keys.mT).reshape(heads, nodes, -1) * params.scaling
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    mask = row_mask.mask(params.window, scores.dtype)
    scores = scores if mask is None else scores + mask
    softmax_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if params.sinks is not None:
        sinks = params.sinks.reshape(-1, 1, 1).expand(-1, nodes, 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1, dtype=softmax_dtype)[..., :-1]
    else:
        weights = torch.softmax(scores, -1, dtype=softmax_dtype)
    out = weights.to(values.dtype).reshape(keys.shape[0], -1, keys.shape[1]) @ values
    return out.reshape(heads, nodes, -1)


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """What the attention layers of one forward need, passed through the model as the keyword `headstart`.

    row_masks: one per row of the forest, in order; empty with `flat`.
    cache: the KV cache that is read and written.
    kernel: computes the attention of one row, or of all.
    windows: one per layer.
    flat: the mask of all rows at once, for devices where a call costs more than padding; None: row by row.
    flat_kernel: computes the attention of all rows; None without `flat`.
    notes: values that a kernel computes once for all layers of this forward, under keys of its own.
    """

    row_masks: Sequence[RowMask]
    cache: KVCache
    kernel: Kernel | RowsKernel
    windows: Sequence[Window]
    flat: FlatMask | None = None
    flat_kernel: FlatKernel | None = None
    notes: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Probe:
    """Takes the place of `AttentionMetadata` while a model is examined: records what each layer passes, and attends causally.

    alone: each node attends to itself only, so that information passes between nodes only by ways other than attention.
    looking_ahead: class names of layers that declare themselves not causal.
    masking: class names of layers that pass an attention mask; the mask is ignored.
    shapes: layer -> (kv_heads, key_dim, value_dim).
    windows: layer -> sliding window that the layer passes, in tokens, or None.
    heads: layer -> number of query heads.
    """

    alone: bool = False
    looking_ahead: set[str] = field(default_factory=set)
    masking: set[str] = field(default_factory=set)
    shapes: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)
    heads: dict[int, int] = field(default_factory=dict)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    headstart: AttentionMetadata | Probe | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unknown: object,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers, called in every attention layer.

    module: the layer; its `layer_idx` names its part of the KV cache.
    query: [1, heads, nodes, dim]; key: [1, kv_heads, nodes, dim]; value: [1, kv_heads, nodes, value_dim].
    attention_mask: ignored; a `Probe` records that there is one.
    scaling: factor of the scores; None: 1 / sqrt(dim).
    headstart: what a target passes through the model.
    sliding_window: read by a `Probe` only; a forward uses `headstart.windows`.
    softcap, s_aux: soft cap and sinks, see `AttentionParams`.
    Returns [1, nodes, heads, value_dim].
    Raises ValueError for a keyword that is not supported, and for a layer that does not pass `headstart` on.
    """
    passed = {name for name, value in unknown.items() if value is not None and value is not False}
    unsupported = sorted(passed - _HARMLESS)
    if unsupported:
        raise ValueError(f"{type(module).__name__} passes {', '.join(unsupported)} to its attention, which is not supported")
    if headstart is None:
        raise ValueError(f"{type(module).__name__} does not pass keyword arguments on to its attention")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(headstart, Probe):
        if attention_mask is not None:
            headstart.masking.add(type(module).__name__)
        if _looks_ahead(module, unknown.get("is_causal")):
            headstart.looking_ahead.add(type(module).__name__)
        return _probe(headstart, layer, query, key, value, AttentionParams(scaling, Window(), softcap, s_aux), sliding_window), None
    params = AttentionParams(scaling, headstart.windows[layer], softcap, s_aux)
    if isinstance(headstart.kernel, RowsKernel) and headstart.flat is None:
        return headstart.kernel(headstart, layer, query[0], key[0], value[0], params)[None], None
    keys, values = headstart.cache.layer(layer)
    if headstart.flat is not None and headstart.flat_kernel is not None:
        keys.index_copy_(1, headstart.flat.node_slots, key[0])
        values.index_copy_(1, headstart.flat.node_slots, value[0])
        return _as_transformers(headstart.flat_kernel(query[0], keys, values, headstart.flat, params)), None
    assert not isinstance(headstart.kernel, RowsKernel), "a kernel of all rows was called before"
    outputs = [
        _row(row_mask, query[0], key[0], value[0], keys, values, headstart.kernel, params) for row_mask in headstart.row_masks
    ]
    num_dead = query.shape[2] - sum(row_mask.nodes for row_mask in headstart.row_masks)
    if num_dead:  # dead nodes, which only fill the forward, attend to nothing, and their output is not read
        outputs.append(query.new_zeros(query.shape[1], num_dead, value.shape[-1]))
    return _as_transformers(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), None


def _row(
    row_mask: RowMask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    kernel: Kernel,
    params: AttentionParams,
) -> Tensor:
    """Write one row's keys and values behind those that its seat holds, then attend to all of them."""
    nodes, end = slice(row_mask.first, row_mask.last), row_mask.start + row_mask.context
    node_slots, seat = slice(end - row_mask.nodes, end), slice(row_mask.start, end)
    keys[:, node_slots] = key[:, nodes]
    values[:, node_slots] = value[:, nodes]
    return kernel(query[:, nodes], keys[:, seat], values[:, seat], row_mask, params)


def _probe(
    probe: Probe, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, window: int | None
) -> Tensor:
    probe.shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
    probe.windows[layer] = window
    probe.heads[layer] = query.shape[1]
    nodes = query.shape[2]
    tree_mask = torch.eye(nodes, dtype=torch.bool, device=query.device) if probe.alone else None
    row_mask = RowMask(0, nodes, 0, 0, tree_mask, torch.arange(nodes, device=query.device))
    return _as_transformers(reference_attention(query[0], key[0], value[0], row_mask, params))


def _looks_ahead(module: nn.Module, is_causal: object) -> bool:
    """Whether a layer declares that it is not causal, as an attribute or in its call."""
    return getattr(module, "is_causal", True) is False or is_causal is False


def _as_transformers(out: Tensor) -> Tensor:
    """[heads, nodes, value_dim] -> [1, nodes, heads, value_dim], contiguous: some models take a `view` of it."""
    return out.transpose(0, 1)[None].contiguous()


def register() -> None:
    """Register `attend` with transformers, without a mask function, so that models build no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
