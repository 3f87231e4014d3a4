"""The forest of several rows that draft on a GPU: how many drafts each row has is known on the device only until the round is read.

Every index is computed on the device from the drafts' rows, which are ascending. Must not import sampling, models or the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from headstart.speculation.tree import Drafts, Forest, lineage


def merge_on_device(
    stems: Sequence[Sequence[int]], starts: Sequence[int], ends_at_root: Sequence[bool], drafts: Drafts, num_nodes: int
) -> Forest:
    """As `merge`, without a host synchronisation: the forest's `counts` are None. All arguments as of `merge`."""
    device, rows = drafts.tokens.device, drafts.rows
    sizes, ends = [len(stem) for stem in stems], list(accumulate(len(stem) for stem in stems))
    tokens = [token for stem in stems for token in stem]
    positions = [position for start, size in zip(starts, sizes, strict=True) for position in range(start, start + size)]
    stem_rows = [row for row, size in enumerate(sizes) for _ in range(size)]
    root_positions = [start + size - 1 for start, size in zip(starts, sizes, strict=True)]
    known = torch.tensor([tokens, positions, stem_rows]).to(device, non_blocking=True)
    per_row = torch.tensor([ends, root_positions]).to(device, non_blocking=True)

    size = len(tokens) + len(drafts)
    stem_nodes = _arange(known[2]) + first_drafts(rows, len(stems))[known[2]]
    draft_nodes = _arange(rows) + per_row[0, rows]
    flat = known.new_zeros(2, max(size, num_nodes))
    flat[:, stem_nodes] = known[:2]
    flat[0, draft_nodes] = drafts.tokens
    flat[1, draft_nodes] = drafts.depths + per_row[1, rows]

    roots, asked_drafts, asked_rows = asked_indices(ends_at_root, rows)
    asked = roots.new_full((max(1, num_nodes, len(roots) + len(rows)),), size - 1)
    asked[roots] = stem_nodes[per_row[0] - 1][asked_rows]
    asked[asked_drafts] = draft_nodes
    return Forest(
        tokens=flat[0],
        positions=flat[1],
        drafts=drafts,
        lineage=lineage(drafts.parents, drafts.max_depth),
        stems=tuple(sizes),
        counts=None,
        ends_at_root=tuple(ends_at_root),
        asked=asked,
        max_depth=drafts.max_depth,
        num_dead=max(0, num_nodes - size),
    )


def asked_indices(ends_at_root: Sequence[bool], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the roots and the drafts are among the asked nodes: per row that ends at its root, the root and then its drafts.

    rows: [drafts] int64 ascending, of such rows only.
    Returns [asked rows] index of each root, [drafts] index of each draft, [asked rows] the rows.
    """
    asked_rows = torch.tensor([row for row, is_asked in enumerate(ends_at_root) if is_asked], dtype=torch.int64)
    num_roots = torch.tensor(list(accumulate(map(int, ends_at_root)))).to(rows.device, non_blocking=True)  # up to each row
    asked_rows = asked_rows.to(rows.device, non_blocking=True)
    roots = _arange(asked_rows) + first_drafts(rows, len(ends_at_root))[asked_rows]
    return roots, _arange(rows) + num_roots[rows], asked_rows


def first_drafts(rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows] int64, how many drafts are in the rows before each. rows: [drafts] int64 ascending."""
    return torch.searchsorted(rows, torch.arange(num_rows, device=rows.device))


def _arange(like: Tensor) -> Tensor:
    """[n] int64 0, 1, 2, ..., as long as a tensor and on its device."""
    return torch.arange(len(like), device=like.device)
