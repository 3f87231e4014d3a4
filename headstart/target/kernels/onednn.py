"""Linears packed into the layout that oneDNN multiplies fastest, through torch: for processors without compiled kernels.

This module must not import attention or KV caches.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class OneDnnPack:
    """Linears that read the same input, stacked and packed as one. The layout is opaque; `dense` unpacks it.

    Attributes:
    sizes: output width of each member.
    bias: [sum of sizes], zeros for members without one; None where no member has one.
    dtype, num_in: of the weight.
    packed: the weight in oneDNN's layout, with the shape [sum of sizes, in].
    least_rows, most_rows: limits on the rows of one product; fewer are padded, more are multiplied in several products.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """weights: each [out, in], of one dtype and on the CPU. biases: each [out] or None."""
        self.sizes = [weight.shape[0] for weight in weights]
        self.dtype, self.num_in = weights[0].dtype, weights[0].shape[1]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            self.bias = torch.cat(
                [weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in zip(weights, biases, strict=True)]
            ).detach()
        stacked = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(stacked.detach().contiguous())
        self.least_rows, self.most_rows = 1, sys.maxsize
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_by = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor, activation: str = "none", variant: str = "") -> Tensor:
        """[..., in] -> [..., sum of sizes], all members side by side; the activation is applied before rounding.

        activation, variant: as oneDNN names them. Raises ValueError where gradients are required.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("packed linears have no gradients; load the target without kernels to train through it")
        if not self.least_rows <= x.numel() // x.shape[-1] <= self.most_rows:
            parts = row_groups(x, self.least_rows, self.most_rows)
            return joined([self._multiply(part, self.packed, self.bias, activation, [], variant) for part in parts], x)
        y: Tensor = self._multiply(x, self.packed, self.bias, activation, [], variant)
        return y

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """[..., in] -> [..., sum of sizes]: the linear's output times `other`, of that shape, rounded once."""
        if not self.least_rows <= x.numel() // x.shape[-1] <= self.most_rows:
            parts = zip(*(row_groups(each, self.least_rows, self.most_rows) for each in (x, other)), strict=True)
            return joined([self._multiply_by(*both, self.packed, self.bias, "mul") for both in parts], x)
        y: Tensor = self._multiply_by(x, other, self.packed, self.bias, "mul")
        return y

    def dense(self, member: int) -> Tensor:
        """The plain weight of one member, [out, in], unpacked at every call."""
        parts: tuple[Tensor, ...] = self.packed.to_dense().split(self.sizes)
        return parts[member]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, which is padded, and of the bias."""
        return int(torch.ops.mkldnn._nbytes(self.packed)) + (0 if self.bias is None else self.bias.nbytes)


def row_groups(x: Tensor, least: int, most: int) -> list[Tensor]:
    """[..., width] -> the rows in groups of almost equal size, each [least to most, width]; padded with zeros where too few."""
    rows = x.reshape(-1, x.shape[-1])
    count = -(-rows.shape[0] // most)
    missing = count * least - rows.shape[0]
    return list((F.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows).tensor_split(count))


def joined(products: Sequence[Tensor], x: Tensor) -> Tensor:
    """The products of the `row_groups` of `x`, as one [..., out] without the padding."""
    y = torch.cat(list(products)) if len(products) > 1 else products[0]
    return y[: x.numel() // x.shape[-1]].reshape(*x.shape[:-1], -1)
