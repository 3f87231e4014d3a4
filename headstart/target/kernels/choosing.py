"""The compiled choice of a level's children: what `headstart.speculation.rows.Rows.choose` does on a CPU, in one call.

Must not import models.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from headstart.speculation.distribution import SamplingTensors
from headstart.target.kernels.compiled import DTYPES
from headstart.target.kernels.library import library

MOST_CHILDREN = 64  # of one line, as in cpp/kernels.hpp


class _Choice(ctypes.Structure):
    """`Choice` of cpp/kernels.hpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "rows", "noise", "temperatures", "divisors", "top_k", "top_p", "min_p")),
        *((name, ctypes.c_void_p) for name in ("ids", "tokens", "chances")),
        *((name, ctypes.c_int64) for name in ("lines", "width", "stride", "vocab", "num_divisors", "k")),
        ("dtype", ctypes.c_int32),
    )


def choose(
    logits: Tensor, rows: Tensor, noise: Tensor | None, sampling: SamplingTensors, divisors: Tensor, k: int, ids: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The k best children of each line and their chances, as `headstart.speculation.rows.Chooser` says.

    None for what the library does not have: other dtypes than fp32 and bf16, or very many children.
    """
    lib = library()
    if lib is None or logits.dtype not in DTYPES or k > MOST_CHILDREN or not k or logits.stride(1) != 1:
        return None
    lines, width = logits.shape
    tokens, chances = torch.empty(lines, k, dtype=torch.int64), torch.empty(lines, k)
    call = _Choice(
        logits.data_ptr(), rows.data_ptr(), None, sampling.temperature.data_ptr(), divisors.data_ptr(), None, None, None, None,
        tokens.data_ptr(), chances.data_ptr(), lines, width, logits.stride(0), width, len(divisors), k, DTYPES[logits.dtype],
    )  # fmt: skip
    if noise is not None:
        call.noise, call.vocab = noise.data_ptr(), noise.stride(0)
    if sampling.is_truncated:
        call.top_k, call.top_p, call.min_p = sampling.top_k.data_ptr(), sampling.top_p.data_ptr(), sampling.min_p.data_ptr()
    if ids is not None:
        call.ids = ids.data_ptr()
    lib.children(ctypes.addressof(call))
    return tokens, chances
