"""The nodes of a round: drafts, the flat forest in which they are verified, and the tokens kept of it.

All nodes are one flat list, row after row, parents before children; trees of different sizes need no padding. Must not import
sampling, models or the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from headstart.speculation.layout import Layout

ROOT = -1  # the parent index of a child of its row's root


@dataclass(frozen=True, eq=False)
class Drafts:
    """Candidate tokens after the roots of a round: a drafter returns them and a planner prunes them.

    tokens: [drafts] int64; siblings have distinct tokens.
    parents: [drafts] int64 indices into this list, or `ROOT`; a parent precedes its children.
    rows: [drafts] int64 indices into the rows of the round.
    depths: [drafts] int64; a child of a root has depth 1.
    chances: [drafts] float32, estimated acceptance probability of the node and all its ancestors.
    sources: [drafts] int64, the number of the drafter that proposed each draft.
    distributions: [rows + drafts, vocab] or None. Under the `rejection` rule, the distribution from which each node's children
        were drawn: first one line per row for its root, then one line per draft. None: children were picked, not drawn.
    max_depth: an upper bound of `depths`, known on the host without a synchronisation.
    rank_paths: per draft, which child of which child of its root it is, where the host knows (in a static tree); else None.
    """

    tokens: Tensor
    parents: Tensor
    rows: Tensor
    depths: Tensor
    chances: Tensor
    sources: Tensor
    distributions: Tensor | None = None
    max_depth: int = 0
    rank_paths: tuple[tuple[int, ...], ...] | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @classmethod
    def none(cls, device: torch.device | str = "cpu") -> Drafts:
        """No drafts."""
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
        """Drafts from lists with one entry per draft, for drafters that work on the host."""
        flat = torch.tensor([tokens, parents, rows, depths], dtype=torch.int64).reshape(4, -1).to(device, non_blocking=True)
        probabilities = torch.tensor(chances, dtype=torch.float32).to(device, non_blocking=True)
        sources = torch.full_like(flat[0], source)
        return cls(flat[0], flat[1], flat[2], flat[3], probabilities, sources, max_depth=max(depths, default=0))

    def to(self, device: torch.device) -> Drafts:
        """The same drafts on another device, copied without a host synchronisation."""
        if self.tokens.device == device:
            return self
        names = ("tokens", "parents", "rows", "depths", "chances", "sources", "distributions")
        tensors = {name: getattr(self, name) for name in names}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)

    def check(self) -> None:
        """Assert the properties that a drafter guarantees. Costs a host synchronisation: for tests and drafts on the host."""
        order = torch.arange(len(self), device=self.tokens.device)
        assert bool((self.parents < order).all()), "a draft precedes its parent"
        inner = self.parents != ROOT
        parents = self.parents.clamp(min=0)
        assert bool((self.depths == torch.where(inner, self.depths[parents], 0) + 1).all()), "a draft is not one below its parent"
        assert bool((~inner | (self.rows == self.rows[parents])).all()), "a draft's parent is in another row"
        parent_ids = torch.where(inner, parents, -1 - self.rows)  # negative: a row's root
        pairs = torch.stack([parent_ids, self.tokens])
        assert torch.unique(pairs, dim=1).shape[1] == len(self), "two siblings have the same token"

    def take(self, order: Tensor, num_rows: int) -> Drafts:
        """The drafts with the indices `order` [n], renumbered. A parent must precede its children and none may be missing."""
        renumber = torch.full((len(self) + 1,), ROOT, dtype=torch.int64, device=order.device)  # parent ROOT stays ROOT
        renumber[order] = torch.arange(order.shape[0], device=order.device)
        distributions = self.distributions
        if distributions is not None:
            distributions = torch.cat([distributions[:num_rows], distributions[num_rows + order]])
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
        """The same drafts sorted by row; the order within a row does not change."""
        if num_rows <= 1 or len(self) <= 1:
            return self
        return self.take(torch.argsort(self.rows, stable=True), num_rows)


def lineage(parents: Tensor, max_depth: int) -> Tensor:
    """The tree mask of the drafts: [drafts, drafts] bool, `[i, j]` is true where `j` is `i` or an ancestor of `i`.

    parents: [drafts] int64, with `ROOT` for children of a root.
    max_depth: an upper bound of the depths. Pointer doubling takes log2(max_depth) steps, without a loop over nodes.
    """
    size = parents.shape[0]
    tree_mask = torch.eye(size + 1, dtype=torch.bool, device=parents.device)  # the last line is the root's
    jump = torch.cat([parents, parents.new_full((1,), size)])
    jump[:-1].masked_fill_(parents == ROOT, size)
    covered = 1  # levels of ancestors that the mask has
    while covered < max_depth:
        tree_mask |= tree_mask[jump]
        jump = jump[jump]
        covered *= 2
    return tree_mask[:-1, :-1]


@dataclass(frozen=True, eq=False)
class Forest:
    """All nodes that the target scores in a round, flat: each row's stem, then its drafts; dead nodes last.

    tokens: [nodes] int64.
    positions: [nodes] int64, the node's position in its row's text; 0 for a dead node.
    drafts: the drafts of all rows, row after row.
    lineage: [drafts, drafts] bool, see `lineage`.
    stems: per row, the number of stem nodes; on the host.
    counts: per row, the number of draft nodes; on the host. None where only a GPU knows them; then `Verdict.counts` has them.
    ends_at_root: per row, whether its stem ends with the row's root; False inside a prompt.
    asked: [asked] indices of the nodes whose logits are needed: for each row that ends at its root, the root and then its
        drafts; then the last node repeated, where a minimum number of nodes is required.
    max_depth: an upper bound of the drafts' depths.
    num_dead: number of dead nodes at the end. They belong to no row, are never kept, and only make the forest larger.
    """

    tokens: Tensor
    positions: Tensor
    drafts: Drafts
    lineage: Tensor
    stems: tuple[int, ...]
    counts: tuple[int, ...] | None
    ends_at_root: tuple[bool, ...]
    asked: Tensor
    max_depth: int
    num_dead: int = 0

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.stems)

    @property
    def num_asked(self) -> int:
        """Number of nodes in `asked` without the repeated last node."""
        return len(self.drafts) + sum(self.ends_at_root)


def merge(
    stems: Sequence[Sequence[int]],
    starts: Sequence[int],
    ends_at_root: Sequence[bool],
    drafts: Drafts,
    num_nodes: int = 0,
    device: torch.device | None = None,
) -> Forest:
    """One flat forest of the rows' stems and their drafts.

    stems: per row, the known tokens that this round scores, at least one.
    starts: per row, the position of the stem's first token.
    ends_at_root: per row, whether the stem ends with the row's root.
    drafts: row after row (`Drafts.by_row`), only in rows that end at their root.
    num_nodes: dead nodes fill the forest up to this size, and the last node is repeated until as many are asked.
    device: the forest's device; None: that of the drafts.
    """
    if len(drafts) and len(stems) > 1 and drafts.tokens.device.type != "cpu":
        from headstart.speculation.device_forest import merge_on_device

        return merge_on_device(stems, starts, ends_at_root, drafts, num_nodes)
    counts = count_by_row(drafts, len(stems))
    max_depth = int(drafts.depths.max()) if len(drafts) and drafts.tokens.device.type == "cpu" else drafts.max_depth
    drafts = drafts if device is None else drafts.to(device)
    device = drafts.tokens.device
    layout = Layout.of(stems, starts, ends_at_root, counts)
    num_dead = max(0, num_nodes - len(layout.tokens))
    # Below a number of rows, a matrix product's result depends on that number: the LM head, which multiplies the asked nodes only,
    # needs as many as the layers. At least one is asked, because models refuse an empty input.
    asked = layout.asked + [len(layout.tokens) - 1] * (max(1, num_nodes) - len(layout.asked))
    dead = [0] * num_dead
    flat = torch.tensor([layout.tokens + dead, layout.positions + dead]).to(device, non_blocking=True)
    if layout.draft_nodes:
        nodes, roots = torch.tensor([layout.draft_nodes, layout.root_positions]).to(device, non_blocking=True)
        flat[0, nodes] = drafts.tokens
        flat[1, nodes] = drafts.depths + roots
    return Forest(
        tokens=flat[0],
        positions=flat[1],
        drafts=drafts,
        lineage=lineage(drafts.parents, max_depth),
        max_depth=max_depth,
        stems=tuple(map(len, stems)),
        counts=tuple(counts),
        ends_at_root=tuple(ends_at_root),
        asked=torch.tensor(asked, dtype=torch.int64).to(device, non_blocking=True),
        num_dead=num_dead,
    )


def count_by_row(drafts: Drafts, num_rows: int) -> list[int]:
    """Number of drafts of each row, on the host. One host synchronisation where several rows draft on a GPU."""
    if len(drafts) == 0 or num_rows == 1:
        return [len(drafts)] * num_rows
    counts: list[int] = torch.bincount(drafts.rows, minlength=num_rows).tolist()
    return counts


@dataclass(frozen=True, eq=False)
class Kept:
    """The tokens that became certain in a round, of rows that decode and of prompt chunks (prefill).

    seats: per row, its seat.
    texts: per row, the kept tokens and the token after them, which is known but not scored yet: the prompt's next token inside a
        prompt, else the new root.
    starts: per row, the position of the first kept token.
    tried: per row, the depth of its deepest draft.
    held: per row, the depth of its deepest kept draft.
    features: [kept, taps * hidden] tapped hidden states of the kept tokens, row after row; None where the drafter has no taps.
    device: where the tensors below are made.
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
        """Per row, the number of kept tokens."""
        return tuple(len(text) - 1 for text in self.texts)

    @cached_property
    def tokens(self) -> Tensor:
        """[kept] int64, the kept tokens, row after row."""
        return self._on_device([token for text in self.texts for token in text[:-1]])

    @cached_property
    def nexts(self) -> Tensor:
        """[kept] int64, the token after each kept token."""
        return self._on_device([token for text in self.texts for token in text[1:]])

    @cached_property
    def positions(self) -> Tensor:
        """[kept] int64, the position of each kept token."""
        spans = zip(self.starts, self.lengths, strict=True)
        return self._on_device([position for start, length in spans for position in range(start, start + length)])

    def _on_device(self, values: Sequence[int]) -> Tensor:
        """[len(values)] int64 on the device, without a host synchronisation."""
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)
