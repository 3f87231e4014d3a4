"""Memory for packed weights, in pages of 2 MiB where the system has them: a processor looks up an address in fewer steps."""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2**21
PAGE = 2**12  # what a weight begins at
ARENA = 2**26  # bytes of memory that small weights share

_arena: list[Tensor] = []  # the memory that the next small weight is taken from
_lock = threading.Lock()


def huge_pages(count: int, dtype: torch.dtype) -> Tensor:
    """[count] zeros: products of packed weights are up to a third faster with them.

    The memory is freed with the last tensor that uses it; small weights share one piece of `ARENA` bytes.
    """
    num_bytes = count * dtype.itemsize
    padded = -(-num_bytes // PAGE) * PAGE
    return (_mapped(padded) if padded >= ARENA // 4 else _taken(padded))[:num_bytes].view(dtype)


def _taken(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 of the shared piece; a new one where too little is left."""
    with _lock:
        if not _arena or len(_arena[0]) < num_bytes:
            _arena[:] = [_mapped(ARENA)]
        taken, _arena[0] = _arena[0][:num_bytes], _arena[0][num_bytes:]
    return taken


def _mapped(num_bytes: int) -> Tensor:
    """[num_bytes] uint8, from the start of a huge page."""
    kind = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, **kind)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_PAGE
    return whole[first : first + num_bytes]
