"""The compiled tree attention: all rows of a layer in one call, which also writes the nodes' keys and values into the KV cache.

A node adds its positions one after the other, wherever their slots are: its bits do not depend on what else is in the forest. Must
not import models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.target.attention import AttentionMetadata, AttentionParams, RowsKernel
from headstart.target.cache import KVCache, LayerShape
from headstart.target.kernels.compiled import DTYPES
from headstart.target.kernels.library import library
from headstart.target.row_mask import RowMask, Window

LANES = 16  # widths of keys and values are multiples of this


class _Attention(ctypes.Structure):
    """`Attention` of cpp/kernels.hpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "keys", "values", "out", "sinks")),
        *((name, ctypes.c_void_p) for name in ("rows", "prefixes", "starts", "paths", "lowest")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "query_head", "query_node", "key_head", "key_node", "value_head", "value_node", "keys_head", "values_head",
                "num_rows", "nodes", "heads", "kv_heads", "key_dim", "value_dim",
            )
        ),
        ("scaling", ctypes.c_float), ("softcap", ctypes.c_float), ("dtype", ctypes.c_int32),
    )  # fmt: skip
    keep_alive: Tensor | None = None  # the sinks


class RowTables:
    """Which slots each node of a forward attends to, in the order of positions. Made once for all layers.

    Every node sees the first slots of its seat up to its `prefix`, then the slots of its `path`.

    Attributes:
    num_nodes: nodes of all rows; dead nodes are not counted.
    rows: [rows, 4] first node, last node, first slot of the seat, and slot of the first node in the seat.
    prefixes: [nodes].
    starts: [nodes + 1] the first entry of each node in `paths`.
    paths: slots of the seat.
    """

    def __init__(self, row_masks: Sequence[RowMask]) -> None:
        self._row_masks = row_masks
        self._lowest: dict[Window, np.ndarray | None] = {}
        self.num_nodes = sum(row_mask.nodes for row_mask in row_masks)
        self.rows = np.array([(row.first, row.last, row.start, row.committed + row.scratch) for row in row_masks], np.int64)
        self._paths = [_path(row_mask) for row_mask in row_masks]
        if all(path is None for path in self._paths):
            self.paths, self.starts = np.zeros(1, np.int32), np.zeros(self.num_nodes + 1, np.int64)
        else:
            lengths = [
                np.zeros(row.nodes, np.int64) if path is None else np.bincount(path[0], minlength=row.nodes)
                for row, path in zip(row_masks, self._paths, strict=True)
            ]
            self.starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
            slots = [row.committed + path[1] for row, path in zip(row_masks, self._paths, strict=True) if path is not None]
            self.paths = np.concatenate(slots).astype(np.int32)
        self.prefixes = np.concatenate([_prefix(row_mask) for row_mask in row_masks])

    def lowest(self, window: Window) -> np.ndarray | None:
        """[nodes] how many of the slots that a node would see lie before its window; None where none does."""
        if window not in self._lowest:
            rows = zip(self._row_masks, self._paths, strict=True)
            hides = any(window.hides(row_mask.context) for row_mask in self._row_masks)
            self._lowest[window] = np.concatenate([_hidden(row, path, window) for row, path in rows]) if hides else None
        return self._lowest[window]


Path = tuple[np.ndarray, np.ndarray]  # the node, and the slot behind the committed ones, of each pair of a node and an ancestor


def _path(row_mask: RowMask) -> Path | None:
    """The scratch slots and nodes that each node of a row sees; ancestors come first, because parents come before children.

    None for causal rows, whose slots are in the order of positions.
    """
    if row_mask.tree_mask is None:
        return None
    nodes, slots = np.nonzero(row_mask.tree_mask.numpy())
    return nodes, slots


def _prefix(row_mask: RowMask) -> np.ndarray:
    if row_mask.tree_mask is None:
        return np.arange(row_mask.nodes, dtype=np.int64) + (row_mask.committed + row_mask.scratch + 1)
    return np.full(row_mask.nodes, row_mask.committed, np.int64)


