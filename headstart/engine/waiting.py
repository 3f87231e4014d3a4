"""How long this process waited for a processor: a sample in which it waited was disturbed by other programs."""

from __future__ import annotations

from pathlib import Path


def waiting_seconds() -> float | None:
    """Seconds that this process's threads have waited for a processor so far; None where the system does not count it."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):
            continue  # a thread that ended meanwhile
    return total / 1e9 if total else None
