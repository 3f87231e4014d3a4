"""A fused replacement for attention modules of transformers: one call for all of a layer between its norm and its residual.

The products, the norms of heads, the rotary embedding and the attention are the compiled ones. A module is replaced where it has
the usual linears and gives the same output, whatever its class; any other stays as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headstart.target import attention
from headstart.target.attention import AttentionMetadata, AttentionParams, RowsKernel
from headstart.target.cache import KVCache, LayerShape, Seating
from headstart.target.kernels.compiled import CompiledPack
from headstart.target.kernels.compiled_attention import CompiledAttention, prepare
from headstart.target.kernels.fuse import RMSNorm
from headstart.target.kernels.library import library
from headstart.target.kernels.linear import TOLERANCE, PackedLinear
from headstart.target.kernels.restore import StandIn
from headstart.target.row_mask import RowMask, Window

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
NUM_TOKENS = 3  # of the text that both modules are compared on


class _Layer(ctypes.Structure):
    """`AttentionLayer` of cpp/kernels.hpp."""

    _fields_ = (
        ("input", ctypes.c_void_p), ("output", ctypes.c_void_p), ("query_norm", ctypes.c_void_p), ("key_norm", ctypes.c_void_p),
        ("rope_width", ctypes.c_int64), ("eps", ctypes.c_float),
    )  # fmt: skip


class FusedAttention(StandIn):
    """An attention module in one call, for a `CompiledAttention`; for any other attention, the module that it replaced.

    module: the module to replace, whose linears are packed.
    head_dim: width of a head.
    """

    def __init__(self, module: Any, head_dim: int) -> None:
        super().__init__()
        self._replaced: list[nn.Module] = [module]  # in a list, because a module that is an attribute becomes a child
        for name, child in module.named_children():
            setattr(self, name, child)
        self.layer_idx: int = module.layer_idx
        self.input: CompiledPack = module.q_proj.pack
        self.output: CompiledPack = module.o_proj.pack
        sizes = self.input.sizes
        self._shape = (sizes[0] // head_dim, sizes[1] // head_dim, head_dim, head_dim)
        self._norms = [norm.weight.float() if isinstance(norm := getattr(module, name, None), RMSNorm) else None for name in NORMS]
        query_norm, key_norm = (None if weight is None else weight.data_ptr() for weight in self._norms)
        eps = module.q_norm.eps if hasattr(module, "q_norm") else 0.0
        self._layer = _Layer(self.input.address, self.output.address, query_norm, key_norm, head_dim, eps)
        self.params = AttentionParams(head_dim**-0.5, Window())  # without the window, which is the target's to know

    def original(self) -> nn.Module:
        """The module that was replaced; its linears are packed ones, which have originals of their own."""
        return self._replaced[0]

    def forward(self, hidden_states: Tensor, *args: Any, **inputs: Any) -> Any:
        """[1, nodes, hidden] -> [1, nodes, hidden] and None, as the replaced module."""
        metadata, angles = inputs.get("headstart"), inputs.get("position_embeddings")
        # Another width is that of a partial rotary embedding, which the comparison does not see.
        is_whole = angles is not None and angles[0].shape[-1] == self._shape[2] and angles[0].dtype is hidden_states.dtype
        if is_whole and angles and not args and isinstance(metadata, AttentionMetadata) and is_compiled(metadata):
            return self._attend(metadata, hidden_states, *angles), None
        return self._replaced[0](hidden_states, *args, **inputs)

    def _attend(self, metadata: AttentionMetadata, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        lib = library()
        assert lib is not None, "the compiled kernels are not there"
        x = self.input.checked(states)
        nodes, layer = x.shape[-2], self.layer_idx
        own = self.params
        params = AttentionParams(own.scaling, metadata.windows[layer], own.softcap, own.sinks)
        call, _attended = prepare(metadata, layer, self._shape, nodes, x.dtype, params)
        products, y = x.new_empty(nodes, self.input.width), x.new_empty(1, nodes, self.output.width)
        cos, sin = cos.contiguous(), sin.contiguous()
        lib.attention_layer(
            ctypes.addressof(self._layer), ctypes.addressof(call), x.data_ptr(), nodes, cos.data_ptr(), sin.data_ptr(),
            products.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y


def is_compiled(metadata: AttentionMetadata) -> bool:
    """Whether a forward uses the compiled attention."""
    return metadata.flat is None and isinstance(metadata.kernel, CompiledAttention)


def fuse_attention(model: nn.Module) -> int:
    """Replace attention modules, whose linears are packed, by fused ones with the same output, in place; returns how many.

    `restore` puts them back.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _fused(child)
            if fused is not None:
                setattr(parent, name, fused)
                count += 1
    return count


