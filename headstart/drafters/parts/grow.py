"""Growing a tree level by level: for every drafter that has to run itself once per level.

The most promising nodes of a level are expanded, their best children join the candidates; EAGLE-2's expansion (Li et al. 2024),
a chain and a static tree are the same loop with other numbers. This file knows levels and chances. It refuses to know what
computes the logits.
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
    """The nodes to be run now: `width` per row, for some rows of the round.

    rows: on the host, rows of the round. tokens: [rows, width]. seen: [rows, width, earlier + width] bool, which of the nodes run
    at earlier levels (in the order they were run) and now each one sees, itself included. depths: [earlier + width] of these.
    origins: [rows, width] the parent's place among the nodes of the level before (0 at depth 1).
    """

    rows: tuple[int, ...]
    tokens: Tensor
    seen: Tensor
    depths: Tensor
    origins: Tensor

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @property
    def earlier(self) -> int:
        """Nodes per row that were run at earlier levels."""
        return self.seen.shape[2] - self.width


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
    """Candidates behind the root of every row that drafts.

    logits: [drafting rows, vocab] after each root, in the order of the rows; expand: runs one level and returns what follows each
    of its nodes. ids: target ids where the drafter's vocabulary is reduced. deepest: the level at which the drafter must end, None
    for none. Depth, width and beam: `rows.plan`. A row ends early where another level cannot pay; on a CPU only, since
    a device would have to be asked.
    """
    builder = _TreeBuilder(rows, ids, logits.device, calibration)
    candidates = builder.add_roots(rows.drafting, logits)
    for depth in range(1, min(rows.max_depth, deepest or rows.max_depth)):
        if not (active_rows := builder.active_rows(candidates, depth)):
            break
        beam = builder.select_beam(candidates, active_rows, depth)
        candidates = builder.expand(beam, builder.choose(beam, depth, expand(beam.level)))
    return builder.drafts(source)


def compose(rows: Rows, logits: Sequence[Tensor], calibration: Calibration = UNFITTED, source: int = 0) -> Drafts:
    """The same where what follows depends on the depth alone: parallel heads. One choice per depth serves all parents.

    logits: per depth [drafting rows, vocab], in the order of the rows. Under a rule that draws children, parents of one level
    share their draw: a text has one of them at most.
    """
    drafting = rows.drafting
    builder = _TreeBuilder(rows, None, logits[0].device, calibration)
    candidates = builder.add_roots(drafting, logits[0])
    for depth, said in enumerate(logits[1 : rows.max_depth], 1):
        beam = builder.select_beam(candidates, builder.may_go_deeper(candidates, depth), depth)
        candidates = builder.expand(beam, builder.repeat(beam, drafting, builder.choose_once(drafting, depth, said)))
    return builder.drafts(source)


def of_parents(made: Tensor, rows: tuple[int, ...], level: Level) -> Tensor:
    """What was made of each node's parent, [level's rows, width, ...]. made: [rows, width above, ...], of the nodes of the level
    above, which was run for `rows`: of those, some may have ended."""
    if level.rows != rows:
        active_rows = torch.tensor([rows.index(row) for row in level.rows])
        made = made[active_rows.to(made.device, non_blocking=True)]
    return _picked(made, level.origins)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """A level of candidates, `size` per row of `rows`. ids: [rows, 1] the rows, on the device; tokens, chances, places: [rows,
    size], places among all drafts. Of their parents, each of which has as many of them: paths [rows, parents, depth - 1] tokens;
    seen [rows, parents, run so far] bool, what each sees."""

    rows: tuple[int, ...]
    ids: Tensor
    tokens: Tensor
    chances: Tensor
    places: Tensor
    paths: Tensor
    seen: Tensor

    def of(self, active_rows: Sequence[int]) -> _Candidates:
        """The same of some of its rows."""
        if len(active_rows) == len(self.rows):
            return self
        at = torch.tensor(active_rows).to(self.ids.device, non_blocking=True)
        tensors = (self.ids, self.tokens, self.chances, self.places, self.paths, self.seen)
        return _Candidates(tuple(self.rows[place] for place in active_rows), *(tensor[at] for tensor in tensors))


@dataclass(frozen=True, eq=False)
class _Beam:
    """The expanded part of a level: `level` for the drafter, and where its nodes stand among all drafts."""

    level: Level
    ids: Tensor
    places: Tensor
    chances: Tensor
    paths: Tensor


class _TreeBuilder:
    """The candidates so far."""

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
        self.ranks: list[tuple[int, ...]] = []  # paths of ranks of the last level's candidates, the same for all rows of a shape
        self.run_depths = torch.empty(0, dtype=torch.int64, device=device)

    def add_roots(self, drafting: tuple[int, ...], logits: Tensor) -> _Candidates:
        """The children of the roots."""
        row_ids = torch.tensor(drafting).to(self.device, non_blocking=True)
        choice = self.choose_once(drafting, 0, logits)
        if choice.distribution is not None:
            self.distributions.append((row_ids, choice.distribution))
        self.ranks = [(rank,) for rank in range(choice.tokens.shape[1])]
        places = self._add(choice.tokens, torch.full_like(choice.tokens, ROOT), row_ids[:, None], choice.chances)
        nothing = row_ids.new_empty(len(drafting), 1, 0)
        return _Candidates(drafting, row_ids[:, None], choice.tokens, choice.chances, places, nothing, nothing.bool())

    def may_go_deeper(self, candidates: _Candidates, depth: int) -> list[int]:
        """Which rows of a level may go deeper at all."""
        return [place for place, row in enumerate(candidates.rows) if self.rows.depths[row] > depth]

    def active_rows(self, candidates: _Candidates, depth: int) -> list[int]:
        """Which of them shall."""
        may_go_deeper = self.may_go_deeper(candidates, depth)
        is_open = self.rows.plan.min_gain == 0 and self.size < self.rows.plan.nodes  # whatever comes is welcome
        if is_open or self.rows.plan.parents or self.device.type != "cpu":
            return may_go_deeper
        pays = self._pays(candidates.chances).tolist()
        return [place for place in may_go_deeper if pays[place]]

    def _pays(self, chances: Tensor) -> Tensor:
        """[rows] bool: whether what would be expanded promises enough, and may be among the drafts that are verified: no child has
        a better chance than its parent, so that a level below the last of these changes nothing. chances: [rows, size]."""
        best = chances.topk(min(self.rows.plan.beam, chances.shape[1]), -1).values
        pays = best.sum(-1) >= self.rows.plan.min_gain
        if self.size < self.rows.plan.nodes:
            return pays
        last = torch.cat(self.chances).topk(self.rows.plan.nodes).values[-1]
        return pays & (best[:, 0] > last)

    def select_beam(self, candidates: _Candidates, active_rows: Sequence[int], depth: int) -> _Beam:
        """The most promising nodes of each row that goes deeper."""
        candidates = candidates.of(active_rows)
        best = self._shaped(len(active_rows)) if self.rows.plan.parents else self._likeliest(candidates)  # [rows, width], ascending
        origins = best // (candidates.tokens.shape[1] // candidates.paths.shape[1])
        tokens = candidates.tokens.gather(1, best)
        paths = torch.cat([_picked(candidates.paths, origins), tokens[..., None]], -1)
        own = torch.eye(best.shape[1], dtype=torch.bool, device=self.device).expand(len(active_rows), -1, -1)
        seen = torch.cat([_picked(candidates.seen, origins), own], -1)
        self.run_depths = torch.cat([self.run_depths, torch.full((best.shape[1],), depth, device=self.device)])
        level = Level(candidates.rows, tokens, seen, self.run_depths, origins)
        return _Beam(level, candidates.ids, candidates.places.gather(1, best), candidates.chances.gather(1, best), paths)

    def _likeliest(self, candidates: _Candidates) -> Tensor:
        width = min(self.rows.plan.beam, candidates.places.shape[1])
        return candidates.chances.topk(width, -1).indices.sort(-1).values

    def _shaped(self, num_rows: int) -> Tensor:
        wanted = [place for place, path in enumerate(self.ranks) if path in self.rows.plan.parents]
        self.ranks = [self.ranks[place] for place in wanted]
        return torch.tensor(wanted, dtype=torch.int64).to(self.device, non_blocking=True).expand(num_rows, -1)

    def choose_once(self, drafting: tuple[int, ...], depth: int, logits: Tensor) -> Choice:
        """Children for parents of one depth, one choice per row. logits: [rows, vocab]."""
        row_ids = torch.tensor(drafting).to(self.device, non_blocking=True)
        paths = Paths(row_ids, row_ids.new_empty(len(drafting), 0), torch.zeros_like(row_ids))
        return self.rows.choose(logits, depth + 1, paths, self.rows.plan.width, self.ids, self.calibration)

    def choose(self, beam: _Beam, depth: int, logits: Tensor) -> Choice:
        """Children for each node of a beam. logits: [rows * width, vocab]."""
        paths = Paths(beam.ids.expand_as(beam.places).reshape(-1), beam.paths.reshape(-1, depth), beam.places.reshape(-1))
        return self.rows.choose(logits, depth + 1, paths, self.rows.plan.width, self.ids, self.calibration)

    def repeat(self, beam: _Beam, drafting: tuple[int, ...], choice: Choice) -> Choice:
        """The choice of each node's row, for every node of a beam."""
        lines = torch.tensor([drafting.index(row) for row in beam.level.rows]).to(self.device, non_blocking=True)
        lines = lines.repeat_interleave(beam.level.width)
        return Choice(
            choice.tokens[lines], choice.chances[lines], None if choice.distribution is None else choice.distribution[lines]
        )

    def expand(self, beam: _Beam, choice: Choice) -> _Candidates:
        """The children of a beam, chosen [rows * width, k]."""
        count, width = beam.places.shape
        children = choice.tokens.shape[1]
        if choice.distribution is not None:
            self.distributions.append((len(self.rows) + beam.places.reshape(-1), choice.distribution))
        if self.rows.plan.parents:
            self.ranks = [(*path, rank) for path in self.ranks for rank in range(children)]
        chances = (beam.chances.reshape(-1, 1) * choice.chances).reshape(count, width * children)
        tokens = choice.tokens.reshape(count, width * children)
        places = self._add(tokens, beam.places.repeat_interleave(children, 1), beam.ids, chances)
        return _Candidates(beam.level.rows, beam.ids, tokens, chances, places, beam.paths, beam.level.seen)

    def _add(self, tokens: Tensor, parents: Tensor, ids: Tensor, chances: Tensor) -> Tensor:
        """Append a level of candidates, all [rows, size] but for ids, [rows, 1]; returns their places."""
        for store, values in ((self.tokens, tokens), (self.parents, parents), (self.chances, chances)):
            store.append(values.reshape(-1))
        self.row_ids.append(ids.expand_as(tokens).reshape(-1))
        places = torch.arange(self.size, self.size + tokens.numel(), device=self.device).reshape(tokens.shape)
        self.size += tokens.numel()
        return places

    def drafts(self, source: int) -> Drafts:
        tokens = torch.cat(self.tokens)
        distributions = None
        if self.distributions:
            first = self.distributions[0][1]
            distributions = first.new_zeros(len(self.rows) + self.size, first.shape[1])
            for lines, distribution in self.distributions:
                distributions[lines] = distribution
        sizes = torch.tensor([len(level) for level in self.tokens])
        depths = torch.arange(1, len(sizes) + 1).repeat_interleave(sizes)
        return Drafts(
            tokens,
            torch.cat(self.parents),
            torch.cat(self.row_ids),
            depths.to(self.device, non_blocking=True),
            torch.cat(self.chances).float(),
            torch.full_like(tokens, source),
            distributions,
            max_depth=len(self.tokens),
        )


def _picked(values: Tensor, at: Tensor) -> Tensor:
    """values: [rows, from, width]; at: [rows, some] places in `from`. Returns [rows, some, width]."""
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[2]))
