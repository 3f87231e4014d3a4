"""The protocol of a drafter, which proposes tokens for the target to verify.

A drafter knows no temperature and no seed: `Rows.choose` turns its logits into children. Must not import the engine or training.
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
    """Proposes tokens that may follow the text of each row.

    name: for tables and metrics.
    taps: the target layers whose hidden states it reads; () for none.
    planner: how much to speculate, unless the user chooses.
    slot_bytes: bytes of its own memory per slot of the KV cache, counted in the announced budget.
    """

    name: str
    taps: tuple[int, ...]
    planner: Planner

    @property
    def slot_bytes(self) -> int: ...

    def attach(self, target: Target, seating: Seating) -> None:
        """Take what is needed from the target (embedding, LM head, device, dtype), and allocate memory for the seats of `seating`.

        Raises ValueError where it cannot draft for this target.
        """
        ...

    def extend(self, kept: Kept) -> None:
        """Read the tokens that became certain in a round, and their features; every chunk of a prompt, too."""
        ...

    def propose(self, rows: Rows) -> Drafts:
        """Drafts behind the root of every row in `rows.drafting`, at most `rows.depths` deep; on any device."""
        ...

    def fork(self, source: int, seat: int, length: int) -> None:
        """Copy what is known of the first `length` tokens of seat `source` to another seat."""
        ...

    def free(self, seat: int) -> None:
        """Forget a seat."""
        ...


@runtime_checkable
class Restorable(Protocol):
    """A drafter that can return to its state before a round, where a round does not end (an interruption, out of memory).

    Drafters with `taps` need it to go on drafting for the rows of such a round, since their features are not computed again.
    Drafters without taps get their texts again.
    """

    def snapshot(self) -> Any:
        """The state of all seats. Called before every round, so it must be cheap: lengths and references."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Return to a snapshot of the same round. May be called again where it was interrupted."""
        ...
