"""Does a row of a linear come out with the same bits whatever the other rows are? Measured, for linears of given shapes.

Random numbers hide the difference: two orders of addition differ in the eighth digit, and bf16 shows three. The sums tested
here cancel to nothing but their rounding errors, so that any change of order shows in almost every value.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.kernels.linear import Pack, PackedLinear, is_plain, weight_and_bias

SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 32, 33, 64, 65, 128, 256, 512)
MAX_WEIGHTS = 2**23  # of a tested matrix; a wider vocabulary repeats the same blocks


def smallest_invariant_size(linears: Iterable[nn.Module], sizes: Sequence[int] = SIZES) -> int | None:
    """The smallest number of rows from which on every tested number gives each row the same bits; None if there is none.

    One linear of each distinct shape and kind is tested, with weights of its own making. None also where a module multiplies by
    a matrix that is no plain linear's, as experts and routers do: how many rows meet there is not the forest's to say.
    """
    modules = list(linears)
    if any(map(multiplies_by_itself, modules)):
        return None
    failing = {size for linear in distinct(modules) for size in varying_sizes(linear, sizes)}
    confirmed = sorted(sizes)[:-1]  # the largest is what the others are compared with
    return next((size for size in confirmed if all(size > other for other in failing)), None)


def multiplies_by_itself(module: nn.Module) -> bool:
    """Whether a module owns a matrix, or a stack of them, and is neither an embedding nor a linear that can be tested."""
    if isinstance(module, nn.Embedding | PackedLinear) or is_plain(module):
        return False
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


def distinct(linears: Iterable[nn.Module]) -> list[tuple[int, int, torch.dtype, bool]]:
    """(out, in, dtype, packed) of each kind of linear among the modules, once."""
    kinds: dict[tuple[int, int, torch.dtype, bool], None] = {}
    for linear in linears:
        if isinstance(linear, PackedLinear):
            kinds[sum(linear.pack.sizes), linear.in_features, linear.pack.packed.dtype, True] = None
        elif is_plain(linear):
            weight, _ = weight_and_bias(linear)
            kinds[weight.shape[0], weight.shape[1], weight.dtype, False] = None
    return list(kinds)


def varying_sizes(kind: tuple[int, int, torch.dtype, bool], sizes: Sequence[int] = SIZES) -> list[int]:
    """The numbers of rows at which a linear of this kind gives some row other bits than among the most rows."""
    num_out, num_in, dtype, packed = kind
    num_out = min(num_out, MAX_WEIGHTS // num_in)
    generator = torch.Generator().manual_seed(num_in)

    def draw(count: int, sign: int) -> Tensor:
        half = torch.randn(count, num_in // 2, generator=generator)
        return torch.cat([half, sign * half, half.new_zeros(count, num_in % 2)], 1).to(dtype)

    weight, rows = draw(num_out, -1), draw(max(sizes), 1)
    multiply: Callable[[Tensor], Tensor] = Pack([weight], [None]) if packed else lambda x: F.linear(x, weight)
    with torch.inference_mode():
        wanted = multiply(rows[None])[0]
        return [size for size in sizes if not torch.equal(multiply(rows[None, :size])[0], wanted[:size])]
