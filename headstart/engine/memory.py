"""How much memory an engine takes: bytes per slot, slots per request, slots in all."""

from __future__ import annotations

from headstart.drafters import Drafter
from headstart.speculation.planner import Planner
from headstart.target.target import Target


def slot_bytes(target: Target, drafter: Drafter | None) -> int:
    """Bytes of keys and values per token, the drafter's included."""
    return target.slot_bytes + (drafter.slot_bytes if drafter is not None else 0)


def headroom_slots(target: Target, drafter: Drafter | None, planner: Planner | None, max_rows: int = 1) -> int:
    """Slots that each request needs beyond its text, for drafts.

    planner: None: the drafter's own.
    """
    if drafter is None:
        return target.min_nodes
    return max((planner or drafter.planner).headroom(max_rows), target.min_nodes)


def request_bytes(target: Target, drafter: Drafter | None, planner: Planner | None, num_tokens: int) -> int:
    """Bytes that an engine of one row needs for a request of `num_tokens` tokens, prompt and output.

    planner: None: the drafter's own.
    """
    return (num_tokens + headroom_slots(target, drafter, planner)) * slot_bytes(target, drafter)


def num_slots(longest: int, max_rows: int, memory: int | None, bytes_per_slot: int) -> int:
    """Slots of a cache.

    longest: slots of a request that fills the context.
    memory: bytes that may be used; None: enough for `max_rows` of the longest requests, but at most 1 GiB or, where that holds
        fewer, 4096 slots.

    Raises ValueError for memory that holds no token.
    """
    if memory is None:
        return max(1, min(longest * max_rows, max(2**30 // bytes_per_slot, min(longest, 4096))))
    if memory < bytes_per_slot:
        raise ValueError(f"memory of {memory} bytes holds no token; one takes {bytes_per_slot} bytes")
    return memory // bytes_per_slot