def _fused(module: Any) -> FusedAttention | None:
    names = {name for name, _ in module.named_children()}
    if not set(LINEARS) <= names <= {*LINEARS, *NORMS} or len(names & set(NORMS)) == 1 or isinstance(module, FusedAttention):
        return None
    packs = [child.pack for name in LINEARS if isinstance(child := getattr(module, name), PackedLinear)]
    head_dim, layer = getattr(module, "head_dim", None), getattr(module, "layer_idx", None)
    if not isinstance(layer, int) or not isinstance(head_dim, int) or len(packs) < len(LINEARS):
        return None
    query, key, value, output = packs
    if not (query is key is value) or not isinstance(query, CompiledPack) or not isinstance(output, CompiledPack):
        return None
    norms = [getattr(module, name) for name in NORMS if name in names]
    if any(not isinstance(norm, RMSNorm) or list(norm.shape) != [head_dim] for norm in norms):
        return None
    shape = LayerShape(query.sizes[1] // head_dim, head_dim, head_dim)
    if any(size % head_dim for size in query.sizes) or not CompiledAttention.fits([shape], query.dtype, torch.device("cpu")):
        return None
    fused = FusedAttention(module, head_dim)
    return fused if _agree(module, fused, shape) else None


class _Recorder(CompiledAttention):
    """Notes what a module passes to its attention."""

    params: AttentionParams | None = None

    def __call__(
        self, metadata: AttentionMetadata, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        type(self).params = params
        return super().__call__(metadata, layer, query, key, value, params)


@torch.inference_mode()
def _agree(module: nn.Module, fused: FusedAttention, shape: LayerShape) -> bool:
    """Whether both give the same output for a short text. Sets what the module passes to its attention in the fused one."""
    qkv = fused.input
    generator = torch.Generator().manual_seed(qkv.num_in)
    states = torch.randn(1, NUM_TOKENS, qkv.num_in, generator=generator).to(qkv.dtype)
    angles = torch.rand(1, NUM_TOKENS, shape.key_dim // 2, generator=generator).mul(6.0).repeat(1, 1, 2)
    inputs = {"position_embeddings": (angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype)), "attention_mask": None}
    recorder = _Recorder()
    try:
        with _attending(module):
            expected = module(states, **inputs, headstart=_metadata(fused.layer_idx, shape, qkv.dtype, recorder))
        assert _Recorder.params is not None
        fused.params = _Recorder.params
        actual = fused(states, **inputs, headstart=_metadata(fused.layer_idx, shape, qkv.dtype, CompiledAttention()))
    except (AssertionError, AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(expected, tuple) or len(expected) != 2:
        return False
    expected, actual = expected[0].float(), actual[0].float()
    limit = TOLERANCE[qkv.dtype] * float(expected.abs().max())
    return expected.shape == actual.shape and float((expected - actual).abs().max()) <= limit  # false for nan


def _metadata(layer: int, shape: LayerShape, dtype: torch.dtype, kernel: RowsKernel) -> AttentionMetadata:
    """Of a text at the start of an empty cache."""
    seating = Seating(1, NUM_TOKENS)
    seating.take(NUM_TOKENS)
    row = RowMask(0, NUM_TOKENS, 0, 0, None, torch.arange(NUM_TOKENS))
    return AttentionMetadata([row], KVCache([shape] * (layer + 1), seating, "cpu", dtype), kernel, [Window()] * (layer + 1))


@contextmanager
def _attending(module: nn.Module) -> Iterator[None]:
    """A context in which a module calls this package's attention function."""
    attention.register()
    config: Any = module.config
    before = config._attn_implementation_internal
    config._attn_implementation_internal = attention.NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
