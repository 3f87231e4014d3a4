"""Verification: which drafts a round keeps, under an acceptance rule (`rules`).

A rule decides per asked node the token that follows it, and per draft whether it is accepted given its parent. A draft is alive
if it and all its ancestors are accepted; a row keeps its deepest alive draft and that draft's ancestors. Must not import models,
the cache or drafters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.speculation.device_forest import asked_indices
from headstart.speculation.reliability import Compared
from headstart.speculation.rows import Rows
from headstart.speculation.tree import ROOT, Forest

_UNIT = 2**24  # chances travel to the host as integers of this unit, in the same copy as the tokens


class Decisions(NamedTuple):
    """What a rule decides.

    tokens: [asked] int64, the token that follows each asked node if the kept path ends there.
    ok: [drafts] bool, whether the draft is accepted given its parent.
    is_sure: [asked] bool, False where the token is uncertain until the rule runs again in full.
    """

    tokens: Tensor
    ok: Tensor
    is_sure: Tensor


@dataclass(frozen=True, eq=False)
class Asked:
    """The asked nodes of a forest: the root and the drafts of every row that ends at its root.

    forest: the forest.
    rows: [asked] int64, the row of the round.
    roots: [asked rows] int64, the index of each root among the asked nodes.
    drafts: [drafts] int64, the index of each draft among the asked nodes.
    parents: [drafts] int64, the index of each draft's parent among the asked nodes.
    """

    forest: Forest
    rows: Tensor
    roots: Tensor
    drafts: Tensor
    parents: Tensor

    @property
    def max_level(self) -> int:
        """An upper bound of `levels`, on the host."""
        return self.forest.max_depth

    @cached_property
    def levels(self) -> Tensor:
        """[asked] int64, the depth; a root has 0."""
        return torch.zeros_like(self.rows).index_copy_(0, self.drafts, self.forest.drafts.depths)


def asked_nodes(forest: Forest) -> Asked:
    """The asked nodes of a forest: per row that ends at its root, the root and then its drafts. Repeated nodes are left out."""
    if forest.counts is None:
        return _asked_on_device(forest)
    asked_rows = [row for row, is_asked in enumerate(forest.ends_at_root) if is_asked]
    sizes = [forest.counts[row] + 1 for row in asked_rows]
    device, draft_parents = forest.tokens.device, forest.drafts.parents
    if len(asked_rows) == 1:  # the common case, without index arithmetic
        rows = torch.full((sizes[0],), asked_rows[0], device=device)
        roots = torch.zeros(1, dtype=torch.int64, device=device)
        drafts = torch.arange(1, sizes[0], device=device)
        parents = draft_parents + 1
    else:
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        rows_and_sizes = torch.tensor([asked_rows, sizes], dtype=torch.int64)
        roots = torch.tensor(starts, dtype=torch.int64).to(device, non_blocking=True)
        shifts = torch.repeat_interleave(torch.arange(1, len(sizes) + 1), rows_and_sizes[1] - 1).to(device, non_blocking=True)
        rows = torch.repeat_interleave(rows_and_sizes[0], rows_and_sizes[1]).to(device, non_blocking=True)
        drafts = torch.arange(len(forest.drafts), device=device) + shifts  # after the roots of its own and all earlier rows
        parents = torch.where(draft_parents == ROOT, roots[shifts - 1], draft_parents + shifts)
    return Asked(forest, rows, roots, drafts, parents)


def _asked_on_device(forest: Forest) -> Asked:
    """As `asked_nodes`, where only the device knows how many drafts each row has."""
    drafts, draft_parents = forest.drafts, forest.drafts.parents
    roots, indices, asked_rows = asked_indices(forest.ends_at_root, drafts.rows)
    root_of_row = drafts.rows.new_zeros(forest.num_rows).index_copy_(0, asked_rows, roots)[drafts.rows]
    shifts = indices - torch.arange(len(indices), device=indices.device)
    rows = roots.new_empty(forest.num_asked)
    rows[roots], rows[indices] = asked_rows, drafts.rows
    parents = torch.where(draft_parents == ROOT, root_of_row, draft_parents + shifts)
    return Asked(forest, rows, roots, indices, parents)


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a round decided, on the host.

    emitted: per row, the kept drafts' tokens and then the new root; empty where the stem did not end at the root.
    kept: per row, the indices of the kept drafts among the row's own drafts, ascending.
    asked: per row, the index of the asked node that decided each emitted token.
    tried: per row, the depth of its deepest draft.
    counts: per row, the number of its drafts.
    predicted: per row, for each level below which a draft could be kept, the summed chances (acceptance probabilities) of the kept
        path's children, given the path; as many as drafts were kept, and one more where the last one had children.
    gain: sum of all drafts' chances, the kept drafts that were expected.
    compared: the drafts whose parents were kept, of all rows.
    """

    emitted: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]
    asked: tuple[tuple[int, ...], ...]
    tried: tuple[int, ...]
    counts: tuple[int, ...]
    predicted: tuple[tuple[float, ...], ...] = ()
    gain: float = 0.0
    compared: tuple[Compared, ...] = ()


