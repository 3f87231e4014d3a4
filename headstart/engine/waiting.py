"""How long this process waited for a processor, which other programs had meanwhile. Linux counts that."""

from __future__ import annotations

import time
from pathlib import Path


class Watch:
    """Measures from when it is made."""

    def __init__(self) -> None:
        self._waited = waiting_seconds()
        self._began = time.perf_counter()

    def delay(self) -> float | None:
        """The fraction of the time so far that the process waited; None where the system does not count it."""
        seconds, waited = time.perf_counter() - self._began, waiting_seconds()
        return None if self._waited is None or waited is None else (waited - self._waited) / seconds


def waiting_seconds() -> float | None:
    """Seconds that this process's threads have waited for a processor so far; None where the system does not count it."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):
            continue  # a thread that ended meanwhile
    return total / 1e9 if total else None
