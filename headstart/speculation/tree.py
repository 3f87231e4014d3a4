"""The shape of a round: drafts, the flat forest they are verified in, and what was kept of it.

Everything is a flat list of nodes, row after row, parents before children; a tree brings its own size and shape and nothing is
padded. This file knows indices only. It refuses to know tokens' meaning, logits, models or slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

ROOT = -1  # the parent of a draft that hangs directly on its row's root


@dataclass(frozen=True, eq=False)
class Drafts:
    """Candidates behind the roots of a round: what a drafter returns and a planner prunes.

    tokens, parents, rows, depths: [drafts] int64. `parents` index into this list, or are `ROOT`; a parent stands before its
    children and siblings carry distinct tokens. `rows` index the rows of the round; a child of a root has depth 1.
    chances: [drafts] float32, estimated probability that the node is kept (the product along its path).
    sources: [drafts] int64, which drafter proposed it.
    distributions: [rows + drafts, vocab] or None. Under the `rejection` rule, the distribution from which each node's children
    were drawn: the
    rows' roots first, then one line per draft. None: children were picked, not drawn.
    max_depth: a bound of the depths that the host knows without asking the device.
    """

    tokens: Tensor
    parents: Tensor
    rows: Tensor
    depths: Tensor
    chances: Tensor
    sources: Tensor
    distributions: Tensor | None = None
    max_depth: int = 0

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @classmethod
    def none(cls, device: torch.device | str = "cpu") -> Drafts:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return cls(empty, empty, empty, empty, empty.float(), empty)

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        parents: Sequence[int],
        rows: Sequence[int],
        depths: Sequence[int],
        chances: Sequence[float],
        *,
        source: int = 0,
        device: torch.device | str = "cpu",
    ) -> Drafts:
        """Drafts from plain lists, for drafters that work on the host."""
        flat = torch.tensor([tokens, parents, rows, depths], dtype=torch.int64).reshape(4, -1).to(device, non_blocking=True)
        weights = torch.tensor(chances, dtype=torch.float32).to(device, non_blocking=True)
        sources = torch.full_like(flat[0], source)
        return cls(flat[0], flat[1], flat[2], flat[3], weights, sources, max_depth=max(depths, default=0))

    def to(self, device: torch.device) -> Drafts:
        """The same drafts on another device, without waiting for it."""
        if self.tokens.device == device:
            return self
        names = ("tokens", "parents", "rows", "depths", "chances", "sources", "distributions")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{name: part.to(device, non_blocking=True) for name, part in parts.items() if part is not None})

    def check(self) -> None:
        """Assert what every drafter promises. Costs a device synchronisation: for tests and host-made drafts."""
        order = torch.arange(len(self), device=self.tokens.device)
        assert bool((self.parents < order).all()), "a draft stands before its parent"
        inner = self.parents != ROOT
        parents = self.parents.clamp(min=0)
        assert bool((self.depths == torch.where(inner, self.depths[parents], 0) + 1).all()), "a draft is not one below its parent"
        assert bool((~inner | (self.rows == self.rows[parents])).all()), "a draft hangs on another row's node"
        place = torch.where(inner, parents, -1 - self.rows)
        pairs = torch.stack([place, self.tokens])
        assert torch.unique(pairs, dim=1).shape[1] == len(self), "two siblings carry the same token"

    def take(self, order: Tensor, num_rows: int) -> Drafts:
        """The drafts at `order` ([n] indices; a parent before its children, no child without its parent), renumbered."""
        renumber = torch.full((len(self) + 1,), ROOT, dtype=torch.int64, device=order.device)  # the last stays ROOT
        renumber[order] = torch.arange(order.shape[0], device=order.device)
        distributions = (
            None if self.distributions is None else torch.cat([self.distributions[:num_rows], self.distributions[num_rows + order]])
        )
        return Drafts(
            self.tokens[order],
            renumber[self.parents[order]],
            self.rows[order],
            self.depths[order],
            self.chances[order],
            self.sources[order],
            distributions,
            self.max_depth,
        )

    def by_row(self, num_rows: int) -> Drafts:
        """The same drafts, row after row, order within a row unchanged."""
        if num_rows <= 1 or len(self) <= 1:
            return self
        return self.take(torch.argsort(self.rows, stable=True), num_rows)


def lineage(parents: Tensor, max_depth: int) -> Tensor:
    """Who descends from whom: [drafts, drafts] bool, `[i, j]` true where `j` is `i` or an ancestor of `i`.

    parents: [drafts] with `ROOT` for children of a root. Pointer doubling: log2(max_depth) steps, no loop over nodes.
    """
    size = parents.shape[0]
    seen = torch.eye(size + 1, dtype=torch.bool, device=parents.device)  # the last line stands for the root
    jump = torch.cat([parents, parents.new_full((1,), size)])
    jump[:-1].masked_fill_(parents == ROOT, size)
    reach = 1
    while reach < max_depth:
        seen |= seen[jump]
        jump = jump[jump]
        reach *= 2
    return seen[:-1, :-1]


@dataclass(frozen=True, eq=False)
class Forest:
    """All nodes of a round, flat: each row's stem, then its drafts; dead nodes last.

    tokens, positions: [nodes] int64; position is the node's index in its row's text. A dead node has position 0.
    drafts: the candidates of all rows, row after row; lineage: [drafts, drafts], see `lineage`.
    stems, counts: on the host, stem nodes and draft nodes of each row; whole: which stems end with their row's root.
    asked: [asked] nodes whose logits are needed: of each whole row the root and then its drafts, row after row; perhaps the
    last node again, to make them enough.
    max_depth: a bound of the drafts' depth.
    num_dead: dead nodes at the end; they belong to no row, are never kept, and only make the forest larger.
    """

    tokens: Tensor
    positions: Tensor
    drafts: Drafts
    lineage: Tensor
    stems: tuple[int, ...]
    counts: tuple[int, ...]
    whole: tuple[bool, ...]
    asked: Tensor
    max_depth: int
    num_dead: int = 0

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_rows(self) -> int:
        return len(self.stems)

    @property
    def num_asked(self) -> int:
        """How many of `asked` decide something; the rest only makes them enough."""
        return sum(count + 1 for count, is_whole in zip(self.counts, self.whole, strict=True) if is_whole)


def merge(
    stems: Sequence[Sequence[int]],
    starts: Sequence[int],
    whole: Sequence[bool],
    drafts: Drafts,
    num_nodes: int = 0,
    device: torch.device | None = None,
) -> Forest:
    """One flat forest from the rows' stems and the drafts behind those that are whole.

    stems: per row the known tokens that this round scores, at least one; starts: the position of each stem's first token;
    whole: whether the stem ends with its row's root. drafts: row after row (`Drafts.by_row`), only behind whole stems.
    num_nodes: dead nodes fill the forest up to this size, and the last node, asked again, fills up the asked ones. device: where
    the forest is wanted; None: where the drafts are.
    """
    counts = count_by_row(drafts, len(stems))
    max_depth = int(drafts.depths.max()) if len(drafts) and drafts.tokens.device.type == "cpu" else drafts.max_depth
    drafts = drafts if device is None else drafts.to(device)
    device = drafts.tokens.device
    tokens: list[int] = []
    positions: list[int] = []
    asked: list[int] = []
    places: list[int] = []  # where the drafts go
    roots: list[int] = []  # the root's position, per draft
    for stem, start, is_whole, count in zip(stems, starts, whole, counts, strict=True):
        assert stem, "an empty stem"
        assert is_whole or not count, "drafts behind a cut stem"
        end = len(tokens) + len(stem)
        tokens += [*stem, *[0] * count]
        positions += [*range(start, start + len(stem)), *[0] * count]
        places += range(end, end + count)
        roots += [start + len(stem) - 1] * count
        if is_whole:
            asked += range(end - 1, end + count)
    num_dead = max(0, num_nodes - len(tokens))
    # The head multiplies asked rows only, so they too must be enough not to depend on their number; and no model answers nothing.
    asked += [len(tokens) - 1] * (max(1, num_nodes) - len(asked))
    flat = torch.tensor([tokens + [0] * num_dead, positions + [0] * num_dead]).to(device, non_blocking=True)
    if places:
        at = torch.tensor([places, roots]).to(device, non_blocking=True)
        flat[0, at[0]] = drafts.tokens
        flat[1, at[0]] = drafts.depths + at[1]
    return Forest(
        tokens=flat[0],
        positions=flat[1],
        drafts=drafts,
        lineage=lineage(drafts.parents, max_depth),
        max_depth=max_depth,
        stems=tuple(map(len, stems)),
        counts=tuple(counts),
        whole=tuple(whole),
        asked=torch.tensor(asked, dtype=torch.int64).to(device, non_blocking=True),
        num_dead=num_dead,
    )


def count_by_row(drafts: Drafts, num_rows: int) -> list[int]:
    """Drafts of each row, on the host."""
    if len(drafts) == 0 or num_rows == 1:
        return [len(drafts)] * num_rows
    counts: list[int] = torch.bincount(drafts.rows, minlength=num_rows).tolist()
    return counts


@dataclass(frozen=True, eq=False)
class Kept:
    """What became certain in a round: decoding rows and prompt chunks alike.

    seats: per row. texts: per row the kept tokens and then the one after them, which is known but not yet scored: the prompt's
    own inside a prompt, the new root at its end. starts: per row the position of the first kept token.
    tried, held: per row, the depth of its deepest draft and of its deepest kept draft: what chances learn from.
    features: [kept, taps * hidden] of the kept tokens, row after row, or None.
    """

    seats: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    tried: tuple[int, ...]
    held: tuple[int, ...]
    features: Tensor | None
    device: torch.device

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each row kept."""
        return tuple(len(text) - 1 for text in self.texts)

    @cached_property
    def tokens(self) -> Tensor:
        """[kept] int64, flat, row after row."""
        return self._there([token for text in self.texts for token in text[:-1]])

    @cached_property
    def nexts(self) -> Tensor:
        """[kept] int64, the token after each kept one."""
        return self._there([token for text in self.texts for token in text[1:]])

    @cached_property
    def positions(self) -> Tensor:
        """[kept] int64."""
        spans = zip(self.starts, self.lengths, strict=True)
        return self._there([position for start, length in spans for position in range(start, start + length)])

    def _there(self, values: Sequence[int]) -> Tensor:
        """On the device, without waiting for it."""
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)
