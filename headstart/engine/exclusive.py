"""Mutual exclusion for an engine: one thread works on its state, the others wait without polling."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import get_ident
from typing import TypeVar

T = TypeVar("T")


class Exclusive:
    """Runs pieces of work one at a time. Not reentrant.

    A signal (Ctrl-C) may interrupt a piece of work at any statement, and a finalizer may call `run_now` at any statement. So there
    is no lock, which either could leave held: the working thread is an entry of a dictionary, set and deleted by single operations.
    """

    def __init__(self) -> None:
        self._working: dict[str, int] = {}  # "thread": id of the thread that works
        self._bells: list[SimpleQueue[None]] = []  # one per waiting thread; each gets an item after each piece of work

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread is the one that works."""
        return self._working.get("thread") == get_ident()

    def run(self, work: Callable[[], T], unless: Callable[[], bool] | None = None) -> T | None:
        """Do the work once no other thread works. Returns its result, or None without working where `unless` became true first.

        unless: called before the work, and after each piece of work of other threads; None: never true.

        Raises RuntimeError where the calling thread works already.
        """
        me = get_ident()
        if self.is_mine:
            raise RuntimeError("this thread is in the middle of a round of the same engine; call the engine after the round")
        try:
            return work() if self._enter(me, unless) else None
        finally:
            # Nothing is called before the deletion: signal handlers run at calls, and could prevent it.
            try:
                if self._working["thread"] == me:
                    del self._working["thread"]
                    self._ring()
            except KeyError:  # no thread works
                pass

    def run_now(self, work: Callable[[], object]) -> bool:
        """Do the work if no thread works. Returns whether it was done."""
        me = get_ident()
        if self.is_mine:
            return False
        try:
            if self._working.setdefault("thread", me) != me:
                return False
            work()
            return True
        finally:
            try:
                if self._working["thread"] == me:
                    del self._working["thread"]
                    self._ring()
            except KeyError:
                pass

    def _enter(self, me: int, unless: Callable[[], bool] | None) -> bool:
        """Wait for the turn to work. Returns False where `unless` became true first."""
        bell: SimpleQueue[None] | None = None
        try:
            while True:
                if unless is not None and unless():
                    return False
                if self._working.setdefault("thread", me) == me:
                    return True
                if bell is None:  # added before the next attempt, so that no item is missed
                    bell = SimpleQueue()
                    self._bells.append(bell)
                else:
                    bell.get()
        finally:
            if bell is not None:
                self._bells.remove(bell)

    def _ring(self) -> None:
        """Let all waiting threads try again."""
        try:
            for bell in tuple(self._bells):
                bell.put(None)
        except BaseException:  # a signal handler raised: the threads must try again all the same
            for bell in tuple(self._bells):
                bell.put(None)
            raise
