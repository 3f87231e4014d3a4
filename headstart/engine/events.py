"""Events: what a round gives to a request, and the queues that readers take them from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.engine.drawn_tree import DrawnTree
    from headstart.engine.scheduler import Request


@dataclass(frozen=True)
class Event:
    """What a round gave to a request.

    tokens: new token ids.
    guessed: per token, whether a drafter had proposed it.
    text: what became final with the tokens; empty without a text stream.
    finish_reason: set in the last event of a request only.
    error: raised by the request's text stream, which ended the request; else None.
    tree: of the round, where the request asked for it.
    """

    request: Request
    tokens: tuple[int, ...] = ()
    guessed: tuple[bool, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    error: Exception | None = None
    tree: DrawnTree | None = None


@dataclass(eq=False)
class EventQueue:
    """Events of some requests, in order. A round adds events; a reader, in any thread, sees those that are published.

    events: all events. They are kept, so that the text of an answer can be read at any time.
    num_published: how many of them a reader may see. Only rounds that count publish.
    """

    events: list[Event] = field(default_factory=list)
    num_published: int = 0

    @property
    def published(self) -> list[Event]:
        """The events that a reader may see."""
        return self.events[: self.num_published]

    def publish(self) -> None:
        """Let readers see all events so far."""
        self.num_published = len(self.events)

    def take(self) -> list[Event]:
        """Remove the published events and return them.

        Where one has an error, only that one is removed, and its error is raised.
        """
        for index, event in enumerate(self.published):
            if event.error is not None:
                del self.events[index]
                self.num_published -= 1
                raise event.error
        taken = self.published
        del self.events[: self.num_published]
        self.num_published = 0
        return taken

    def drain(self) -> list[Event]:
        """Remove the published events and return them, those with an error too."""
        taken = self.published
        del self.events[: self.num_published]
        self.num_published = 0
        return taken

    def withdraw(self) -> None:
        """Remove the events that are not published."""
        del self.events[self.num_published :]
