"""Reads values of the results, each of which may be missing, and writes them for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NONE = "–"


def number(values: Mapping[str, Any], *names: str) -> float | None:
    """The finite number at `values[name][name]...`, or None."""
    value: Any = values
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def interval(values: Mapping[str, Any], name: str = "interval") -> tuple[float, float] | None:
    """The lower and the upper end of an interval, or None."""
    ends = values.get(name)
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    low, high = (number({"end": end}, "end") for end in ends)
    return None if low is None or high is None else (low, high)


def factor(value: float) -> str:
    """A ratio, as 2.31×."""
    return f"{value:.2f}×"


def span(ends: tuple[float, float]) -> str:
    """An interval of ratios, as 2.20 to 2.43."""
    return f"{ends[0]:.2f} to {ends[1]:.2f}"


def percent(share: float) -> str:
    """A share in [0, 1] in percent."""
    return f"{100 * share:.0f} %"


def digits(value: float) -> str:
    """A number with three significant digits, as 0.123, 12.3 or 1,234."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 6)}f}"


def megabytes(num_bytes: float) -> str:
    """A number of bytes in megabytes."""
    return digits(num_bytes / 1e6)


def count(value: float, singular: str) -> str:
    """A number of things, as 1 prompt or 2 prompts."""
    return f"{value:,g} {singular}{'' if value == 1 else 's'}"
