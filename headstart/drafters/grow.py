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

from headstart.chances import UNFITTED, Calibration
from headstart.sampling import Choice, Paths, Rows
from headstart.tree import ROOT, Drafts


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
    for none. The plan's depth, width and beam are in `rows`. A row ends early where another level cannot pay; on a CPU only, since
    a device would have to be asked.
    """
    growth = _Growth(rows, ids, logits.device, calibration)
    grown = growth.plant(drafting_rows(rows), logits)
    for depth in range(1, min(rows.max_depth, deepest or rows.max_depth)):
        if not (going := growth.going(grown, depth)):
            break
        beam = growth.narrow(grown, going, depth)
        grown = growth.expand(beam, growth.choose(beam, depth, expand(beam.level)))
    return growth.drafts(source)


def compose(rows: Rows, logits: Sequence[Tensor], calibration: Calibration = UNFITTED, source: int = 0) -> Drafts:
    """The same where what follows depends on the depth alone: parallel heads. One choice per depth serves all parents.

    logits: per depth [drafting rows, vocab], in the order of the rows. Under a rule that draws children, parents of one level
    share their draw: a text has one of them at most.
    """
    drafting = drafting_rows(rows)
    growth = _Growth(rows, None, logits[0].device, calibration)
    grown = growth.plant(drafting, logits[0])
    for depth, said in enumerate(logits[1 : rows.max_depth], 1):
        beam = growth.narrow(grown, growth.allowed(grown, depth), depth)
        grown = growth.expand(beam, growth.repeat(beam, drafting, growth.choose_once(drafting, depth, said)))
    return growth.drafts(source)


def drafting_rows(rows: Rows) -> tuple[int, ...]:
    """The rows of the round that draft, on the host."""
    return tuple(row for row, depth in enumerate(rows.depths) if depth > 0)


@dataclass(frozen=True, eq=False)
class _Grown:
    """A level of candidates, `size` per row of `rows`. places: [rows, size] index among all drafts; chances: [rows, size]; paths:
    [rows, size, depth] tokens; origins: [rows, size] the parent's place among the nodes run at the level above; seen: [rows,
    size, run so far] bool, what the parent sees."""

    rows: tuple[int, ...]
    places: Tensor
    chances: Tensor
    paths: Tensor
    origins: Tensor
    seen: Tensor


@dataclass(frozen=True, eq=False)
class _Beam:
    """The expanded part of a level: `level` for the drafter, and where its nodes stand among all drafts."""

    level: Level
    places: Tensor
    chances: Tensor
    paths: Tensor


class _Growth:
    """The candidates so far."""

    def __init__(self, rows: Rows, ids: Tensor | None, device: torch.device, calibration: Calibration) -> None:
        self.rows = rows
        self.ids = ids
        self.calibration = calibration
        self.device = device
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.row_ids: list[Tensor] = []
        self.depths: list[Tensor] = []
        self.chances: list[Tensor] = []
        self.laws: list[tuple[Tensor, Tensor]] = []  # lines of `Drafts.laws` and their content
        self.size = 0
        self.ranks: list[tuple[int, ...]] = []  # paths of ranks of the last level's candidates, the same for all rows of a shape
        self.run_depths = torch.empty(0, dtype=torch.int64, device=device)

    def plant(self, drafting: tuple[int, ...], logits: Tensor) -> _Grown:
        """The children of the roots."""
        count = len(drafting)
        row_ids = torch.tensor(drafting).to(self.device, non_blocking=True)
        choice = self.choose_once(drafting, 0, logits)
        if choice.law is not None:
            self.laws.append((row_ids, choice.law))
        self.ranks = [(rank,) for rank in range(choice.tokens.shape[1])]
        parents = torch.full_like(choice.tokens, ROOT)
        places = self._add(choice.tokens, parents, row_ids[:, None].expand_as(parents), 1, choice.chances)
        nothing = torch.zeros(count, places.shape[1], 0, dtype=torch.bool, device=self.device)
        return _Grown(drafting, places, choice.chances, choice.tokens[..., None], torch.zeros_like(places), nothing)

    def allowed(self, grown: _Grown, depth: int) -> list[int]:
        """Which rows of a level may go deeper at all."""
        return [place for place, row in enumerate(grown.rows) if self.rows.depths[row] > depth]

    def going(self, grown: _Grown, depth: int) -> list[int]:
        """Which of them shall."""
        allowed = self.allowed(grown, depth)
        is_open = self.rows.worth == 0 and self.size < self.rows.nodes  # whatever comes is welcome
        if is_open or self.rows.parents or self.device.type != "cpu":
            return allowed
        pays = self._pays(grown.chances).tolist()
        return [place for place in allowed if pays[place]]

    def _pays(self, chances: Tensor) -> Tensor:
        """[rows] bool: whether what would be expanded promises enough, and may be among the drafts that are verified: no child has
        a better chance than its parent, so that a level below the last of these changes nothing. chances: [rows, size]."""
        best = chances.topk(min(self.rows.beam, chances.shape[1]), -1).values
        pays = best.sum(-1) >= self.rows.worth
        if self.size < self.rows.nodes:
            return pays
        last = torch.cat(self.chances).topk(self.rows.nodes).values[-1]
        return pays & (best[:, 0] > last)

    def narrow(self, grown: _Grown, going: Sequence[int], depth: int) -> _Beam:
        """The most promising nodes of each row that goes deeper."""
        if len(going) < len(grown.rows):
            at = torch.tensor(going).to(self.device, non_blocking=True)
            grown = _Grown(
                tuple(grown.rows[place] for place in going),
                grown.places[at],
                grown.chances[at],
                grown.paths[at],
                grown.origins[at],
                grown.seen[at],
            )
        best = self._shaped(len(going)) if self.rows.parents else self._likeliest(grown)  # [rows, width], ascending
        width = best.shape[1]
        paths = grown.paths.gather(1, best[..., None].expand(-1, -1, depth))
        seen = grown.seen.gather(1, best[..., None].expand(-1, -1, grown.seen.shape[2]))
        own = torch.eye(width, dtype=torch.bool, device=self.device).expand(len(going), -1, -1)
        self.run_depths = torch.cat([self.run_depths, torch.full((width,), depth, device=self.device)])
        level = Level(grown.rows, paths[..., -1], torch.cat([seen, own], -1), self.run_depths, grown.origins.gather(1, best))
        return _Beam(level, grown.places.gather(1, best), grown.chances.gather(1, best), paths)

    def _likeliest(self, grown: _Grown) -> Tensor:
        width = min(self.rows.beam, grown.places.shape[1])
        return grown.chances.topk(width, -1).indices.sort(-1).values

    def _shaped(self, num_rows: int) -> Tensor:
        wanted = [place for place, path in enumerate(self.ranks) if path in self.rows.parents]
        self.ranks = [self.ranks[place] for place in wanted]
        return torch.tensor(wanted, dtype=torch.int64).to(self.device, non_blocking=True).expand(num_rows, -1)

    def choose_once(self, drafting: tuple[int, ...], depth: int, logits: Tensor) -> Choice:
        """Children for parents of one depth, one choice per row. logits: [rows, vocab]."""
        row_ids = torch.tensor(drafting).to(self.device, non_blocking=True)
        paths = Paths(row_ids, row_ids.new_empty(len(drafting), 0), torch.zeros_like(row_ids))
        return self.rows.choose(logits, depth + 1, paths, self.rows.width, self.ids, self.calibration)

    def choose(self, beam: _Beam, depth: int, logits: Tensor) -> Choice:
        """Children for each node of a beam. logits: [rows * width, vocab]."""
        paths = Paths(self._row_ids(beam).reshape(-1), beam.paths.reshape(-1, depth), beam.places.reshape(-1))
        return self.rows.choose(logits, depth + 1, paths, self.rows.width, self.ids, self.calibration)

    def repeat(self, beam: _Beam, drafting: tuple[int, ...], choice: Choice) -> Choice:
        """The choice of each node's row, for every node of a beam."""
        lines = torch.tensor([drafting.index(row) for row in beam.level.rows]).to(self.device, non_blocking=True)
        lines = lines.repeat_interleave(beam.level.width)
        return Choice(choice.tokens[lines], choice.chances[lines], None if choice.law is None else choice.law[lines])

    def _row_ids(self, beam: _Beam) -> Tensor:
        """[rows, width] the row of each node."""
        return torch.tensor(beam.level.rows).to(self.device, non_blocking=True)[:, None].expand_as(beam.level.tokens)

    def expand(self, beam: _Beam, choice: Choice) -> _Grown:
        """The children of a beam, chosen [rows * width, k]."""
        level = beam.level
        count, width = level.tokens.shape
        children = choice.tokens.shape[1]
        if choice.law is not None:
            self.laws.append((len(self.rows) + beam.places.reshape(-1), choice.law))
        if self.rows.parents:
            self.ranks = [(*path, rank) for path in self.ranks for rank in range(children)]
        chances = (beam.chances.reshape(-1, 1) * choice.chances).reshape(count, width * children)
        tokens = choice.tokens.reshape(count, width * children)
        parents = beam.places[..., None].expand(-1, -1, children).reshape(count, -1)
        places = self._add(tokens, parents, self._row_ids(beam)[:, :1].expand_as(tokens), len(self.depths) + 1, chances)
        origins = torch.arange(width, device=self.device).repeat_interleave(children).expand(count, -1)
        seen = level.seen.repeat_interleave(children, 1)
        older = beam.paths.repeat_interleave(children, 1)
        return _Grown(level.rows, places, chances, torch.cat([older, tokens[..., None]], -1), origins, seen)

    def _add(self, tokens: Tensor, parents: Tensor, row_ids: Tensor, depth: int, chances: Tensor) -> Tensor:
        """Append candidates, all [rows, size]; returns their places."""
        for store, values in ((self.tokens, tokens), (self.parents, parents), (self.row_ids, row_ids), (self.chances, chances)):
            store.append(values.reshape(-1))
        self.depths.append(torch.full_like(self.tokens[-1], depth))
        places = torch.arange(self.size, self.size + tokens.numel(), device=self.device).reshape(tokens.shape)
        self.size += tokens.numel()
        return places

    def drafts(self, source: int) -> Drafts:
        tokens = torch.cat(self.tokens)
        laws = None
        if self.laws:
            first = self.laws[0][1]
            laws = first.new_zeros(len(self.rows) + self.size, first.shape[1])
            for lines, law in self.laws:
                laws[lines] = law
        return Drafts(
            tokens,
            torch.cat(self.parents),
            torch.cat(self.row_ids),
            torch.cat(self.depths),
            torch.cat(self.chances).float(),
            torch.full_like(tokens, source),
            laws,
            max_depth=len(self.tokens),
        )