@dataclass(frozen=True)
class Rule:
    """An acceptance rule.

    judge: (forest, asked nodes, logits [asked, vocab], rows, in_full) -> `Decisions`. in_full: every token must be certain.
    noise: the noise with which drafters choose children: "shared" with the target's decisions, "fresh" or "none".
    is_lossy: whether the text follows another distribution than the target's; every printed result must then say so.
    """

    judge: Callable[[Forest, Asked, Tensor, Rows, bool], Decisions]
    noise: str
    is_lossy: bool = False


def verify(forest: Forest, logits: Tensor, rows: Rows, rule: Rule) -> Verdict:
    """What a round keeps under a rule. One host synchronisation, rarely two.

    logits: [asked, vocab] of the forest's asked nodes.
    rows: the forest's rows, in order.
    """
    asked = asked_nodes(forest)
    logits = logits[: forest.num_asked]
    verdict = _verdict(forest, rule.judge(forest, asked, logits, rows, False))
    if verdict is None:  # rare: a token on a kept path is uncertain
        verdict = _verdict(forest, rule.judge(forest, asked, logits, rows, True))
        assert verdict is not None, "a rule that ran in full left a token uncertain"
    return verdict


def alive(forest: Forest, ok: Tensor) -> Tensor:
    """[drafts] bool: whether a draft and all its ancestors are accepted. ok: [drafts] bool, accepted given the parent."""
    return ~(forest.lineage & ~ok).any(-1)


def _verdict(forest: Forest, decisions: Decisions) -> Verdict | None:
    """The verdict of a rule's decisions; None where a token on a kept path is uncertain. One copy to the host."""
    drafts = forest.drafts
    parts = [*decisions, drafts.parents, drafts.depths, (drafts.chances * _UNIT).to(torch.int64), drafts.sources]
    if forest.counts is None:
        parts.append(drafts.rows)
    flat = torch.cat(parts).tolist()
    tokens, ok, is_sure, parents, depths, chances, sources, *rows = _cut(flat, *map(len, parts))
    counts = _counts(forest, rows[0]) if forest.counts is None else forest.counts
    emitted: list[tuple[int, ...]] = []
    kept: list[tuple[int, ...]] = []
    asked: list[tuple[int, ...]] = []
    tried: list[int] = []
    predicted: list[tuple[float, ...]] = []
    compared: list[Compared] = []
    first, root = 0, 0  # the row's first draft among the drafts, and its root among the asked nodes
    for count, is_asked in zip(counts, forest.ends_at_root, strict=True):
        alive_drafts = {ROOT: 0}  # and the level of their children, from 0
        path = []
        masses = [0.0] * (max(depths[first : first + count], default=0) + 1)
        for draft in range(first, first + count):  # parents precede children
            level = alive_drafts.get(parents[draft])
            if level is not None:
                parent_chance = chances[parents[draft]] if level else _UNIT
                chance = chances[draft] / max(1, parent_chance)
                masses[level] += chance
                compared.append(Compared(sources[draft], chance, bool(ok[draft])))
                if ok[draft]:
                    alive_drafts[draft] = level + 1
                    path.append(draft - first)
        nodes = [root, *(root + 1 + draft for draft in path)] if is_asked else []
        if not all(is_sure[node] for node in nodes):
            return None
        emitted.append(tuple(tokens[node] for node in nodes))
        kept.append(tuple(path))
        asked.append(tuple(nodes))
        tried.append(len(masses) - 1)
        predicted.append(tuple(masses[: len(path) + (masses[len(path)] > 0)]))
        first, root = first + count, root + count + is_asked
    gain = sum(chances) / _UNIT
    return Verdict(tuple(emitted), tuple(kept), tuple(asked), tuple(tried), counts, tuple(predicted), gain, tuple(compared))


def _cut(values: list[int], *sizes: int) -> Iterator[list[int]]:
    """The values in consecutive parts of these sizes."""
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size


def _counts(forest: Forest, rows: Sequence[int]) -> tuple[int, ...]:
    """The number of drafts of each row. rows: of each draft."""
    counts = [0] * forest.num_rows
    for row in rows:
        counts[row] += 1
    return tuple(counts)
