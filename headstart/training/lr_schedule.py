"""How fast a run learns at each step: warm-up, then a schedule, both functions of the step alone.

This file knows numbers between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def lr_schedule(step: int, steps: int, warmup: float, schedule: str, floor: float = 0.0) -> float:
    """The share of the learning rate that step `step` (from 0) of `steps` uses. warmup: share of the steps that lead up to 1.
    floor: what is left of 1 at the end of the schedule."""
    num_warm = round(warmup * steps)
    if step < num_warm:
        return (step + 1) / num_warm
    return floor + (1 - floor) * _SHAPES[schedule]((step - num_warm) / max(1, steps - num_warm))
