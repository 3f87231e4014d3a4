"""Confidence intervals of paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval at `LEVEL`."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def over_seeds(differences: Sequence[float]) -> Interval:
    """The interval over other seeds, by Student's t with n - 1 degrees of freedom. Raises ValueError for a single seed."""
    if len(differences) < 2:
        raise ValueError(f"an interval needs two seeds or more, and there is {len(differences)}; run more seeds")
    mean = float(np.mean(differences))
    half_width = float(t.ppf((1 + LEVEL) / 2, len(differences) - 1) * np.std(differences, ddof=1) / np.sqrt(len(differences)))
    return Interval(mean, mean - half_width, mean + half_width)


def over_documents(differences: np.ndarray, counts: np.ndarray, samples: int = 2000, seed: int = 0) -> Interval:
    """The interval over other documents with the same trunks, by bootstrap.

    differences: summed over the tokens of each document, [documents].
    counts: tokens of each document, [documents].
    """
    generator, documents = np.random.default_rng(seed), len(counts)
    drawn = generator.multinomial(documents, np.full(documents, 1 / documents), size=samples)  # [samples, documents]
    means = (drawn @ differences) / (drawn @ counts)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(differences.sum() / counts.sum()), float(low), float(high))
