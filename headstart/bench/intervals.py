"""Bootstrap confidence intervals: how far a figure may be off because the prompts are a sample of all prompts.

The prompts are drawn again with replacement, and the interval lies between two percentiles of what the draws give (percentile
bootstrap). It says nothing about how far repeated measurements of one prompt differ. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
DRAWS = 2000
SEED = 0

Floats = NDArray[np.float64]


def interval(statistic: Callable[..., Floats], *columns: Sequence[float], draws: int = DRAWS, seed: int = SEED) -> list[float]:
    """[low, high] of a statistic of sums over prompts, at `LEVEL`.

    statistic: maps the sum of each column, [draws] each, to [draws].
    columns: a number per prompt; at least one prompt. With one prompt the interval has no width.
    """
    sizes = {len(column) for column in columns}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"columns have {sorted(sizes)} prompts; each must have the same number, at least 1")
    (size,) = sizes
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), draws)
    drawn = statistic(*(counts @ np.asarray(column, float) for column in columns))
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return [float(low), float(high)]


def ratio(above: Floats, below: Floats) -> Floats:
    """above / below, 0 where that is not defined."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)
