"""Growing a draft tree where logits are on the CPU: the same tree as `grow` makes on a device, with its nodes in lists.

After a forward the processor's caches are cold, and each kind of tensor operation costs 10 to 50 microseconds. Must not import a
method.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headstart.drafters.parts.grow import Expand, Level
from headstart.speculation.calibration import Calibration
from headstart.speculation.planner import paying_rows
from headstart.speculation.rows import Choice, Paths, Rows
from headstart.speculation.tree import ROOT, Drafts


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
        self.level_chances = torch.empty(0)  # [rows, size]
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
        self.level_chances = choice.chances
        self._append([[ROOT]] * len(self.active), choice, 1)

    def select_beam(self, depth: int) -> Level | None:
        """The nodes of depth `depth` that are expanded; None where no row drafts deeper."""
        selected = self._selected(depth)
        if not selected:
            return None
        size, num_children = self.level_chances.shape[1], self.num_children
        rows = tuple(self.active[line] for line in selected)
        columns = list(selected.values())
        self.beam = [[self.first + line * size + column for column in chosen] for line, chosen in selected.items()]
        tokens = [[self.tokens[draft] for draft in drafts] for drafts in self.beam]
        parents = [[column // num_children for column in chosen] for chosen in columns]
        lists = [tokens, parents, columns, self.beam, [[row] * len(columns[0]) for row in rows]]
        self.level_tensors = torch.tensor(lists)  # [5, rows, width]
        chances = self.level_chances if len(rows) == len(self.active) else self.level_chances[list(selected)]
        self.level_chances, self.active = chances.gather(1, self.level_tensors[2]), rows
        tree_mask = self._tree_mask(parents)
        self.run_depths += [depth] * len(columns[0])
        return Level(rows, self.level_tensors[0], tree_mask, torch.tensor(self.run_depths), self.level_tensors[1])

    def _selected(self, depth: int) -> dict[int, list[int]]:
        """Of each row for which another level pays, by its place in the last level, the candidates that are expanded, ascending."""
        plan = self.rows.plan
        lines = [line for line, row in enumerate(self.active) if self.rows.depths[row] > depth]
        if not lines:
            return {}
        if plan.parents:
            size = self.level_chances.shape[1]
            ranks = self.rank_paths[self.first : self.first + size]
            columns = [column for column, path in enumerate(ranks) if path in plan.parents]
            return dict.fromkeys(lines, columns) if columns else {}
        best = self.level_chances.topk(min(plan.beam, self.level_chances.shape[1]), -1)
        if plan.min_gain or len(self.tokens) >= plan.nodes:
            pays = self._pays(best.values)
            lines = [line for line in lines if pays[line]]
        if plan.level_prices:
            gains = best.values.sum(-1).tolist()
            lines = [lines[index] for index in paying_rows([gains[line] for line in lines], plan.level_prices)]
        indices = best.indices.tolist()
        return {line: sorted(indices[line]) for line in lines}

    def _pays(self, best: Tensor) -> list[bool]:
        """Per row whether the beam promises `min_gain`, and a child of it may be among the drafts that are verified.

        No child has a better chance than its parent, so a level below the worst of the verified drafts changes nothing.

        best: [rows, beam] the best chances, descending.
        """
        plan = self.rows.plan
        pays: list[bool] = (best.sum(-1) >= plan.min_gain).tolist()
        if len(self.tokens) < plan.nodes:
            return pays
        last = heapq.nlargest(plan.nodes, self.chances)[-1]
        return [is_enough and first > last for is_enough, first in zip(pays, best[:, 0].tolist(), strict=True)]

    def _tree_mask(self, parents: Sequence[Sequence[int]]) -> Tensor:
        """[rows, width, nodes run so far + width] bool: each node sees what its parent sees, and itself. Updates `seen`."""
        width, earlier = len(parents[0]), len(self.run_depths)
        flags, length = bytearray(len(parents) * width * (earlier + width)), earlier + width
        line = 0
        for row, of_row in zip(self.active, parents, strict=True):
            before = self.seen[row]
            self.seen[row] = [(*before[parent], earlier + node) for node, parent in enumerate(of_row)]
            for columns in self.seen[row]:
                for column in columns:
                    flags[line * length + column] = 1
                line += 1
        return torch.frombuffer(flags, dtype=torch.bool).view(len(parents), width, length)

    def add_children(self, logits: Tensor) -> None:
        """Add the children of the beam that was selected last. logits: [rows * width, vocab]."""
        depth, drafts = self.depths[-1], self.level_tensors[3].reshape(-1)
        paths = [self.paths[draft] for of_row in self.beam for draft in of_row] if self.paths else None
        tokens = drafts.new_empty(len(drafts), 0) if paths is None else torch.tensor(paths)
        choice = self._choose(logits, depth + 1, Paths(self.level_tensors[4].reshape(-1), tokens, drafts))
        if choice.distribution is not None:
            self.distributions.append((len(self.rows) + drafts, choice.distribution))
        chances = self.level_chances.reshape(-1, 1) * choice.chances
        self.level_chances = chances.reshape(len(self.active), -1)
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
        self.chances += [chance for line in self.level_chances.tolist() for chance in line]
        if self.rows.plan.parents or not self.first:
            self.rank_paths += self._below(self.rank_paths, [range(self.num_children)] * len(children))
        if self.rows.sampling.has_penalties:
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
