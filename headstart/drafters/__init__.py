"""What a drafter is.

A drafter proposes and never judges; it knows no temperature and no seed: `Rows.choose` turns its logits into children. Must not
import the engine,
the verifier or training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from headstart.speculation.planner import Planner
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept

if TYPE_CHECKING:
    from headstart.target.cache import Seating
    from headstart.target.target import Target


@runtime_checkable
class Drafter(Protocol):
    """Guesses what the target will say.

    name: for tables and metrics. taps: the target layers whose output it reads, () for none. slot_bytes: its own memory per
    slot, counted in the announced budget. planner: how much to speculate, unless the user chooses.
    """

    name: str
    taps: tuple[int, ...]
    planner: Planner

    @property
    def slot_bytes(self) -> int: ...

    def attach(self, target: Target, seating: Seating) -> None:
        """Get to know the target (embedding, device, dtype) and allocate; seats and slots are those of `seating`."""
        ...

    def extend(self, kept: Kept) -> None:
        """Learn what is now certain; every prompt chunk too."""
        ...

    def propose(self, rows: Rows) -> Drafts:
        """Drafts behind the root of every row whose `depths` is above 0, that deep at most; on any device."""
        ...

    def fork(self, source: int, seat: int, length: int) -> None:
        """Copy what is known of the first `length` tokens of one seat to another."""
        ...

    def free(self, seat: int) -> None:
        """Forget a seat."""
        ...


@runtime_checkable
class Restorable(Protocol):
    """A drafter that can return to what it remembered before a round, for rounds that do not end (an interruption, no memory).

    Worth having for drafters with `taps`, whose features do not come again: without it they no longer draft for the rows of such
    a round. Drafters without taps are told their texts again.
    """

    def snapshot(self) -> Any:
        """What is remembered of all seats. Called before every round, so it must be cheap: lengths and references."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Back to a snapshot of the same round. May be called again where it was interrupted."""
        ...
