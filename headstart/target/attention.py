"""Who sees whom: the attention of a flat forest over a cache of seats, registered with transformers once.

A node sees its row's committed slots and its own ancestors, nothing else; windows and chunks are measured in positions, never in
slots, for nodes of one depth share a position. This file knows masks and attention. It refuses to know models and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.target.cache import KVCache

NAME = "headstart"

# Keywords that transformers' layers hand to every attention function and that change nothing here.
_HARMLESS = {"dropout", "position_ids", "is_causal", "use_cache", "past_key_values", "position_embeddings", "output_hidden_states"}


@dataclass(frozen=True)
class Window:
    """How far back a layer looks, in positions: a sliding window, a chunk, or everything (None)."""

    sliding: int | None = None
    chunk: int | None = None

    def hides(self, length: int) -> bool:
        """Whether anything is hidden in a text of `length` tokens."""
        return any(limit is not None and length > limit for limit in (self.sliding, self.chunk))


@dataclass(frozen=True, eq=False)
class RowMask:
    """What the nodes of one row see in one forward.

    first, last: its nodes in the flat list. start: its seat's first slot. committed: slots that every node sees; scratch: slots
    behind them that hold earlier nodes of this row (a drafter's levels). seen: [nodes, scratch + nodes] bool, which of these
    and of this forward's nodes each node sees, itself included; None: causal. positions: [scratch + nodes]. notes: what a kernel
    works out once for all layers of this forward, by names of its own.
    """

    first: int
    last: int
    start: int
    committed: int
    tree_mask: Tensor | None
    positions: Tensor
    scratch: int = 0
    _masks: dict[tuple[Window, torch.dtype], Tensor | None] = field(default_factory=dict)
    notes: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        return self.last - self.first

    @property
    def context(self) -> int:
        """Slots that take part: committed, scratch, and this forward's own."""
        return self.committed + self.scratch + self.nodes

    def visible(self, window: Window = Window()) -> Tensor:
        """[nodes, context] bool, by the book."""
        device = self.positions.device
        seen = self.tree_mask
        if seen is None:
            seen = torch.ones(self.nodes, self.scratch + self.nodes, dtype=torch.bool, device=device).tril(self.scratch)
        visible = torch.cat([seen.new_ones(self.nodes, self.committed), seen], 1)
        if window.hides(self.context):
            keys = torch.cat([torch.arange(self.committed, device=device), self.positions])
            queries = self.positions[self.scratch :, None]
            if window.sliding is not None:
                visible &= queries - keys < window.sliding
            if window.chunk is not None:
                visible &= queries // window.chunk == keys // window.chunk
        return visible

    def mask(self, window: Window, dtype: torch.dtype) -> Tensor | None:
        """Additive [nodes, context], or None where every node sees everything; made once per forward."""
        if self.nodes == 1 and self.tree_mask is None and not window.hides(self.context):
            return None
        if (window, dtype) not in self._masks:
            hidden = ~self.visible(window)
            self._masks[window, dtype] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, -torch.inf
            )
        return self._masks[window, dtype]


@dataclass(frozen=True)
class AttentionParams:
    """What a layer asks of its attention besides keys and values. sinks: [heads] an extra logit per head (GPT-OSS), or None."""

    scaling: float
    window: Window
    softcap: float | None = None
    sinks: Tensor | None = None


# query [heads, nodes, dim], keys [kv_heads, context, dim], values [kv_heads, context, value_dim] -> [heads, nodes, value_dim]
Kernel = Callable[[Tensor, Tensor, Tensor, RowMask, AttentionParams], Tensor]


def fused(query: Tensor, keys: Tensor, values: Tensor, row_mask: RowMask, params: AttentionParams) -> Tensor:
    """torch's own attention where it can express the layer. Groups of query heads become more query rows: no key is repeated."""
    if params.softcap is not None or params.sinks is not None:
        return plain(query, keys, values, row_mask, params)
    heads, nodes, _ = query.shape
    groups = heads // keys.shape[0]
    mask = row_mask.mask(params.window, query.dtype)
    if groups > 1:
        query = query.reshape(keys.shape[0], groups * nodes, -1)
        mask = mask if mask is None else mask.repeat(groups, 1)
    out = F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=mask, scale=params.scaling)
    return out.reshape(heads, nodes, -1)


