"""Which kernels a target runs with on this machine, decided once when it is loaded, by what is true of them and never by time.

Packing and fusing change speed only. Exactness to the bit also needs linears that treat each row alike whatever the others are,
in products of some numbers of rows, and attention with one order of addition: both are measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from headstart.target.attention import Kernel, torch_attention
from headstart.target.cache import LayerShape
from headstart.target.kernels.attention import is_order_proof, ordered, wide
from headstart.target.kernels.fuse import fuse
from headstart.target.kernels.invariance import Kind, RowRange, kind_of, row_ranges
from headstart.target.kernels.linear import PackedLinear, joined, prepack, row_groups

EXACT_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class KernelChoice:
    """What a target runs with. min_nodes: dead nodes fill a forest up to it. is_exact: whether equality to the bit is promised.

    why_not: what stands against exactness, or None. grouped: plain linears that were told to multiply their rows in groups.
    """

    kernel: Kernel
    min_nodes: int
    is_exact: bool
    why_not: str | None = None
    grouped: tuple[nn.Module, ...] = ()


def choose_kernels(
    model: nn.Module, heads: int, shapes: Sequence[LayerShape], exact: bool | str, pack: bool = True
) -> KernelChoice:
    """Choose kernels. pack: pack the model's linears in place first.

    heads: query heads. exact: True, False, or "auto" for wherever it can be had. Raises ValueError where exactness is demanded
    and cannot be had.
    """
    parameter = next(model.parameters())
    if pack and parameter.device.type == "cpu":
        fuse(model)
        prepack(model)
    if exact is False:
        return KernelChoice(torch_attention, 1, False, why_not="exact=False was asked for")
    if parameter.device.type != "cpu" or parameter.dtype not in EXACT_DTYPES:
        dtype = str(parameter.dtype).removeprefix("torch.")
        return inexact(exact, f"it is for CPU in bfloat16 or float32, and the model is in {dtype} on {parameter.device.type}")
    ranges = row_ranges(model.modules())
    if ranges is None:
        return inexact(exact, "linears or experts of this model give a row other bits when other rows are beside it")
    threads = torch.get_num_threads()
    is_proof = all(_is_order_proof(heads, shape, parameter.dtype, threads) for shape in dict.fromkeys(shapes))
    min_nodes = max((own.least for own in ranges.values()), default=1)
    return KernelChoice(ordered if is_proof else wide, min_nodes, True, grouped=_group(model, ranges))


def inexact(exact: bool | str, why_not: str) -> KernelChoice:
    """Kernels without exactness, and the reason. Raises ValueError where exactness is demanded."""
    if exact is True:
        raise ValueError(f"exact=True is not to be had: {why_not}; leave exact at its default, or see docs/concepts.md")
    return KernelChoice(torch_attention, 1, False, why_not=why_not)


def ungroup(kernel_choice: KernelChoice) -> None:
    """Let the plain linears multiply all their rows at once again."""
    for linear in kernel_choice.grouped:
        vars(linear).pop("forward", None)


@cache
def _is_order_proof(heads: int, shape: LayerShape, dtype: torch.dtype, threads: int) -> bool:
    """Measured once per process; threads: what it depends on besides the machine."""
    return is_order_proof(heads, shape.kv_heads, shape.key_dim, shape.value_dim, dtype)


def _group(model: nn.Module, ranges: dict[Kind, RowRange]) -> tuple[nn.Module, ...]:
    """Keep each linear's products within its range; returns the plain ones, whose `forward` is covered until `ungroup`."""
    plain: list[nn.Module] = []
    for module in model.modules():
        kind = kind_of(module)
        if kind is None:
            continue
        own = ranges[kind]
        if isinstance(module, PackedLinear):
            module.pack.least_rows, module.pack.most_rows = own.least, own.most
        else:
            module.forward = partial(_in_groups, module, own)
            plain.append(module)
    return tuple(plain)


def _in_groups(linear: nn.Module, own: RowRange, x: Tensor) -> Tensor:
    """A plain linear, [..., in] -> [..., out], in products of no more and no fewer rows than its range."""
    forward = type(linear).forward
    if own.least <= x.numel() // x.shape[-1] <= own.most:
        y: Tensor = forward(linear, x)
        return y
    return joined([forward(linear, rows) for rows in row_groups(x, own.least, own.most)], x)
