"""Counter-based random noise: a function of (seed, position, token), with no state. Imports torch only.

The bits come from integer arithmetic and do not depend on device, batch or order. Only the logarithms may differ between devices,
in the last digit.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit integers: torch has no unsigned arithmetic.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_MASK = 2**64 - 1

BLOCK_VALUES, MOST_BLOCKS = 2**15, 8  # values of a block of `NoiseOfTexts`, which a processor's cache holds, and blocks per text


def draw_seed() -> int:
    """A random 64-bit seed, for a request without one."""
    return secrets.randbits(64)


def mix(seed: int, index: int) -> int:
    """The seed of answer or prompt number `index` of a request, so that its answers do not share noise."""
    return _scramble_int((_scramble_int(seed & _MASK) + (index + 1) * 0x9E3779B97F4A7C15) & _MASK)


def _scramble_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _scramble(value: Tensor) -> Tensor:
    """SplitMix64's finaliser in place, on int64 taken as unsigned (`>>` is arithmetic in torch, hence the masks)."""
    value.bitwise_xor_((value >> 30).bitwise_and_((1 << 34) - 1)).mul_(_MIX_1)
    value.bitwise_xor_((value >> 27).bitwise_and_((1 << 37) - 1)).mul_(_MIX_2)
    return value.bitwise_xor_((value >> 31).bitwise_and_((1 << 33) - 1))


def noise_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """One key per (seed, position): the state from which that position's noise is counted.

    seeds, positions: int64 of one shape, which the keys have too.
    """
    return _scramble(_scramble(seeds.clone()) + (positions + 1) * _GOLDEN)


def noise_key(seed: int, position: int) -> int:
    """The key of one (seed, position), as `noise_keys` makes it, computed on the host; a signed integer."""
    return signed(_scramble_int((_scramble_int(seed & _MASK) + (position + 1) * _GOLDEN) & _MASK))


def uniform_bits(keys: Tensor, ids: Tensor) -> Tensor:
    """32 random bits per (key, id), in int64: SplitMix64's stream of each key, read at `ids`.

    keys, ids: int64; they broadcast.
    """
    value = keys + (ids + 1) * _GOLDEN
    value.bitwise_xor_((value >> 30).bitwise_and_((1 << 34) - 1)).mul_(_MIX_1)
    value.bitwise_xor_((value >> 27).bitwise_and_((1 << 37) - 1)).mul_(_MIX_2)
    return (value >> 32).bitwise_and_(0xFFFFFFFF)  # the high half is mixed well without the last xor


def uniform(keys: Tensor, ids: Tensor) -> Tensor:
    """Uniform random numbers in (0, 1), float64, one per (key, id). keys, ids: int64; they broadcast."""
    return (uniform_bits(keys, ids).double() + 0.5) * 2.0**-32


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, one value per (key, token).

    keys, ids: int64; they broadcast: [rows, 1] and [vocab] give [rows, vocab].
    `-log(-log1p(-w))` is precise where the noise is large, and only there does it decide. The smallest value is cut at -2.8, which
    changes the distribution by less than 2^-24.
    """
    w = uniform_bits(keys, ids).to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return w.neg_().log1p_().neg_().log_().neg_()


class NoiseOfTexts:
    """Gumbel noise of several seeds by position, made for a block of positions at a time and kept for later rounds.

    A round asks for positions that an earlier round drafted in vain, and making many positions at once takes little longer than
    making one.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, int], Tensor] = {}  # by seed and first position: [1, vocab] per position

    def at(self, places: Sequence[tuple[int, int]], vocab: int, device: torch.device) -> Tensor:
        """[places, vocab] noise of each (seed, position)."""
        count = max(1, min(8, BLOCK_VALUES // vocab))
        wanted = [((seed, position - position % count), position % count) for seed, position in places]
        missing = [block for block in dict.fromkeys(block for block, _ in wanted) if block not in self._blocks]
        if missing:
            self._make(missing, count, vocab, device)
        lines = [self._blocks[block][index : index + 1] for block, index in wanted]
        while len(self._blocks) > MOST_BLOCKS * len(places):
            del self._blocks[next(iter(self._blocks))]  # the oldest
        return lines[0] if len(lines) == 1 else torch.cat(lines)

    def _make(self, blocks: Sequence[tuple[int, int]], count: int, vocab: int, device: torch.device) -> None:
        keys = [[noise_key(seed, position)] for seed, first in blocks for position in range(first, first + count)]
        noise = gumbel(torch.tensor(keys).to(device, non_blocking=True), torch.arange(vocab, device=device))
        self._blocks.update(zip(blocks, noise.split(count), strict=True))


def signed(seed: int) -> int:
    """The signed 64-bit integer with the same bits as `seed`, for int64 tensors."""
    seed &= _MASK
    return seed - 2**64 if seed >= 2**63 else seed
