"""Tests of whether a linear gives a row the same bits whatever the other rows are, and for which numbers of rows.

Random inputs would hide a difference: two orders of addition differ in the eighth digit, and bf16 has three. The sums tested here
cancel to their rounding errors, so that any change of the order shows in almost every value.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from headstart.target.kernels.compiled import CompiledPack
from headstart.target.kernels.linear import PackedLinear, is_packable, weight_and_bias
from headstart.target.kernels.onednn import OneDnnPack

USUAL = 16  # rows of the product that all others are compared with, as in a typical tree
SIZES = (*range(1, 34), 48, 64, 65, 96, 128, 256)  # tested numbers of rows
MAX_WEIGHTS = 2**23  # of a tested matrix; a larger vocabulary repeats the same blocks


@dataclass(frozen=True)
class Kind:
    """Everything that a linear's choice of kernel can depend on.

    num_out, num_in: width of output and input.
    dtype: of the weight.
    is_packed: whether it is a `PackedLinear` of oneDNN.
    has_bias: whether a bias is added.
    is_transposed: whether the weight is stored as [in, out], as in GPT-2's `Conv1D`.
    """

    num_out: int
    num_in: int
    dtype: torch.dtype
    is_packed: bool
    has_bias: bool = False
    is_transposed: bool = False


@dataclass(frozen=True)
class RowRange:
    """Numbers of rows for which a product gives each row the same bits: from `least` to `most`, both included."""

    least: int
    most: int


def row_ranges(modules: Iterable[nn.Module]) -> dict[Kind, RowRange] | None:
    """The range of rows of each kind of linear among the modules, tested with generated weights, once per process.

    None where a linear has no range, and where a module multiplies by a matrix outside a linear, as experts and routers do: the
    forest does not determine how many rows meet there.
    """
    modules = list(modules)
    if any(map(multiplies_by_itself, modules)):
        return None
    ranges: dict[Kind, RowRange] = {}
    for kind in distinct(modules):
        rows = _measured(kind, torch.get_num_threads())
        if rows is None:
            return None
        ranges[kind] = rows
    return ranges


@cache
def _measured(kind: Kind, threads: int) -> RowRange | None:
    """The range of rows of a kind of linear, measured once per process and number of threads."""
    return row_range(varying_sizes(kind))


def row_range(varying: Sequence[int], sizes: Sequence[int] = SIZES) -> RowRange | None:
    """The range of tested numbers of rows around `USUAL` without a varying one; None where `USUAL` itself varies.

    varying: numbers of rows at which bits differ. sizes: the tested numbers of rows.
    """
    if USUAL in varying:
        return None
    below = [size for size in varying if size < USUAL]
    above = [size for size in varying if size > USUAL]
    run = [size for size in sizes if (not below or size > max(below)) and (not above or size < min(above))]
    return RowRange(min(run), max(run))


def multiplies_by_itself(module: nn.Module) -> bool:
    """Whether a module owns a matrix, or several in one parameter, and is neither an embedding nor a linear that can be tested."""
    if isinstance(module, nn.Embedding | PackedLinear) or is_packable(module):
        return False
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


def distinct(modules: Iterable[nn.Module]) -> list[Kind]:
    """Each kind of linear among the modules, once."""
    return list(dict.fromkeys(kind for kind in map(kind_of, modules) if kind is not None))


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a linear; None for any other module, and for compiled linears, which have no limits."""
    if isinstance(module, PackedLinear):
        pack = module.pack
        if isinstance(pack, CompiledPack):
            return None
        return Kind(sum(pack.sizes), pack.num_in, pack.dtype, True, pack.bias is not None)
    if is_packable(module):
        weight, bias = weight_and_bias(module)
        return Kind(weight.shape[0], weight.shape[1], weight.dtype, False, bias is not None, isinstance(module, Conv1D))
    return None


def varying_sizes(kind: Kind, sizes: Sequence[int] = SIZES) -> list[int]:
    """The numbers of rows at which a linear of this kind gives some row other bits than in a product of `USUAL` rows.

    `USUAL` is among them where a row's bits depend on its index.
    """
    num_out, num_in = min(kind.num_out, MAX_WEIGHTS // kind.num_in), kind.num_in
    generator = torch.Generator().manual_seed(num_in)

    def draw(count: int, sign: int) -> Tensor:
        half = torch.randn(count, num_in // 2, generator=generator)
        return torch.cat([half, sign * half, half.new_zeros(count, num_in % 2)], 1).to(kind.dtype)

    weight, rows = draw(num_out, -1), draw(max(sizes), 1)
    multiply = _product_of(kind, weight, weight.new_zeros(num_out) if kind.has_bias else None)
    with torch.inference_mode():
        expected = torch.cat([multiply(rows[None, first : first + USUAL])[0] for first in range(0, max(sizes) - USUAL + 1, USUAL)])
        varying = [size for size in sizes if not torch.equal(multiply(rows[None, :size])[0], expected[:size])]
        backwards = multiply(rows[None, :USUAL].flip(1))[0].flip(0)
    return varying if torch.equal(backwards, expected[:USUAL]) else sorted({*varying, USUAL})


def _product_of(kind: Kind, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The function [1, rows, in] -> [1, rows, out] of a linear of this kind."""
    if kind.is_packed:
        return OneDnnPack([weight], [bias])
    if not kind.is_transposed:
        return lambda x: F.linear(x, weight, bias)
    stored, added = weight.T.contiguous(), weight.new_zeros(len(weight))
    return lambda x: torch.addmm(added, x[0], stored)[None]  # no new module: that would draw from torch's generator
