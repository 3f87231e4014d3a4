"""The attention for decoder layers outside a target, such as a drafter's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headstart.target.attention import Kernel, RowsKernel, torch_attention
from headstart.target.cache import LayerShape
from headstart.target.kernels.compiled_attention import CompiledAttention


def attention_for(shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> Kernel | RowsKernel:
    """The fastest attention for these layers."""
    return CompiledAttention() if CompiledAttention.fits(shapes, dtype, device) else torch_attention
