"""Ctrl-C and the end of a job's time, noticed between two steps: never in the middle of one.

This file knows signals.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Within `with`, a first Ctrl-C or SIGTERM only sets `is_pulled`; a second one interrupts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.is_pulled = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # elsewhere, signals are not ours to take
            self._before = {number: signal.signal(number, self._pull) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pull(self, number: int, frame: FrameType | None) -> None:
        if self.is_pulled:
            raise KeyboardInterrupt
        self.is_pulled = True
