"""Several compiled modules in one call: a level of a drafter, whose modules take less time than Python needs between them.

`Steps` records which modules follow each other; `Steps.run` runs them all. Must not import drafters.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.target.cache import KVCache
from headstart.target.kernels.compiled import DTYPES, CompiledPack
from headstart.target.kernels.compiled_attention import attention_call
from headstart.target.kernels.fuse import GatedMLP, RMSNorm
from headstart.target.kernels.fused_attention import FusedAttention
from headstart.target.kernels.library import library
from headstart.target.kernels.linear import PackedLinear

TAKE, JOIN, PRODUCT, NORM, ADD, ATTEND, MLP = range(7)  # `StepKind` of cpp/steps.hpp
STATES, EMBEDDINGS, COS, SIN = range(4)  # sources of `TAKE`
if TYPE_CHECKING:
    Numbers = array[int]
else:
    Numbers = array  # of integers: a list for the compiled code, made faster than a tensor


class UnsupportedError(Exception):
    """A module is none of the compiled ones, so the modules must be called one by one."""


class _Value(ctypes.Structure):
    """`Value` of cpp/steps.hpp."""

    _fields_ = (("memory", ctypes.c_void_p), ("width", ctypes.c_int64))


class _Step(ctypes.Structure):
    """`Step` of cpp/steps.hpp."""

    _fields_ = (
        ("module", ctypes.c_void_p), ("second", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("kind", "out", "left", "right", "extra", "source")), ("eps", ctypes.c_float),
    )  # fmt: skip


class _Forward(ctypes.Structure):
    """`Forward` of cpp/steps.hpp."""

    _fields_ = (
        ("steps", ctypes.c_void_p), ("values", ctypes.c_void_p), ("tables", ctypes.c_void_p * 4), ("indices", ctypes.c_void_p * 4),
        *((name, ctypes.c_void_p) for name in ("rows", "prefixes", "starts", "paths")),
        *((name, ctypes.c_int64) for name in ("num_steps", "num_rows", "nodes")),
        *((name, ctypes.c_int32) for name in ("dtype", "cos", "sin")),
    )  # fmt: skip


class Steps:
    """The steps of a forward over some nodes, in order. A method adds a step and returns the number of its value.

    Methods raise UnsupportedError for modules that are not compiled ones.

    dtype: of all values, float32 or bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._library = library()
        if self._library is None or dtype not in DTYPES:
            raise UnsupportedError
        self.dtype = dtype
        self._steps: list[_Step] = []
        self._widths: list[int] = []
        self._keep_alive: list[Any] = []
        self._forward: _Forward | None = None  # with room for `_capacity` nodes
        self._capacity = 0
        self._memory: list[Tensor] = []  # per value, [capacity, width]
        self._angles = (-1, -1)

    def _add(self, kind: int, width: int, **fields: Any) -> int:
        self._widths.append(width)
        self._steps.append(_Step(kind=kind, out=len(self._widths) - 1, **fields))
        return len(self._widths) - 1

    def _room(self, width: int) -> int:
        self._widths.append(width)
        return len(self._widths) - 1

    def take(self, source: int, width: int) -> int:
        """Lines of a table, which `run` is given. source: STATES, EMBEDDINGS, COS or SIN."""
        return self._add(TAKE, width, source=source)

    def join(self, left: int, right: int) -> int:
        """Two values, side by side."""
        return self._add(JOIN, self._widths[left] + self._widths[right], left=left, right=right)

    def add(self, left: int, right: int) -> int:
        """The sum of two values."""
        return self._add(ADD, self._widths[left], left=left, right=right)

    def linear(self, module: nn.Module, value: int) -> int:
        """A packed linear."""
        pack = _bare(module, PackedLinear).pack
        if not isinstance(pack, CompiledPack) or len(pack.sizes) > 1 or pack.num_in != self._widths[value]:
            raise UnsupportedError
        return self._add(PRODUCT, pack.width, module=self._address(pack), left=value)

    def norm(self, module: nn.Module, value: int) -> int:
        """An RMS norm, or nothing for `nn.Identity`."""
        if type(module) is nn.Identity:
            return value
        norm = _bare(module, RMSNorm)
        if norm._compiled is None or norm.shape != [self._widths[value]]:
            raise UnsupportedError
        self._keep_alive.append(norm)
        return self._add(NORM, self._widths[value], module=norm._compiled.data_ptr(), left=value, eps=norm.eps)

    def mlp(self, module: nn.Module, value: int) -> int:
        """A gated MLP."""
        mlp = _bare(module, GatedMLP)
        up, down = mlp.gate_proj.pack, mlp.down_proj.pack
        if not isinstance(up, CompiledPack) or not isinstance(down, CompiledPack) or up.num_in != self._widths[value]:
            raise UnsupportedError
        between = self._room(up.width)
        return self._add(MLP, down.width, module=self._address(up), second=self._address(down), left=value, right=between)

    def attention(self, module: nn.Module, cache: KVCache, value: int) -> int:
        """An attention layer over a KV cache, without a window."""
        fused = _bare(module, FusedAttention)
        heads, _, _, value_dim = fused._shape
        if fused.input.num_in != self._widths[value] or fused.input.dtype is not self.dtype:
            raise UnsupportedError
        call = attention_call(cache, fused.layer_idx, fused._shape, self.dtype, fused.params)
        self._keep_alive += [fused, call, cache]
        if self._angles[0] < 0:
            self._angles = self.take(COS, fused._shape[2]), self.take(SIN, fused._shape[2])
        states, attended = self._room(fused.input.width), self._room(heads * value_dim)
        return self._add(
            ATTEND, fused.output.width, module=ctypes.addressof(fused._layer), second=ctypes.addressof(call), left=value,
            right=states, extra=attended,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that one run reads."""
        packs = [kept for kept in self._keep_alive if isinstance(kept, CompiledPack)]
        layers = [kept for kept in self._keep_alive if isinstance(kept, FusedAttention)]
        return sum(pack.nbytes for pack in [*packs, *(pack for layer in layers for pack in (layer.input, layer.output))])

    def _address(self, pack: CompiledPack) -> int:
        if pack.dtype is not self.dtype:
            raise UnsupportedError
        self._keep_alive.append(pack)
        return pack.address

    def run(self, nodes: int, tables: Sequence[Tensor], indices: Sequence[Numbers], rows: Sequence[Numbers]) -> Sequence[Tensor]:
        """Run all steps. Returns the values, of whose first dimension the first `nodes` lines hold until the next run.

        tables: STATES, EMBEDDINGS, COS and SIN, [any, width] each.
        indices: [nodes] int64, the line of each node in these.
        rows: `rows`, `prefixes`, `starts` and `paths` of `RowTables`.
        """
        assert self._library is not None
        if nodes > self._capacity:
            self._reserve(max(nodes, 16))
        forward = self._forward
        assert forward is not None
        forward.tables[:] = [table.data_ptr() for table in tables]
        forward.indices[:] = [lines.buffer_info()[0] for lines in indices]
        forward.rows, forward.prefixes, forward.starts, forward.paths = (numbers.buffer_info()[0] for numbers in rows)
        forward.num_rows, forward.nodes = len(rows[0]) // 4, nodes
        self._library.forward(ctypes.addressof(forward))
        return self._memory

    def _reserve(self, nodes: int) -> None:
        """Make room for this many nodes."""
        self._memory = [torch.empty(nodes, width, dtype=self.dtype) for width in self._widths]
        values = (_Value * len(self._widths))(*(_Value(value.data_ptr(), value.shape[1]) for value in self._memory))
        steps = (_Step * len(self._steps))(*self._steps)
        self._forward = _Forward(
            steps=ctypes.addressof(steps), values=ctypes.addressof(values), num_steps=len(steps), dtype=DTYPES[self.dtype],
            cos=self._angles[0], sin=self._angles[1],
        )  # fmt: skip
        self._arrays, self._capacity = (steps, values), nodes


def _bare(module: nn.Module, kind: type[Any]) -> Any:
    """The module, if it is of that type and nobody hooked it."""
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise UnsupportedError
    return module