def _hidden(row_mask: RowMask, path: Path | None, window: Window) -> np.ndarray:
    """[nodes] how many of the slots that a node of a row would see lie before its window."""
    positions = row_mask.positions.numpy()
    own = positions[row_mask.scratch :]
    first = np.zeros_like(own)  # the first position in the window
    if window.sliding is not None:
        first = np.maximum(first, own - window.sliding + 1)
    if window.chunk is not None:
        first = np.maximum(first, own // window.chunk * window.chunk)
    if path is None:
        behind = np.searchsorted(positions, first)
    else:
        nodes, slots = path
        behind = np.bincount(nodes[positions[slots] < first[nodes]], minlength=row_mask.nodes)
    return np.asarray(np.minimum(first, row_mask.committed) + behind, np.int64)


@dataclass(frozen=True)
class CompiledAttention(RowsKernel):
    """The compiled tree attention, for fp32 and bf16 on the CPU."""

    @staticmethod
    def fits(shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the library is there and has attention for these layers."""
        is_wide = all(dim % LANES == 0 for shape in shapes for dim in (shape.key_dim, shape.value_dim))
        return device.type == "cpu" and dtype in DTYPES and is_wide and library() is not None

    def __call__(
        self, metadata: AttentionMetadata, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """As `RowsKernel` says."""
        lib = library()
        assert lib is not None, "the compiled kernels are not there"
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        heads, nodes, _ = query.shape
        call, out = prepare(metadata, layer, (heads, key.shape[0], key.shape[-1], value.shape[-1]), nodes, query.dtype, params)
        call.query, call.key, call.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        (call.query_head, call.query_node, _), (call.key_head, call.key_node, _) = query.stride(), key.stride()
        call.value_head, call.value_node, _ = value.stride()
        lib.attention(ctypes.addressof(call))
        return out


def prepare(
    metadata: AttentionMetadata,
    layer: int,
    shape: tuple[int, int, int, int],
    nodes: int,
    dtype: torch.dtype,
    params: AttentionParams,
) -> tuple[Any, Tensor]:
    """The arguments of the library for one layer, without query, key and value, and its output, [nodes, heads, value_dim].

    shape: number of query heads and of key-value heads, width of keys and of values. nodes: dead ones included.
    """
    tables, call = _tables_and_call(metadata)
    out = (torch.empty if nodes == tables.num_nodes else torch.zeros)(nodes, shape[0], shape[3], dtype=dtype)
    lowest = tables.lowest(params.window)
    call.out, call.lowest = out.data_ptr(), None if lowest is None else lowest.ctypes.data
    _set_layer(call, metadata.cache, layer, shape, dtype, params)
    return call, out


def _set_layer(
    call: Any, cache: KVCache, layer: int, shape: tuple[int, int, int, int], dtype: torch.dtype, params: AttentionParams
) -> None:
    """Write the arguments that do not differ between forwards."""
    keys, values = cache.layer(layer)
    sinks = None if params.sinks is None else params.sinks.float().contiguous()
    call.heads, call.kv_heads, call.key_dim, call.value_dim = shape
    call.keys, call.values, call.sinks = keys.data_ptr(), values.data_ptr(), None if sinks is None else sinks.data_ptr()
    call.keys_head, call.values_head = keys.stride(0), values.stride(0)
    call.scaling, call.softcap, call.dtype = params.scaling, params.softcap or 0.0, DTYPES[dtype]
    call.keep_alive = sinks


def attention_call(
    cache: KVCache, layer: int, shape: tuple[int, int, int, int], dtype: torch.dtype, params: AttentionParams
) -> Any:
    """The arguments of the library for one layer, without nodes, tables and output. shape: as of `prepare`."""
    call = _Attention()
    _set_layer(call, cache, layer, shape, dtype, params)
    return call


def _tables_and_call(metadata: AttentionMetadata) -> tuple[RowTables, Any]:
    """The tables of a forward, and the arguments that refer to them; made at its first layer."""
    if "compiled" not in metadata.notes:
        tables = RowTables(metadata.row_masks)
        call = _Attention(
            rows=tables.rows.ctypes.data,
            prefixes=tables.prefixes.ctypes.data,
            starts=tables.starts.ctypes.data,
            paths=tables.paths.ctypes.data,
            num_rows=len(tables.rows),
            nodes=tables.num_nodes,
        )
        metadata.notes["compiled"] = tables, call
    prepared: tuple[RowTables, Any] = metadata.notes["compiled"]
    return prepared
