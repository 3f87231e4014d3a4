"""Joining the drafts of several sources (drafters) into one list without duplicates, on the host.

Chances here are conditional: the probability that a draft is kept, given that its parent is. Must not import sampling, drafters or
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from headstart.speculation.tree import ROOT, Drafts
from headstart.speculation.trust import correct


@dataclass(frozen=True)
class Proposal:
    """The drafts of one source, on the host.

    tokens: per draft.
    parents: per draft, the index of its parent; for a child of a root, -1 - row.
    chances: per draft, given its parent.
    mass: per parent, the sum of its children's chances, at most 1.
    """

    tokens: list[int]
    parents: list[int]
    chances: list[float]
    mass: dict[int, float]

    @classmethod
    def of(cls, drafts: Drafts, num_rows: int = 1, most: int | None = None) -> Proposal:
        """The proposal that these drafts are. One host synchronisation where they are on a GPU.

        num_rows: of the round.
        most: drafts that are read, the likeliest; None: all.
        """
        if len(drafts) == 0:
            return cls([], [], [], {})
        drafts = replace(drafts, distributions=None)
        if most is not None and len(drafts) > most:
            # No child has a higher chance than its parent, and a stable sort keeps the order of equals: no parent is missing.
            best = torch.sort(drafts.chances, descending=True, stable=True).indices[:most]
            drafts = drafts.take(best.sort().values, num_rows)
        if drafts.tokens.device.type != "cpu":
            drafts = _on_host(drafts)
        path_chances, parents, rows = drafts.chances.tolist(), drafts.parents.tolist(), drafts.rows.tolist()
        chances: list[float] = []
        mass: dict[int, float] = {}
        for index, (parent, chance) in enumerate(zip(parents, path_chances, strict=True)):
            if parent == ROOT:
                parents[index] = parent = -1 - rows[index]
            else:
                before = path_chances[parent]
                chance = min(1.0, chance / before) if before > 0 else 0.0
            chances.append(chance)
            mass[parent] = mass.get(parent, 0.0) + chance
        return cls(drafts.tokens.tolist(), parents, chances, {parent: min(1.0, total) for parent, total in mass.items()})

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        """The index of each draft, by its parent and its token."""
        return {edge: index for index, edge in enumerate(zip(self.parents, self.tokens, strict=True))}

    def compare(self, row: int, text: Sequence[int]) -> tuple[list[float], list[bool]]:
        """What was predicted of a text that became known, and what happened.

        row: of the round in which this was proposed.
        text: the tokens after the row's root.
        Returns one entry per node of the text that has children here: the sum of their chances, and whether one of them is the next
        token.
        """
        predicted: list[float] = []
        happened: list[bool] = []
        parent: int | None = -1 - row
        for token in text:
            if parent is None or parent not in self.mass:
                break
            predicted.append(self.mass[parent])
            parent = self._children.get((parent, token))
            happened.append(parent is not None)
        return predicted, happened


def _on_host(drafts: Drafts) -> Drafts:
    """The drafts on the CPU, in one copy: a chance is exact in 64 bits, as are the integers."""
    integers = (drafts.tokens, drafts.parents, drafts.rows, drafts.depths, drafts.sources)
    flat = torch.stack([*integers, drafts.chances.float().view(torch.int32).long()]).cpu()
    return Drafts(flat[0], flat[1], flat[2], flat[3], flat[5].int().view(torch.float32), flat[4], max_depth=drafts.max_depth)


@dataclass
class Union:
    """The union of the trees of the sources added so far; a parent precedes its children.

    Two sources that propose the same token after the same parent give one draft, whose children are those of both. Its chance is
    the larger one: sources agree because they read the same text, so their errors are not independent. Measured where lookup and
    MTP heads agree, the larger chance is right within 0.03 in every fifth of the scale, and the noisy-or is too high by up to 0.08.

    tokens, depths, chances, sources: per draft.
    parents: per draft, as in `Proposal`.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    indices: dict[tuple[int, int], int] = field(default_factory=dict)  # by parent and token

    def add(self, source: int, proposal: Proposal, odds: Sequence[float]) -> None:
        """Add the drafts of a source.

        source: its number. Of two sources, a draft has that with the larger chance, of equal ones the first.
        odds: per row of the round, the odds ratio that corrects the sum of the chances of a node's children.
        """
        places: list[int] = []  # of the proposal's drafts, here
        rows: list[int] = []
        factors: dict[int, float] = {}
        tokens, depths, chances, indices = self.tokens, self.depths, self.chances, self.indices
        for token, old_parent, own in zip(proposal.tokens, proposal.parents, proposal.chances, strict=True):
            row, parent = (-1 - old_parent, old_parent) if old_parent < 0 else (rows[old_parent], places[old_parent])
            rows.append(row)
            if old_parent not in factors:
                total = proposal.mass[old_parent]
                factors[old_parent] = correct(total, odds[row]) / total if total > 0 else 0.0
            chance = min(1.0, own * factors[old_parent])
            place = indices.setdefault((parent, token), len(tokens))
            places.append(place)
            if place == len(tokens):
                tokens.append(token)
                self.parents.append(parent)
                depths.append(1 if parent < 0 else depths[parent] + 1)
                chances.append(chance)
                self.sources.append(source)
            elif chance > chances[place]:
                chances[place], self.sources[place] = chance, source

    def path_chances(self) -> tuple[list[float], list[int]]:
        """Per draft, the probability that it and all its ancestors are kept; and its row.

        The chances of the children of one node are scaled where they sum to more than 1.
        """
        totals: dict[int, float] = {}
        for parent, chance in zip(self.parents, self.chances, strict=True):
            totals[parent] = totals.get(parent, 0.0) + chance
        result: list[float] = []
        rows: list[int] = []
        for parent, chance in zip(self.parents, self.chances, strict=True):
            share = chance / max(1.0, totals[parent])
            result.append(share if parent < 0 else share * result[parent])
            rows.append(-1 - parent if parent < 0 else rows[parent])
        return result, rows

    def expected(self, num_rows: int) -> list[float]:
        """Per row of the round, the expected number of kept drafts."""
        result = [0.0] * num_rows
        for chance, row in zip(*self.path_chances(), strict=True):
            result[row] += chance
        return result

    def drafts(self, width: int, size: int) -> Drafts:
        """The union on the CPU, row after row, each with its likeliest drafts first, so that siblings are sorted, too.

        width: most children of a node, the likeliest; those left out take their descendants with them.
        size: most drafts of a row, the likeliest.
        """
        chances, rows = self.path_chances()
        chosen = _likeliest(self.parents, chances, rows, width, size)
        depths = [self.depths[index] for index in chosen]
        places = {index: place for place, index in enumerate(chosen)}
        drafts = Drafts.of(
            [self.tokens[index] for index in chosen],
            [places.get(self.parents[index], ROOT) for index in chosen],
            [rows[index] for index in chosen],
            depths,
            [chances[index] for index in chosen],
        )
        return replace(drafts, sources=torch.tensor([self.sources[index] for index in chosen], dtype=torch.int64))


def _likeliest(parents: Sequence[int], chances: Sequence[float], rows: Sequence[int], width: int, size: int) -> list[int]:
    """The drafts within `width` and `size`, sorted by row, then likeliest first, so that parents precede children."""
    # No child has a higher chance than its parent and none precedes it here, so a stable sort keeps this order among equals.
    order = sorted(range(len(chances)), key=chances.__getitem__, reverse=True)
    order.sort(key=rows.__getitem__)
    num_children: dict[int, int] = {}
    num_drafts: dict[int, int] = {}
    chosen: list[int] = []
    is_chosen: set[int] = set()
    for index in order:
        parent, row = parents[index], rows[index]
        children, count = num_children.get(parent, 0), num_drafts.get(row, 0)
        if (parent < 0 or parent in is_chosen) and children < width and count < size:
            num_children[parent], num_drafts[row] = children + 1, count + 1
            chosen.append(index)
            is_chosen.add(index)
    return chosen