def plain(query: Tensor, keys: Tensor, values: Tensor, row_mask: RowMask, params: AttentionParams) -> Tensor:
    """Attention as written: the reference of every other kernel, and the only one with soft caps and sinks."""
    heads, nodes, _ = query.shape
    query = query.reshape(keys.shape[0], -1, query.shape[-1])
    scores = (query @ keys.mT).reshape(heads, nodes, -1) * params.scaling
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    mask = row_mask.mask(params.window, scores.dtype)
    scores = scores if mask is None else scores + mask
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if params.sinks is not None:
        sinks = params.sinks.reshape(-1, 1, 1).expand(-1, nodes, 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1, dtype=wide)[..., :-1]
    else:
        weights = torch.softmax(scores, -1, dtype=wide)
    out = weights.to(values.dtype).reshape(keys.shape[0], -1, keys.shape[1]) @ values
    return out.reshape(heads, nodes, -1)


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """One forward's attention: every row's row_mask, the cache it reads and writes, and the kernel that does it.

    pad_rows: all rows in one padded call, for devices where a call costs more than the padding.
    """

    row_masks: Sequence[RowMask]
    cache: KVCache
    kernel: Kernel
    windows: Sequence[Window]
    pad_rows: bool = False

    @cached_property
    def padded(self) -> PaddedRows:
        return PaddedRows.of(self.row_masks)


@dataclass(frozen=True, eq=False)
class Probe:
    """Stands in for a `AttentionMetadata` while a model is examined: records what each layer brings, and attends causally.

    alone: every node sees itself only, so that nothing passes between nodes but by ways around the attention. looking_ahead:
    the kinds of layers that say of themselves that they are not causal. masking: those that bring a mask, which is not looked at.
    """

    alone: bool = False
    looking_ahead: set[str] = field(default_factory=set)
    masking: set[str] = field(default_factory=set)
    shapes: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # layer -> kv_heads, key_dim, value_dim
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
    """The function that transformers calls in every attention layer.

    query [1, heads, nodes, dim], key and value [1, kv_heads, nodes, dim]. Returns [1, nodes, heads, value_dim].
    """
    given = {name for name, value in unknown.items() if value is not None and value is not False}
    strange = sorted(given - _HARMLESS)
    if strange:
        raise ValueError(f"{type(module).__name__} hands its attention {', '.join(strange)}, which is not understood here")
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
    if headstart.pad_rows and params.softcap is None and params.sinks is None and len(headstart.row_masks) > 1:
        return _as_transformers(_attend_padded(headstart, layer, query[0], key[0], value[0], params)), None
    keys, values = headstart.cache.layer(layer)
    outputs = [
        _row(row_mask, query[0], key[0], value[0], keys, values, headstart.kernel, params) for row_mask in headstart.row_masks
    ]
    missing = query.shape[2] - sum(row_mask.nodes for row_mask in headstart.row_masks)
    if missing:  # dead nodes see nothing and say nothing
        outputs.append(query.new_zeros(query.shape[1], missing, value.shape[-1]))
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
    """Write one row's keys and values behind what its seat holds, then attend to all of it."""
    nodes, end = slice(row_mask.first, row_mask.last), row_mask.start + row_mask.context
    own, seat = slice(end - row_mask.nodes, end), slice(row_mask.start, end)
    keys[:, own] = key[:, nodes]
    values[:, own] = value[:, nodes]
    return kernel(query[:, nodes], keys[:, seat], values[:, seat], row_mask, params)


def _probe(
    probe: Probe, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, window: int | None
) -> Tensor:
    probe.shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
    probe.windows[layer] = window
    probe.heads[layer] = query.shape[1]
    nodes = query.shape[2]
    seen = torch.eye(nodes, dtype=torch.bool, device=query.device) if probe.alone else None
    row_mask = RowMask(0, nodes, 0, 0, seen, torch.arange(nodes, device=query.device))
    return _as_transformers(plain(query[0], key[0], value[0], row_mask, params))


