"""The packed linears, gated MLPs and RMS norms of the compiled kernels in `cpp/`, for x86 processors with AVX-512.

A row's bits depend on that row only, in every product and every norm, and on its own ancestors in attention: by the way the sums
are written, for any number of rows and threads. Where the library is not there, and for dtypes and shapes that it does not have,
the kernels of torch are used. This module must not import models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.target.kernels.library import library
from headstart.target.kernels.memory import huge_pages

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
BLOCK, GROUP, STEP = 64, 16, 64  # outputs of a block and of a group, bytes of inputs in a step, as in cpp/kernels.hpp
ACTIVATIONS = {"swish": 1, "gelu_tanh": 2, "gelu": 3}
MOST_INPUTS = 2**17  # of an int8 weight


class _Linear(ctypes.Structure):
    """`Linear` of cpp/kernels.hpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("offsets", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64), ("dtype", ctypes.c_int32), ("is_int8", ctypes.c_int32),
        ("is_gated", ctypes.c_int32), ("activation", ctypes.c_int32),
    )  # fmt: skip


class CompiledPack:
    """Linears that read the same input, packed as one for the library. `dense` unpacks one, with the same bits.

    Attributes:
    sizes: output width of each member.
    bias: [sum of sizes], zeros for members without one; None where no member has one.
    packed: the weight in the library's layout, padded.
    scale: [packed outputs] float32, the factor of each output's int8 weights; None where the weights are in `dtype`.
    dtype: of weight, input and output.
    width: output width of a product: the sum of `sizes`, or, with a gate, that of one member.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str = "") -> None:
        """weights: each [out, in], of one dtype and on the CPU. biases: each [out] or None.

        activation: of the gate, for a gate and a value of equal shape, which are multiplied; "": the members side by side.
        """
        lib = library()
        assert lib is not None, "the compiled kernels are not there"
        self._library = lib
        self.dtype = weights[0].dtype
        self.sizes = [weight.shape[0] for weight in weights]
        self.num_in = weights[0].shape[1]
        self.activation = activation
        self.width = self.sizes[0] if activation else sum(self.sizes)
        per_block = BLOCK // len(weights) if activation else BLOCK
        self._padded_outputs = -(-self.width // per_block) * BLOCK
        self.packed = self._packed([weight.detach() for weight in weights])
        self.scale: Tensor | None = None
        self.bias: Tensor | None = None
        self._placed_bias: Tensor | None = None
        self._offsets: Tensor | None = None
        if any(bias is not None for bias in biases):
            filled = [
                weight.new_zeros(size) if bias is None else bias.detach()
                for weight, bias, size in zip(weights, biases, self.sizes, strict=True)
            ]
            self.bias, self._placed_bias = torch.cat(filled), self._placed(filled)
        self._linear = _Linear(
            self.packed.data_ptr(), None, None, None if self._placed_bias is None else self._placed_bias.data_ptr(), self.num_in,
            self.width, DTYPES[self.dtype], 0, bool(activation), ACTIVATIONS.get(activation, 0),
        )  # fmt: skip
        self.address = ctypes.addressof(self._linear)

    def quantise(self) -> None:
        """Round the weights to int8, with one factor per output; for a bf16 pack. An output's largest weight becomes 127."""
        assert self.dtype == torch.bfloat16, "only bf16 weights are rounded to int8"
        assert self.num_in <= MOST_INPUTS, "sums of so many bytes could exceed 32 bits"
        if self.scale is not None:
            return  # they are rounded already, and again would change them
        weights = [self.dense(member).float() for member in range(len(self.sizes))]
        factors = [weight.abs().amax(1).clamp(min=1e-30) / 127 for weight in weights]
        rounded = [(weight / factor[:, None]).round().to(torch.int8) for weight, factor in zip(weights, factors, strict=True)]
        self.packed, self.scale = self._packed(rounded), self._placed(factors)
        self._offsets = self._placed([weight.sum(1, dtype=torch.int32) * -128 for weight in rounded]).to(torch.int32)
        self._linear.weight, self._linear.scale, self._linear.is_int8 = self.packed.data_ptr(), self.scale.data_ptr(), 1
        self._linear.offsets = self._offsets.data_ptr()

    def _packed(self, weights: Sequence[Tensor]) -> Tensor:
        """The members' weights, each [out, in], in the library's layout."""
        step = 1 if self.dtype == torch.float32 else STEP // weights[0].element_size()
        depth = -(-self.num_in // step) * step
        packed = huge_pages(self._padded_outputs * depth, weights[0].dtype)
        for member, weight in enumerate(weights):
            self._move(weight.contiguous(), member, packed, is_back=False)
        return packed

    def use(self, activation: str) -> None:
        """Choose another activation of the gate, one of `ACTIVATIONS`."""
        self.activation, self._linear.activation = activation, ACTIVATIONS[activation]

    def _place(self, member: int) -> tuple[int, int]:
        """The first packed output of a member, and the distance between its groups of 16."""
        return (GROUP * member, GROUP * len(self.sizes)) if self.activation else (sum(self.sizes[:member]), GROUP)

    def _move(self, plain: Tensor, member: int, packed: Tensor, is_back: bool) -> None:
        first, stride = self._place(member)
        self._library.pack(plain.element_size(), plain.data_ptr(), *plain.shape, first, stride, packed.data_ptr(), is_back)

    def _outputs(self, member: int) -> Tensor:
        """[out] the packed output of each output of a member."""
        first, stride = self._place(member)
        outputs = torch.arange(self.sizes[member])
        return first + outputs // GROUP * stride + outputs % GROUP

    def _placed(self, values: Sequence[Tensor]) -> Tensor:
        """[packed outputs] float32, from one value for each output of each member."""
        placed = torch.zeros(self._padded_outputs)
        for member, value in enumerate(values):
            placed[self._outputs(member)] = value.float()
        return placed

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., width]: all members side by side, or activation(gate) * value; rounded once.

        Raises ValueError where gradients are required, or for an input of another dtype or width.
        """
        x = self.checked(x)
        y = x.new_empty(*x.shape[:-1], self.width)
        self._library.linear(self.address, x.data_ptr(), x.numel() // self.num_in, y.data_ptr())
        return y

    def checked(self, x: Tensor) -> Tensor:
        """The input, contiguous. Raises as `__call__` does."""
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("packed linears have no gradients; load the target without kernels to train through it")
        if x.dtype is not self.dtype or x.shape[-1] != self.num_in or x.device.type != "cpu":
            raise ValueError(
                f"a packed linear of {self.num_in} inputs in {self.dtype} on the CPU got {x.shape[-1]} in {x.dtype} on {x.device}"
            )
        return x.contiguous()

    def dense(self, member: int) -> Tensor:
        """The plain weight of one member, [out, in], unpacked at every call."""
        plain = torch.empty(self.sizes[member], self.num_in, dtype=self.packed.dtype)
        self._move(plain, member, self.packed, is_back=True)
        return plain if self.scale is None else (plain * self.scale[self._outputs(member)][:, None]).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, which is padded, and of what belongs to its outputs."""
        return sum(part.nbytes for part in (self.packed, self.scale, self._offsets, self._placed_bias) if part is not None)


def compiled_mlp(gate_up: CompiledPack, down: CompiledPack, x: Tensor) -> Tensor:
    """[..., hidden] -> [..., hidden]: down(activation(gate(x)) * up(x)), in one call."""
    x = gate_up.checked(x)
    rows = x.numel() // gate_up.num_in
    between, y = x.new_empty(rows, gate_up.width), x.new_empty(*x.shape[:-1], down.width)
    gate_up._library.mlp(gate_up.address, down.address, x.data_ptr(), rows, between.data_ptr(), y.data_ptr())
    return y


def compiled_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., width] -> [..., width]: x / rms(x) * weight. weight: [width] float32.

    Raises ValueError for an input of another width or device.
    """
    lib = library()
    assert lib is not None, "the compiled kernels are not there"
    width = weight.shape[0]
    if x.shape[-1] != width or not x.is_cpu:
        raise ValueError(f"an RMS norm of {width} values on the CPU got {x.shape[-1]} on {x.device}")
    x = x.contiguous()
    y = torch.empty_like(x)
    lib.norm(DTYPES[x.dtype], x.data_ptr(), x.numel() // width, width, weight.data_ptr(), eps, y.data_ptr())
    return y
