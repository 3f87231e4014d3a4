"""Growing a draft tree where logits are on the CPU: the same tree as `grow` makes on a device, with its nodes in lists.

After a forward the processor's caches are cold, and each kind of tensor operation costs 10 to 50 microseconds. Must not import a
method.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from headstart.drafters.parts.grow import Expand, Level
from headstart.speculation.calibration import Calibration
from headstart.speculation.planner import paying_rows
from headstart.speculation.rows import Choice, Paths, Rows
from headstart.speculation.tree import ROOT, Drafts

Lists = Sequence[Sequence[int]]


def grow_on_host(
    rows: Rows, logits: Tensor, expand: Expand, ids: Tensor | None, source: int, calibration: Calibration, deepest: int
) -> Drafts:
    """As `grow`. A row stops early where another level cannot pay."""
    tree = HostTree(rows, ids, calibration)
    tree.add_roots(logits)
    for depth in range(1, min(rows.max_depth, deepest)):
        level = tree.select_beam(depth)
        if level is None:
            break
        tree.add_children(expand(level))
    return tree.drafts(source)


class HostLevel(Level):
    """A level whose nodes are in lists; its tensors are made where they are asked for.

    nodes, node_parents: per row and node, `tokens` and `parents`.
    paths: per row and node, the nodes that it attends to, as the columns of `tree_mask`; itself is the last one.
    run_depths: of the nodes run so far, these included.
    """

    nodes: Lists
    node_parents: Lists
    paths: Sequence[Sequence[tuple[int, ...]]]
    run_depths: Sequence[int]

    def __init__(
        self,
        rows: tuple[int, ...],
        nodes: Lists,
        node_parents: Lists,
        paths: Sequence[Sequence[tuple[int, ...]]],
        run_depths: Sequence[int],
    ) -> None:
        vars(self).update(rows=rows, nodes=nodes, node_parents=node_parents, paths=paths, run_depths=run_depths)

    @property
    def width(self) -> int:
        return len(self.nodes[0])

    @property
    def earlier(self) -> int:
        return len(self.run_depths) - self.width

    @cached_property
    def tokens(self) -> Tensor:
        return torch.tensor(self.nodes)

    @cached_property
    def parents(self) -> Tensor:
        return torch.tensor(self.node_parents)

    @cached_property
    def depths(self) -> Tensor:
        return torch.tensor(self.run_depths)

    @cached_property
    def tree_mask(self) -> Tensor:
        length = len(self.run_depths)
        flags = bytearray(len(self.paths) * self.width * length)
        for line, columns in enumerate(path for of_row in self.paths for path in of_row):
            for column in columns:
                flags[line * length + column] = 1
        return torch.frombuffer(flags, dtype=torch.bool).view(len(self.paths), self.width, length)


class HostTree:
    """The candidates of all levels so far, level after level: in a level row after row, and in a row parent after parent."""

    def __init__(self, rows: Rows, ids: Tensor | None, calibration: Calibration) -> None:
        self.rows = rows
        self.ids = ids
        self.calibration = calibration
        # Of all drafts.
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.row_ids: list[int] = []
        self.depths: list[int] = []
        self.chances: list[float] = []
        self.paths: list[tuple[int, ...]] = []  # tokens from the root's child to the draft; only for penalties
        self.rank_paths: list[tuple[int, ...]] = []  # of a static tree
        self.distributions: list[tuple[Tensor, Tensor]] = []  # lines of `Drafts.distributions` and their content
        # Of the last level.
        self.active: tuple[int, ...] = rows.drafting
        self.first = 0  # the index of its first draft
        self.level_chances: list[list[float]] = []  # per row, of all candidates
        self.beam_chances: list[float] = []  # of the drafts that are expanded
        self.num_children = 1  # of each parent
        # Of the nodes that are run: per row, what each node of the last level that was run attends to; and the depths of all.
        self.seen: dict[int, list[tuple[int, ...]]] = {row: [()] for row in self.active}
        self.run_depths: list[int] = []
        self.beam: list[list[int]] = []  # per active row, the indices of the drafts that are expanded

    def add_roots(self, logits: Tensor) -> None:
        """Add the children of the roots. logits: [drafting rows, vocab]."""
        lines = torch.tensor(self.active)
        choice = self._choose(logits, 1, Paths(lines, lines.new_empty(len(lines), 0), torch.zeros_like(lines)))
        if choice.distribution is not None:
            self.distributions.append((lines, choice.distribution))
        self.level_chances = choice.chances.tolist()
        self._append([[ROOT]] * len(self.active), choice, 1)

    def select_beam(self, depth: int) -> HostLevel | None:
        """The nodes of depth `depth` that are expanded; None where no row drafts deeper."""
        selected = self._selected(depth)
        if not selected:
            return None
        num_children, earlier = self.num_children, len(self.run_depths)
        starts = {line: self.first + line * len(self.level_chances[0]) for line in selected}
        self.beam = [[starts[line] + column for column in columns] for line, columns in selected.items()]
        self.beam_chances = [self.level_chances[line][column] for line, columns in selected.items() for column in columns]
        parents = [[column // num_children for column in columns] for columns in selected.values()]
        self.active = tuple(self.active[line] for line in selected)
        for row, of_row in zip(self.active, parents, strict=True):
            before = self.seen[row]
            self.seen[row] = [(*before[parent], earlier + node) for node, parent in enumerate(of_row)]
        self.run_depths = [*self.run_depths, *[depth] * len(parents[0])]
        tokens = [[self.tokens[draft] for draft in drafts] for drafts in self.beam]
        return HostLevel(self.active, tokens, parents, [self.seen[row] for row in self.active], self.run_depths)

    def _selected(self, depth: int) -> dict[int, list[int]]:
        """Of each row for which another level pays, by its place in the last level, the candidates that are expanded, ascending."""
        plan = self.rows.plan
        lines = [line for line, row in enumerate(self.active) if self.rows.depths[row] > depth]
        if not lines:
            return {}
        if plan.parents:
            size = len(self.level_chances[0])
            ranks = self.rank_paths[self.first : self.first + size]
            columns = [column for column, path in enumerate(ranks) if path in plan.parents]
            return dict.fromkeys(lines, columns) if columns else {}
        best = {line: _best(self.level_chances[line], plan.beam) for line in lines}
        if plan.min_gain or len(self.tokens) >= plan.nodes:
            best = {line: columns for line, columns in best.items() if self._pays(line, columns)}
        if plan.level_prices and best:
            beams = [[self.level_chances[line][column] for column in columns] for line, columns in best.items()]
            paying = paying_rows(beams, depth, plan.level_prices)
            best = {line: best[line] for line in (list(best)[index] for index in paying)}
        return {line: sorted(columns) for line, columns in best.items()}

    def _pays(self, line: int, columns: Sequence[int]) -> bool:
        """Whether a row's beam promises `min_gain`, and a child of it may be among the drafts that are verified.

        No child has a better chance than its parent, so a level below the worst of the verified drafts changes nothing.

        line: the row's place in the last level. columns: the beam, best first.
        """
        plan, chances = self.rows.plan, self.level_chances[line]
        if sum(chances[column] for column in columns) < plan.min_gain:
            return False
        return len(self.tokens) < plan.nodes or chances[columns[0]] > heapq.nlargest(plan.nodes, self.chances)[-1]

    def add_children(self, logits: Tensor) -> None:
        """Add the children of the beam that was selected last. logits: [rows * width, vocab]."""
        depth, width = self.depths[-1], len(self.beam[0])
        drafts = [draft for of_row in self.beam for draft in of_row]
        rows = [row for row in self.active for _ in range(width)]
        lines = torch.tensor([rows, drafts])
        tokens = torch.tensor([self.paths[draft] for draft in drafts]) if self.paths else lines.new_empty(len(drafts), 0)
        choice = self._choose(logits, depth + 1, Paths(lines[0], tokens, lines[1]))
        if choice.distribution is not None:
            self.distributions.append((len(self.rows) + lines[1], choice.distribution))
        pairs = zip(self.beam_chances, choice.chances.tolist(), strict=True)
        chances = array("f", [of_parent * chance for of_parent, line in pairs for chance in line]).tolist()  # as float32
        size = len(chances) // len(self.active)
        self.level_chances = [chances[line * size : line * size + size] for line in range(len(self.active))]
        self._append(self.beam, choice, depth + 1)

    def _choose(self, logits: Tensor, level: int, paths: Paths) -> Choice:
        return self.rows.choose(logits, level, paths, self.rows.plan.width, self.ids, self.calibration)

    def _append(self, parents: Sequence[Sequence[int]], choice: Choice, depth: int) -> None:
        """Append the children of these drafts, per active row, with the chances in `level_chances`."""
        children = choice.tokens.tolist()
        self.first, self.num_children = len(self.tokens), choice.tokens.shape[1]
        self.tokens += [token for line in children for token in line]
        self.parents += [parent for of_row in parents for parent in of_row for _ in range(self.num_children)]
        for row, of_row in zip(self.active, parents, strict=True):
            self.row_ids += [row] * (len(of_row) * self.num_children)
        self.depths += [depth] * (len(self.tokens) - self.first)
        self.chances += [chance for line in self.level_chances for chance in line]
        if self.rows.plan.parents or not self.first:
            self.rank_paths += self._below(self.rank_paths, [range(self.num_children)] * len(children))
        if self.rows.depends_on_paths:
            self.paths += self._below(self.paths, children)

    def _below(self, paths: Sequence[tuple[int, ...]], lasts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The paths of the drafts since `first`: each is its parent's and one entry more. lasts: per parent, its children's."""
        ends = (end for line in lasts for end in line)
        parents = self.parents[self.first :]
        return [(*(() if parent == ROOT else paths[parent]), end) for parent, end in zip(parents, ends, strict=True)]

    def drafts(self, source: int) -> Drafts:
        """All candidates."""
        drafts = Drafts.of(self.tokens, self.parents, self.row_ids, self.depths, self.chances, source=source)
        distributions = None
        if self.distributions:
            first = self.distributions[0][1]
            distributions = first.new_zeros(len(self.rows) + len(drafts), first.shape[1])
            for lines, distribution in self.distributions:
                distributions[lines] = distribution
        rank_paths = tuple(self.rank_paths) if len(self.rank_paths) == len(drafts) else None
        return replace(drafts, distributions=distributions, rank_paths=rank_paths)


def _best(chances: Sequence[float], count: int) -> list[int]:
    """The indices of the largest chances, best first."""
    return sorted(range(len(chances)), key=chances.__getitem__, reverse=True)[:count]
