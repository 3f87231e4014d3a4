"""Time per token and lengths of rounds, from the bursts of samples.

A round emits its tokens at once. Each of them is said to have taken the time since the tokens before, divided by the number of
tokens of that round (inter-token latency). Percentiles are over all tokens after the first. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}

Burst = tuple[int, float]  # tokens of a round, and seconds since the tokens before


def token_ms(bursts: Iterable[Burst]) -> dict[str, float]:
    """Percentiles of the time per token in milliseconds; 0 where no answer has a second token."""
    some = list(bursts)
    if not some:
        return dict.fromkeys(PERCENTILES, 0.0)
    tokens, seconds = np.array([tokens for tokens, _ in some]), np.array([seconds for _, seconds in some])
    times = np.repeat(1000 * seconds / tokens, tokens)
    return {name: float(np.percentile(times, share)) for name, share in PERCENTILES.items()}


def lengths(bursts: Iterable[Burst]) -> list[int]:
    """How many rounds of a row emitted 1 token, 2 tokens, and so on up to the most."""
    return np.bincount([tokens for tokens, _ in bursts], minlength=1)[1:].tolist() if (bursts := list(bursts)) else []
