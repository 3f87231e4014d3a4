"""The learning-rate schedule: warm-up, then decay. Both depend on the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable

_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def lr_schedule(step: int, steps: int, warmup: float, schedule: str, floor: float = 0.0) -> float:
    """The share of the learning rate that a step uses, in [0, 1].

    step: counted from 0.
    steps: of the whole run.
    warmup: share of the steps in which the rate rises linearly to 1.
    schedule: "cosine", "linear" or "constant", after the warm-up.
    floor: the share at the end of the schedule.
    """
    num_warm = round(warmup * steps)
    if step < num_warm:
        return (step + 1) / num_warm
    return floor + (1 - floor) * _SHAPES[schedule]((step - num_warm) / max(1, steps - num_warm))
