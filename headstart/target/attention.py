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
class Reach:
    """How far back a layer looks, in positions: a sliding window, a chunk, or everything (None)."""

    window: int | None = None
    chunk: int | None = None

    def hides(self, length: int) -> bool:
        """Whether anything is hidden in a text of `length` tokens."""
        return any(limit is not None and length > limit for limit in (self.window, self.chunk))


@dataclass(frozen=True, eq=False)
class Sight:
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
    seen: Tensor | None
    positions: Tensor
    scratch: int = 0
    _masks: dict[tuple[Reach, torch.dtype], Tensor | None] = field(default_factory=dict)
    notes: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        return self.last - self.first

    @property
    def context(self) -> int:
        """Slots that take part: committed, scratch, and this forward's own."""
        return self.committed + self.scratch + self.nodes

    def visible(self, reach: Reach = Reach()) -> Tensor:
        """[nodes, context] bool, by the book."""
        device = self.positions.device
        seen = self.seen
        if seen is None:
            seen = torch.ones(self.nodes, self.scratch + self.nodes, dtype=torch.bool, device=device).tril(self.scratch)
        visible = torch.cat([seen.new_ones(self.nodes, self.committed), seen], 1)
        if reach.hides(self.context):
            keys = torch.cat([torch.arange(self.committed, device=device), self.positions])
            queries = self.positions[self.scratch :, None]
            if reach.window is not None:
                visible &= queries - keys < reach.window
            if reach.chunk is not None:
                visible &= queries // reach.chunk == keys // reach.chunk
        return visible

    def mask(self, reach: Reach, dtype: torch.dtype) -> Tensor | None:
        """Additive [nodes, context], or None where every node sees everything; made once per forward."""
        if self.nodes == 1 and self.seen is None and not reach.hides(self.context):
            return None
        if (reach, dtype) not in self._masks:
            hidden = ~self.visible(reach)
            self._masks[reach, dtype] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, -torch.inf
            )
        return self._masks[reach, dtype]


@dataclass(frozen=True)
class Manner:
    """What a layer asks of its attention besides keys and values. sinks: [heads] an extra logit per head (GPT-OSS), or None."""

    scaling: float
    reach: Reach
    softcap: float | None = None
    sinks: Tensor | None = None


# query [heads, nodes, dim], keys [kv_heads, context, dim], values [kv_heads, context, value_dim] -> [heads, nodes, value_dim]
Kernel = Callable[[Tensor, Tensor, Tensor, Sight, Manner], Tensor]


def fused(query: Tensor, keys: Tensor, values: Tensor, sight: Sight, manner: Manner) -> Tensor:
    """torch's own attention where it can express the layer. Groups of query heads become more query rows: no key is repeated."""
    if manner.softcap is not None or manner.sinks is not None:
        return plain(query, keys, values, sight, manner)
    heads, nodes, _ = query.shape
    groups = heads // keys.shape[0]
    mask = sight.mask(manner.reach, query.dtype)
    if groups > 1:
        query = query.reshape(keys.shape[0], groups * nodes, -1)
        mask = mask if mask is None else mask.repeat(groups, 1)
    out = F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=mask, scale=manner.scaling)
    return out.reshape(heads, nodes, -1)


def plain(query: Tensor, keys: Tensor, values: Tensor, sight: Sight, manner: Manner) -> Tensor:
    """Attention as written: the reference of every other kernel, and the only one with soft caps and sinks."""
    heads, nodes, _ = query.shape
    query = query.reshape(keys.shape[0], -1, query.shape[-1])
    scores = (query @ keys.mT).reshape(heads, nodes, -1) * manner.scaling
    if manner.softcap is not None:
        scores = torch.tanh(scores / manner.softcap) * manner.softcap
    mask = sight.mask(manner.reach, scores.dtype)
    scores = scores if mask is None else scores + mask
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if manner.sinks is not None:
        sinks = manner.sinks.reshape(-1, 1, 1).expand(-1, nodes, 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1, dtype=wide)[..., :-1]
    else:
        weights = torch.softmax(scores, -1, dtype=wide)
    out = weights.to(values.dtype).reshape(keys.shape[0], -1, keys.shape[1]) @ values
    return out.reshape(heads, nodes, -1)


@dataclass(frozen=True, eq=False)
class Gaze:
    """One forward's attention: every row's sight, the cache it reads and writes, and the kernel that does it.

    together: all rows in one padded call, for devices where a call costs more than the padding.
    """

    sights: Sequence[Sight]
    cache: KVCache
    kernel: Kernel
    reaches: Sequence[Reach]
    together: bool = False

    @cached_property
    def padded(self) -> Padded:
        return Padded.of(self.sights)


