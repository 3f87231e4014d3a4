"""Growing a draft tree level by level, for drafters that run once per level, and composing one from parallel heads.

The likeliest nodes of a level are expanded, and their best children become candidates; the expansion of EAGLE-2 (Li et al. 2024,
section 4.1), a chain and a static tree are the same loop with other settings. Must not import a method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.speculation.calibration import UNFITTED, Calibration
from headstart.speculation.rows import Choice, Paths, Rows
from headstart.speculation.tree import ROOT, Drafts


@dataclass(frozen=True, eq=False)
class Level:
    """The nodes that a drafter runs at once: `width` of them for each of some rows of the round.

    rows: rows of the round, on the host.
    tokens: [rows, width] int64.
    tree_mask: [rows, width, earlier + width] bool, which nodes each node attends to: of those run at earlier levels, in the order
        in which they were run, and of this level; itself included.
    depths: [earlier + width] int64, the depths of these nodes.
    parents: [rows, width] int64, the index of each node's parent in the level before; 0 at depth 1.
    """

    rows: tuple[int, ...]
    tokens: Tensor
    tree_mask: Tensor
    depths: Tensor
    parents: Tensor

    @property
    def width(self) -> int:
        """Nodes per row."""
        return self.tokens.shape[1]

    @property
    def earlier(self) -> int:
        """Nodes per row that were run at earlier levels."""
        return self.tree_mask.shape[2] - self.width


Expand = Callable[[Level], Tensor]  # -> logits [rows * width, vocab]


def grow(
    rows: Rows,
    logits: Tensor,
    expand: Expand,
    ids: Tensor | None = None,
    source: int = 0,
    calibration: Calibration = UNFITTED,
    deepest: int | None = None,
) -> Drafts:
    """Candidates behind the root of every row that drafts; how deep and wide, `rows.depths` and `rows.plan` say.

    On a CPU, a row stops early where another level cannot pay; on a GPU this would cost a host synchronisation.

    logits: [drafting rows, vocab] after each root, in the order of the rows.
    expand: runs one level and returns the logits after each of its nodes.
    ids: [vocab] target ids of the logits' columns where the drafter's vocabulary is reduced; None: it is the target's.
    source: written into `Drafts.sources`.
    calibration: turns the drafter's probabilities into chances (acceptance probabilities).
    deepest: the deepest level that the drafter can reach; None: no limit.
    """
    most = min(rows.max_depth, deepest or rows.max_depth)
    if logits.device.type == "cpu":
        from headstart.drafters.parts.host_tree import grow_on_host

        return grow_on_host(rows, logits, expand, ids, source, calibration, most)
    return grow_on_device(rows, logits, expand, ids, source, calibration, most)


def grow_on_device(
    rows: Rows, logits: Tensor, expand: Expand, ids: Tensor | None, source: int, calibration: Calibration, deepest: int
) -> Drafts:
    """As `grow`, with tensor operations only, none of which waits for the device."""
    builder = _TreeBuilder(rows, ids, logits.device, calibration)
    candidates = builder.add_roots(rows.drafting, logits)
    for depth in range(1, deepest):
        if not (active_rows := builder.unfinished_rows(candidates, depth)):
            break
        beam = builder.select_beam(candidates, active_rows, depth)
        candidates = builder.expand(beam, builder.choose_per_node(beam, depth, expand(beam.level)))
    return builder.drafts(source)


def compose(rows: Rows, logits: Sequence[Tensor], calibration: Calibration = UNFITTED, source: int = 0) -> Drafts:
    """The same for parallel heads, whose logits depend on the depth alone: one choice per row and depth serves all parents.

    Under a rule that draws children, the parents of one level share their draw: at most one of them is in the text.

    logits: per depth [drafting rows, vocab], in the order of the rows.
    """
    drafting = rows.drafting
    builder = _TreeBuilder(rows, None, logits[0].device, calibration)
    candidates = builder.add_roots(drafting, logits[0])
    for depth, level_logits in enumerate(logits[1 : rows.max_depth], 1):
        beam = builder.select_beam(candidates, builder.unfinished_rows(candidates, depth), depth)
        choice = builder.choose_per_row(drafting, depth, level_logits)
        candidates = builder.expand(beam, builder.repeat_per_node(beam, drafting, choice))
    return builder.drafts(source)


def states_of_parents(states: Tensor, rows: tuple[int, ...], level: Level) -> Tensor:
    """[level's rows, level's width, ...] of each node's parent.

    states: [rows, width of the level before, ...] of the nodes of the level before.
    rows: the rows of the round that the level before had; those of `level` are among them.
    """
    if level.rows != rows:
        indices = torch.tensor([rows.index(row) for row in level.rows])
        states = states[indices.to(states.device, non_blocking=True)]
    if len(states) == 1:
        return states.index_select(1, level.parents[0])
    return _select_nodes(states, level.parents)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The candidates of one level, `size` for each of its rows.

    rows: rows of the round, on the host.
    row_ids: [rows, 1] the same, on the device.
    tokens, chances: [rows, size].
    indices: [rows, size] among all drafts.
    paths: [rows, parents, depth - 1] tokens from the root's child to each of their parents, which have equally many children.
    tree_mask: [rows, parents, nodes run so far] bool, what each parent attends to.
    """

    rows: tuple[int, ...]
    row_ids: Tensor
    tokens: Tensor
    chances: Tensor
    indices: Tensor
    paths: Tensor
    tree_mask: Tensor

    def of(self, active_rows: Sequence[int]) -> _Candidates:
        """The candidates of some of the rows; active_rows: indices into `rows`."""
        if len(active_rows) == len(self.rows):
            return self
        lines = torch.tensor(active_rows).to(self.row_ids.device, non_blocking=True)
        tensors = (self.row_ids, self.tokens, self.chances, self.indices, self.paths, self.tree_mask)
        return _Candidates(tuple(self.rows[line] for line in active_rows), *(tensor[lines] for tensor in tensors))


