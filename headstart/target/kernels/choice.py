"""The choice of a target's kernels on this machine, made once when it is loaded; never by measured times.

Packing and fusing change speed only. Exactness to the bit also needs linears whose bits for a row do not depend on the other
rows, which holds for products of some numbers of rows, and attention with one order of addition: both are tested here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from headstart.target.attention import Kernel, RowsKernel, torch_attention
from headstart.target.cache import LayerShape
from headstart.target.kernels.attention import is_order_proof, ordered, wide
from headstart.target.kernels.compiled_attention import CompiledAttention
from headstart.target.kernels.fuse import fuse
from headstart.target.kernels.fused_attention import fuse_attention
from headstart.target.kernels.invariance import Kind, RowRange, kind_of, row_ranges
from headstart.target.kernels.library import library
from headstart.target.kernels.linear import PackedLinear, is_all_compiled, prepack, quantise
from headstart.target.kernels.onednn import OneDnnPack, joined, row_groups

EXACT_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class KernelChoice:
    """The kernels of a target.

    kernel: attention of one row, or of all.
    min_nodes: smallest number of nodes in a forward; dead nodes fill a forest up to it.
    is_exact: whether logits are guaranteed to have the same bits in a forest and one token at a time.
    why_not: what prevents exactness; None where it is exact.
    is_compiled: whether the compiled kernels multiply by every matrix of the model, so that torch needs one thread only.
    grouped: plain linears whose `forward` multiplies rows in groups, until `ungroup`.
    """

    kernel: Kernel | RowsKernel
    min_nodes: int
    is_exact: bool
    why_not: str | None = None
    is_compiled: bool = False
    grouped: tuple[nn.Module, ...] = ()

    @property
    def instructions(self) -> str | None:
        """The instructions that the compiled attention uses, such as "amx"; None with torch's attention."""
        lib = library() if isinstance(self.kernel, CompiledAttention) else None
        return None if lib is None else lib.level


def choose_kernels(
    model: nn.Module,
    heads: int,
    shapes: Sequence[LayerShape],
    exact: bool | str,
    pack: bool = True,
    weights: str = "stored",
) -> KernelChoice:
    """Choose the kernels of a model.

    model: a causal LM. Where `pack` is True and it is on the CPU, its modules are fused and packed in place first.
    heads: number of query heads.
    shapes: what each layer stores per token.
    exact: True: equality to the bit; "auto": equality to the bit where it is available; False: the fastest kernels.
    weights: "int8": round the weights of all linears, see `quantise`; "stored": keep them.
    Raises ValueError where exact is True and equality to the bit is not available, and where weights cannot be rounded.
    """
    parameter = next(model.parameters())
    if pack and parameter.device.type == "cpu":
        fuse(model)
        prepack(model)
        fuse_attention(model)
    if weights == "int8":
        quantise(model)
    compiled = CompiledAttention() if CompiledAttention.fits(shapes, parameter.dtype, parameter.device) else None
    fastest, is_compiled = compiled or torch_attention, compiled is not None and is_all_compiled(model)
    if exact is False:
        return inexact(exact, "exact=False was asked for", fastest, is_compiled)
    if parameter.device.type != "cpu" or parameter.dtype not in EXACT_DTYPES:
        dtype = str(parameter.dtype).removeprefix("torch.")
        why_not = f"it is for CPU in bfloat16 or float32, and the model is in {dtype} on {parameter.device.type}"
        return inexact(exact, why_not, fastest, is_compiled)
    ranges = row_ranges(model.modules())
    if ranges is None:
        why_not = "in linears or experts of this model, the bits of a row depend on the other rows"
        return inexact(exact, why_not, fastest, is_compiled)
    min_nodes = max((row_range.least for row_range in ranges.values()), default=1)
    if compiled:
        return KernelChoice(compiled, min_nodes, True, is_compiled=is_compiled, grouped=_group(model, ranges))
    threads = torch.get_num_threads()
    is_proof = all(_is_order_proof(heads, shape, parameter.dtype, threads) for shape in dict.fromkeys(shapes))
    return KernelChoice(ordered if is_proof else wide, min_nodes, True, grouped=_group(model, ranges))


def inexact(
    exact: bool | str, why_not: str, kernel: Kernel | RowsKernel = torch_attention, is_compiled: bool = False
) -> KernelChoice:
    """The choice of kernels without exactness.

    exact: as for `choose_kernels`. why_not: what prevents exactness. kernel, is_compiled: as in `KernelChoice`.
    Raises ValueError where exact is True.
    """
    if exact is True:
        raise ValueError(f"exact=True is not available: {why_not}; leave exact at its default, or see docs/concepts.md")
    return KernelChoice(kernel, 1, False, why_not, is_compiled)


def ungroup(kernel_choice: KernelChoice) -> None:
    """Undo the grouping of plain linears: they multiply all their rows at once again."""
    for linear in kernel_choice.grouped:
        vars(linear).pop("forward", None)


@cache
def _is_order_proof(heads: int, shape: LayerShape, dtype: torch.dtype, threads: int) -> bool:
    """`is_order_proof`, measured once per process and number of threads."""
    return is_order_proof(heads, shape.kv_heads, shape.key_dim, shape.value_dim, dtype)


def _group(model: nn.Module, ranges: dict[Kind, RowRange]) -> tuple[nn.Module, ...]:
    """Keep each linear's products within its range of rows; returns the plain ones, whose `forward` is replaced until `ungroup`."""
    plain: list[nn.Module] = []
    for module in model.modules():
        kind = kind_of(module)
        if kind is None:
            continue
        row_range = ranges[kind]
        if isinstance(module, PackedLinear):
            assert isinstance(module.pack, OneDnnPack), "compiled linears have no limits"
            module.pack.least_rows, module.pack.most_rows = row_range.least, row_range.most
        else:
            module.forward = partial(_in_groups, module, row_range)
            plain.append(module)
    return tuple(plain)


def _in_groups(linear: nn.Module, row_range: RowRange, x: Tensor) -> Tensor:
    """The output of a plain linear, [..., in] -> [..., out], in products whose number of rows is in the range."""
    forward = type(linear).forward
    if row_range.least <= x.numel() // x.shape[-1] <= row_range.most:
        y: Tensor = forward(linear, x)
        return y
    return joined([forward(linear, rows) for rows in row_groups(x, row_range.least, row_range.most)], x)