@dataclass(frozen=True, eq=False)
class Probe:
    """Stands in for a `Gaze` while a model is examined: records what each layer brings, and attends causally.

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
    headstart: Gaze | Probe | None = None,
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
        return _probe(headstart, layer, query, key, value, Manner(scaling, Reach(), softcap, s_aux), sliding_window), None
    manner = Manner(scaling, headstart.reaches[layer], softcap, s_aux)
    if headstart.together and manner.softcap is None and manner.sinks is None and len(headstart.sights) > 1:
        return _as_transformers(_together(headstart, layer, query[0], key[0], value[0], manner)), None
    keys, values = headstart.cache.layer(layer)
    outputs = [_row(sight, query[0], key[0], value[0], keys, values, headstart.kernel, manner) for sight in headstart.sights]
    missing = query.shape[2] - sum(sight.nodes for sight in headstart.sights)
    if missing:  # dead nodes see nothing and say nothing
        outputs.append(query.new_zeros(query.shape[1], missing, value.shape[-1]))
    return _as_transformers(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), None


def _row(
    sight: Sight, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, kernel: Kernel, manner: Manner
) -> Tensor:
    """Write one row's keys and values behind what its seat holds, then attend to all of it."""
    nodes, end = slice(sight.first, sight.last), sight.start + sight.context
    own, seat = slice(end - sight.nodes, end), slice(sight.start, end)
    keys[:, own] = key[:, nodes]
    values[:, own] = value[:, nodes]
    return kernel(query[:, nodes], keys[:, seat], values[:, seat], sight, manner)


def _probe(probe: Probe, layer: int, query: Tensor, key: Tensor, value: Tensor, manner: Manner, window: int | None) -> Tensor:
    probe.shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
    probe.windows[layer] = window
    probe.heads[layer] = query.shape[1]
    nodes = query.shape[2]
    seen = torch.eye(nodes, dtype=torch.bool, device=query.device) if probe.alone else None
    sight = Sight(0, nodes, 0, 0, seen, torch.arange(nodes, device=query.device))
    return _as_transformers(plain(query[0], key[0], value[0], sight, manner))


def _looks_ahead(module: nn.Module, given: object) -> bool:
    """Whether a layer says that it is not causal, of itself or in its call."""
    return getattr(module, "is_causal", True) is False or given is False


def _as_transformers(out: Tensor) -> Tensor:
    """[heads, nodes, value_dim] -> [1, nodes, heads, value_dim], in one piece: some models take a `view` of it."""
    return out.transpose(0, 1)[None].contiguous()


@dataclass(frozen=True, eq=False)
class Padded:
    """All rows of a forward side by side, padded to the longest: index tables, made once per forward.

    own: [nodes] each node's slot. slots: [rows, context] every row's slots. nodes: [rows, most] every row's nodes, the first one
    repeated as padding. rows, columns: [nodes] where each node stands in `nodes`. sights: as given.
    """

    own: Tensor
    slots: Tensor
    nodes: Tensor
    rows: Tensor
    columns: Tensor
    sights: Sequence[Sight]
    _masks: dict[tuple[Reach, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, sights: Sequence[Sight]) -> Padded:
        device = sights[0].positions.device
        context, most = max(sight.context for sight in sights), max(sight.nodes for sight in sights)
        own = [slot for sight in sights for slot in range(sight.start + sight.context - sight.nodes, sight.start + sight.context)]
        slots = [[sight.start + min(slot, sight.context - 1) for slot in range(context)] for sight in sights]
        nodes = [[min(node, sight.last - 1) for node in range(sight.first, sight.first + most)] for sight in sights]
        places = [(row, column) for row, sight in enumerate(sights) for column in range(sight.nodes)]
        rows, columns = torch.tensor(places).T.to(device, non_blocking=True)
        tables = [torch.tensor(table).to(device, non_blocking=True) for table in (own, slots, nodes)]
        return cls(tables[0], tables[1], tables[2], rows, columns, sights)

    def mask(self, reach: Reach, dtype: torch.dtype) -> Tensor:
        """Additive [rows, 1, most, context]; padding sees what the last node sees."""
        if (reach, dtype) not in self._masks:
            visible = self.slots.new_zeros(*self.nodes.shape, self.slots.shape[1], dtype=torch.bool)
            for row, sight in enumerate(self.sights):
                visible[row, : sight.nodes, : sight.context] = sight.visible(reach)
                visible[row, sight.nodes :, : sight.context] = True
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._masks[reach, dtype] = mask[:, None]
        return self._masks[reach, dtype]


def _together(gaze: Gaze, layer: int, query: Tensor, key: Tensor, value: Tensor, manner: Manner) -> Tensor:
    """One attention call for all rows. query [heads, nodes, dim], key and value [kv_heads, nodes, dim]; dead nodes last.

    Returns [heads, nodes, value_dim].
    """
    padded, (keys, values) = gaze.padded, gaze.cache.layer(layer)
    alive = len(padded.own)
    keys.index_copy_(1, padded.own, key[:, :alive])
    values.index_copy_(1, padded.own, value[:, :alive])
    heads, groups, (rows, most) = query.shape[0], query.shape[0] // key.shape[0], padded.nodes.shape
    asking = query[:, padded.nodes].transpose(0, 1).reshape(rows, key.shape[0], groups * most, -1)
    mask = padded.mask(manner.reach, query.dtype).repeat(1, 1, groups, 1)
    seen, said = (store[:, padded.slots].transpose(0, 1) for store in (keys, values))
    out = F.scaled_dot_product_attention(asking, seen, said, attn_mask=mask, scale=manner.scaling)
    out = out.reshape(rows, heads, most, -1)[padded.rows, :, padded.columns]
    return F.pad(out, (0, 0, 0, 0, 0, query.shape[1] - alive)).transpose(0, 1)


def register() -> None:
    """Make `attend` known to transformers, without a mask function: no model builds a mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
