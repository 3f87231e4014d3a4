"""What rounds give to requests, and the queues in which readers find it.

Knows requests by reference only. Refuses to know engines, threads and text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.engine.scheduler import Request


@dataclass(frozen=True)
class Event:
    """What a round gave a request: new tokens, which of them had been guessed, and the text that became final with them.

    finish_reason: set in a request's last event, and only there.
    error: what its text stream raised; it ended the request.
    """

    request: Request
    tokens: tuple[int, ...] = ()
    guessed: tuple[bool, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class EventQueue:
    """Events of some requests, in order. A round adds to it; a reader, in any thread, sees what was published.

    events: all of them, kept so that an answer's text can be read at any time.
    num_published: how many of them a reader may see; only rounds that count publish.
    """

    events: list[Event] = field(default_factory=list)
    num_published: int = 0

    @property
    def published(self) -> list[Event]:
        return self.events[: self.num_published]

    def publish(self) -> None:
        self.num_published = len(self.events)

    def take(self) -> list[Event]:
        """Remove what was published and return it. Raises the error of an event that has one, and leaves the others."""
        for place, event in enumerate(self.published):
            if event.error is not None:
                del self.events[place]
                self.num_published -= 1
                raise event.error
        taken = self.published
        del self.events[: self.num_published]
        self.num_published = 0
        return taken

    def withdraw(self) -> None:
        """Forget what was not published."""
        del self.events[self.num_published :]
