"""Which kernels a target runs with on this machine, decided once when it is loaded.

Packing and fusing change speed only. Exactness to the bit also needs linears that treat each row alike whatever the others are,
from some number of rows on, and attention with one order of addition: both are measured here, and so is what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from headstart.attention import Kernel, fused
from headstart.cache import LayerShape
from headstart.kernels.attention import is_order_proof, ordered, wide
from headstart.kernels.fuse import fuse
from headstart.kernels.invariance import smallest_invariant_size
from headstart.kernels.linear import prepack

CHEAP = 0.05  # exactness is on by itself where it costs less than this share of a pass
EXACT_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Equipment:
    """What a target runs with. min_nodes: dead nodes fill a forest up to it. is_exact: whether equality to the bit is promised.

    cost: what exactness costs, as a share of a pass of 16 nodes behind 256 tokens, where it was measured. why_not: what stands
    against exactness on this machine, or None.
    """

    kernel: Kernel
    min_nodes: int
    is_exact: bool
    cost: float | None = None
    why_not: str | None = None


def equip(
    model: nn.Module, heads: int, shapes: Sequence[LayerShape], exact: bool | str, seconds: Callable[[Kernel, int], float]
) -> Equipment:
    """Pack the model's linears in place and choose kernels.

    heads: query heads. exact: True, False, or "auto" for where it is nearly free. seconds: times one pass with a kernel over so
    many nodes. Raises ValueError where exactness is demanded and cannot be had.
    """
    parameter = next(model.parameters())
    if parameter.device.type == "cpu":
        fuse(model)
        prepack(model)
    plainly = Equipment(fused, 1, False)
    if exact is False:
        return plainly
    kernel, min_nodes, why_not = _exact_parts(model, heads, shapes, parameter)
    if why_not is not None:
        if exact is True:
            raise ValueError(f"exact=True is not to be had: {why_not}; leave exact at its default, or see docs/concepts.md")
        return Equipment(fused, 1, False, why_not=why_not)
    cost = _cost(kernel, min_nodes, seconds)
    if exact is True or cost < CHEAP:
        return Equipment(kernel, min_nodes, True, cost)
    return Equipment(fused, 1, False, cost)


def _exact_parts(
    model: nn.Module, heads: int, shapes: Sequence[LayerShape], parameter: nn.Parameter
) -> tuple[Kernel, int, str | None]:
    """The attention kernel, the smallest forest, and what stands in the way."""
    if parameter.device.type != "cpu" or parameter.dtype not in EXACT_DTYPES:
        return fused, 1, f"it is for CPU in bf16 or fp32, and the model is in {parameter.dtype} on {parameter.device.type}"
    min_nodes = smallest_invariant_size(model.modules())
    if min_nodes is None or min_nodes > 2:
        return fused, 1, "linears or experts of this model give a row other bits when other rows are beside it"
    is_proof = all(
        is_order_proof(heads, shape.kv_heads, shape.key_dim, shape.value_dim, parameter.dtype) for shape in dict.fromkeys(shapes)
    )
    return ordered if is_proof else wide, min_nodes, None


def _cost(kernel: Kernel, min_nodes: int, seconds: Callable[[Kernel, int], float]) -> float:
    """What exactness adds, as a share of a plain pass: the larger of one node's and sixteen nodes' share."""
    pairs = ((fused, 1), (kernel, min_nodes), (fused, 16), (kernel, 16))
    times = [[seconds(*pair) for pair in pairs] for _ in range(5)]  # interleaved: other load hits all alike
    one, one_exact, many, many_exact = (min(column) for column in zip(*times, strict=True))
    return float(max(one_exact / one, many_exact / many) - 1)
