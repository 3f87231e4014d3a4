"""Noise that can be asked for at any place: counter-based, keyed by (seed, position, token).

The bits come from integer arithmetic and are the same on every device, batch and order; only the logarithms may differ between
devices, in the last place. This file knows integers and Gumbels. It refuses to know what they decide.
"""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit integers: torch has no unsigned arithmetic.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_MASK = 2**64 - 1


def draw_seed() -> int:
    """64 fresh bits, for a request that names no seed."""
    return secrets.randbits(64)


def mix(seed: int, index: int) -> int:
    """The seed of sample or prompt `index`, so that several answers to one request do not share noise."""
    return _scramble_int((_scramble_int(seed & _MASK) + (index + 1) * 0x9E3779B97F4A7C15) & _MASK)


def _scramble_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _scramble(value: Tensor) -> Tensor:
    """SplitMix64's finaliser in place, on int64 seen as unsigned (`>>` is arithmetic in torch, hence the masks)."""
    value.bitwise_xor_((value >> 30).bitwise_and_((1 << 34) - 1)).mul_(_MIX_1)
    value.bitwise_xor_((value >> 27).bitwise_and_((1 << 37) - 1)).mul_(_MIX_2)
    return value.bitwise_xor_((value >> 31).bitwise_and_((1 << 33) - 1))


def noise_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """One key for each (seed, position), both int64 of a common shape: the state from which that position's noise counts on."""
    return _scramble(_scramble(seeds.clone()) + (positions + 1) * _GOLDEN)


def noise_key(seed: int, position: int) -> int:
    """`noise_keys` for one pair, on the host, as a signed integer."""
    return signed(_scramble_int((_scramble_int(seed & _MASK) + (position + 1) * _GOLDEN) & _MASK))


def uniform_bits(keys: Tensor, ids: Tensor) -> Tensor:
    """32 random bits for every (key, token), in an int64: SplitMix64's stream of `key`, read at `ids`."""
    value = keys + (ids + 1) * _GOLDEN
    value.bitwise_xor_((value >> 30).bitwise_and_((1 << 34) - 1)).mul_(_MIX_1)
    value.bitwise_xor_((value >> 27).bitwise_and_((1 << 37) - 1)).mul_(_MIX_2)
    return (value >> 32).bitwise_and_(0xFFFFFFFF)  # the high half is mixed well without the last xor


def uniform(keys: Tensor, ids: Tensor) -> Tensor:
    """float64 in (0, 1), one for every (key, id)."""
    return (uniform_bits(keys, ids).double() + 0.5) * 2.0**-32


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, one for every (key, token).

    keys and ids broadcast: [rows, 1] and [vocab] give [rows, vocab]. `-log(-log1p(-w))` keeps its precision where noise is
    large, which is where it decides; at the other end it is cut at -2.8, a change of the distribution of less than 2^-24.
    """
    w = uniform_bits(keys, ids).to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return w.neg_().log1p_().neg_().log_().neg_()


def signed(seed: int) -> int:
    """The signed 64-bit integer with the same bits, for tensors."""
    seed &= _MASK
    return seed - 2**64 if seed >= 2**63 else seed