def _looks_ahead(module: nn.Module, given: object) -> bool:
    """Whether a layer says that it is not causal, of itself or in its call."""
    return getattr(module, "is_causal", True) is False or given is False


def _as_transformers(out: Tensor) -> Tensor:
    """[heads, nodes, value_dim] -> [1, nodes, heads, value_dim], in one piece: some models take a `view` of it."""
    return out.transpose(0, 1)[None].contiguous()


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """All rows of a forward side by side, padded to the longest: index tables, made once per forward.

    own: [nodes] each node's slot. slots: [rows, context] every row's slots. nodes: [rows, most] every row's nodes, the first one
    repeated as padding. rows, columns: [nodes] where each node stands in `nodes`. row_masks: as given.
    """

    own: Tensor
    slots: Tensor
    nodes: Tensor
    rows: Tensor
    columns: Tensor
    row_masks: Sequence[RowMask]
    _masks: dict[tuple[Window, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, row_masks: Sequence[RowMask]) -> PaddedRows:
        device = row_masks[0].positions.device
        context, most = max(row_mask.context for row_mask in row_masks), max(row_mask.nodes for row_mask in row_masks)
        own = [
            slot
            for row_mask in row_masks
            for slot in range(row_mask.start + row_mask.context - row_mask.nodes, row_mask.start + row_mask.context)
        ]
        slots = [[row_mask.start + min(slot, row_mask.context - 1) for slot in range(context)] for row_mask in row_masks]
        nodes = [[min(node, row_mask.last - 1) for node in range(row_mask.first, row_mask.first + most)] for row_mask in row_masks]
        places = [(row, column) for row, row_mask in enumerate(row_masks) for column in range(row_mask.nodes)]
        rows, columns = torch.tensor(places).T.to(device, non_blocking=True)
        tables = [torch.tensor(table).to(device, non_blocking=True) for table in (own, slots, nodes)]
        return cls(tables[0], tables[1], tables[2], rows, columns, row_masks)

    def mask(self, window: Window, dtype: torch.dtype) -> Tensor:
        """Additive [rows, 1, most, context]; padding sees what the last node sees."""
        if (window, dtype) not in self._masks:
            visible = self.slots.new_zeros(*self.nodes.shape, self.slots.shape[1], dtype=torch.bool)
            for row, row_mask in enumerate(self.row_masks):
                visible[row, : row_mask.nodes, : row_mask.context] = row_mask.visible(window)
                visible[row, row_mask.nodes :, : row_mask.context] = True
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._masks[window, dtype] = mask[:, None]
        return self._masks[window, dtype]


def _attend_padded(
    metadata: AttentionMetadata, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> Tensor:
    """One attention call for all rows. query [heads, nodes, dim], key and value [kv_heads, nodes, dim]; dead nodes last.

    Returns [heads, nodes, value_dim].
    """
    padded, (keys, values) = metadata.padded, metadata.cache.layer(layer)
    alive = len(padded.own)
    keys.index_copy_(1, padded.own, key[:, :alive])
    values.index_copy_(1, padded.own, value[:, :alive])
    heads, groups, (rows, most) = query.shape[0], query.shape[0] // key.shape[0], padded.nodes.shape
    asking = query[:, padded.nodes].transpose(0, 1).reshape(rows, key.shape[0], groups * most, -1)
    mask = padded.mask(params.window, query.dtype).repeat(1, 1, groups, 1)
    seen, said = (store[:, padded.slots].transpose(0, 1) for store in (keys, values))
    out = F.scaled_dot_product_attention(asking, seen, said, attn_mask=mask, scale=params.scaling)
    out = out.reshape(rows, heads, most, -1)[padded.rows, :, padded.columns]
    return F.pad(out, (0, 0, 0, 0, 0, query.shape[1] - alive)).transpose(0, 1)


def register() -> None:
    """Make `attend` known to transformers, without a mask function: no model builds a mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