@dataclass(frozen=True, eq=False)
class _Beam:
    """The candidates of a level that are expanded: `level` is what the drafter runs, the rest is as in `_Candidates`."""

    level: Level
    row_ids: Tensor
    indices: Tensor
    chances: Tensor
    paths: Tensor


class _TreeBuilder:
    """The candidates of all levels so far."""

    def __init__(self, rows: Rows, ids: Tensor | None, device: torch.device, calibration: Calibration) -> None:
        self.rows = rows
        self.ids = ids
        self.calibration = calibration
        self.device = device
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.row_ids: list[Tensor] = []
        self.chances: list[Tensor] = []
        self.distributions: list[tuple[Tensor, Tensor]] = []  # lines of `Drafts.distributions` and their content
        self.size = 0
        # Of a static tree: the ranks along the path of each candidate of the last level, the same for all rows; and of all drafts.
        self.ranks: list[tuple[int, ...]] = []
        self.rank_paths: list[tuple[int, ...]] = []
        self.run_depths = torch.empty(0, dtype=torch.int64, device=device)

    def add_roots(self, drafting: tuple[int, ...], logits: Tensor) -> _Candidates:
        """Add the children of the roots. logits: [rows, vocab]."""
        row_ids = torch.tensor(drafting).to(self.device, non_blocking=True)
        choice = self.choose_per_row(drafting, 0, logits)
        if choice.distribution is not None:
            self.distributions.append((row_ids, choice.distribution))
        self.ranks = [(rank,) for rank in range(choice.tokens.shape[1])]
        indices = self._add(choice.tokens, torch.full_like(choice.tokens, ROOT), row_ids[:, None], choice.chances)
        empty = row_ids.new_empty(len(drafting), 1, 0)
        return _Candidates(drafting, row_ids[:, None], choice.tokens, choice.chances, indices, empty, empty.bool())

    def unfinished_rows(self, candidates: _Candidates, depth: int) -> list[int]:
        """Indices of the candidates' rows that may draft deeper than `depth`."""
        return [index for index, row in enumerate(candidates.rows) if self.rows.depths[row] > depth]

    def select_beam(self, candidates: _Candidates, active_rows: Sequence[int], depth: int) -> _Beam:
        """The nodes of each active row that are expanded."""
        candidates = candidates.of(active_rows)
        selected = self._static_beam(len(active_rows)) if self.rows.plan.parents else self._likeliest(candidates)
        parents = selected // (candidates.tokens.shape[1] // candidates.paths.shape[1])
        tokens = candidates.tokens.gather(1, selected)
        paths = torch.cat([_select_nodes(candidates.paths, parents), tokens[..., None]], -1)
        itself = torch.eye(selected.shape[1], dtype=torch.bool, device=self.device).expand(len(active_rows), -1, -1)
        tree_mask = torch.cat([_select_nodes(candidates.tree_mask, parents), itself], -1)
        self.run_depths = torch.cat([self.run_depths, torch.full((selected.shape[1],), depth, device=self.device)])
        level = Level(candidates.rows, tokens, tree_mask, self.run_depths, parents)
        indices, chances = candidates.indices.gather(1, selected), candidates.chances.gather(1, selected)
        return _Beam(level, candidates.row_ids, indices, chances, paths)

    def _likeliest(self, candidates: _Candidates) -> Tensor:
        """[rows, width] indices of the likeliest candidates, ascending."""
        width = min(self.rows.plan.beam, candidates.indices.shape[1])
        order = torch.sort(candidates.chances, dim=-1, descending=True, stable=True).indices  # of equals, the first
        return order[:, :width].sort(-1).values

    def _static_beam(self, num_rows: int) -> Tensor:
        """[rows, width] indices of the candidates that are parents in the plan's static tree, ascending."""
        selected = [index for index, path in enumerate(self.ranks) if path in self.rows.plan.parents]
        self.ranks = [self.ranks[index] for index in selected]
        return torch.tensor(selected, dtype=torch.int64).to(self.device, non_blocking=True).expand(num_rows, -1)

    def choose_per_row(self, drafting: tuple[int, ...], depth: int, logits: Tensor) -> Choice:
        """Children for the parents of one depth, one choice per row. logits: [rows, vocab]."""
        row_ids = torch.tensor(drafting).to(self.device, non_blocking=True)
        paths = Paths(row_ids, row_ids.new_empty(len(drafting), 0), torch.zeros_like(row_ids))
        return self.rows.choose(logits, depth + 1, paths, self.rows.plan.width, self.ids, self.calibration)

    def choose_per_node(self, beam: _Beam, depth: int, logits: Tensor) -> Choice:
        """Children for each node of a beam. logits: [rows * width, vocab]."""
        row_ids = beam.row_ids.expand_as(beam.indices).reshape(-1)
        paths = Paths(row_ids, beam.paths.reshape(-1, depth), beam.indices.reshape(-1))
        return self.rows.choose(logits, depth + 1, paths, self.rows.plan.width, self.ids, self.calibration)

    def repeat_per_node(self, beam: _Beam, drafting: tuple[int, ...], choice: Choice) -> Choice:
        """The choice of its row, for each node of a beam."""
        lines = torch.tensor([drafting.index(row) for row in beam.level.rows]).to(self.device, non_blocking=True)
        lines = lines.repeat_interleave(beam.level.width)
        return Choice(
            choice.tokens[lines], choice.chances[lines], None if choice.distribution is None else choice.distribution[lines]
        )

    def expand(self, beam: _Beam, choice: Choice) -> _Candidates:
        """Add the children of a beam. choice: [rows * width, k]."""
        count, width = beam.indices.shape
        children = choice.tokens.shape[1]
        if choice.distribution is not None:
            self.distributions.append((len(self.rows) + beam.indices.reshape(-1), choice.distribution))
        if self.rows.plan.parents:
            self.ranks = [(*path, rank) for path in self.ranks for rank in range(children)]
        chances = (beam.chances.reshape(-1, 1) * choice.chances).reshape(count, width * children)
        tokens = choice.tokens.reshape(count, width * children)
        indices = self._add(tokens, beam.indices.repeat_interleave(children, 1), beam.row_ids, chances)
        return _Candidates(beam.level.rows, beam.row_ids, tokens, chances, indices, beam.paths, beam.level.tree_mask)

    def _add(self, tokens: Tensor, parents: Tensor, row_ids: Tensor, chances: Tensor) -> Tensor:
        """Append a level of candidates, all [rows, size] except row_ids, [rows, 1]; returns their indices, [rows, size]."""
        for store, values in ((self.tokens, tokens), (self.parents, parents), (self.chances, chances)):
            store.append(values.reshape(-1))
        self.row_ids.append(row_ids.expand_as(tokens).reshape(-1))
        if self.rows.plan.parents or not self.size:
            self.rank_paths += self.ranks * len(tokens)
        indices = torch.arange(self.size, self.size + tokens.numel(), device=self.device).reshape(tokens.shape)
        self.size += tokens.numel()
        return indices

    def drafts(self, source: int) -> Drafts:
        """All candidates, level after level."""
        tokens = torch.cat(self.tokens)
        distributions = None
        if self.distributions:
            first = self.distributions[0][1]
            distributions = first.new_zeros(len(self.rows) + self.size, first.shape[1])
            for lines, distribution in self.distributions:
                distributions[lines] = distribution
        depths = torch.arange(1, len(self.tokens) + 1).repeat_interleave(torch.tensor(list(map(len, self.tokens))))
        return Drafts(
            tokens,
            torch.cat(self.parents),
            torch.cat(self.row_ids),
            depths.to(self.device, non_blocking=True),
            torch.cat(self.chances).float(),
            torch.full_like(tokens, source),
            distributions,
            max_depth=len(self.tokens),
            rank_paths=tuple(self.rank_paths) if len(self.rank_paths) == self.size else None,
        )


def _select_nodes(values: Tensor, indices: Tensor) -> Tensor:
    """values: [rows, nodes, width]; indices: [rows, selected] of nodes. Returns [rows, selected, width]."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[2]))
