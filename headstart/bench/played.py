"""Recorded rounds played under a planner: the rounds that it would have run, and their time by a measured cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headstart.bench.recorded import Recording, Tree
from headstart.speculation.cost import CostModel
from headstart.speculation.outcome import LearningPlanner, Load, Outcome
from headstart.speculation.planner import NO_DRAFTS, Plan, Planner, paying_rows
from headstart.speculation.tree import ROOT, Drafts
from headstart.speculation.trust import CALIBRATED, Trust, correct


class Candidate(NamedTuple):
    """A drafted node. node: in the recorded tree. order: among all drafted nodes. chance: of the whole path. ranks: of the path."""

    node: int
    order: int
    chance: float
    ranks: tuple[int, ...]


@dataclass
class Played:
    """What a planner gave on recorded answers. seconds: by the cost model. rounds, tokens, nodes: of all rows."""

    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    nodes: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Row:
    """A row that plays a recording. place: of its root in the answer."""

    recording: Recording
    seat: int
    place: int = 0

    @property
    def left(self) -> int:
        return len(self.recording.trees) - self.place

    @property
    def tree(self) -> Tree:
        return self.recording.trees[self.place]


@dataclass
class _Drafted:
    """What a drafter would have drafted of the recorded trees under a plan, flat, and the levels it ran."""

    rows: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)  # in the recorded tree
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    seconds: float = 0.0
    depth: int = 0

    def drafts(self) -> Drafts:
        """The drafts, whose tokens are the nodes' numbers."""
        return Drafts.of(self.nodes, self.parents, self.rows, self.depths, self.chances)


def play(recordings: Sequence[Recording], planner: Planner, cost: CostModel, num_rows: int = 1) -> Played:
    """Answer the recorded prompts under a planner, `num_rows` at a time, until less than so many are left."""
    waiting, result, trust = list(recordings), Played(), Trust(prior=CALIBRATED)
    rows = [_Row(waiting.pop(0), seat) for seat in range(min(num_rows, len(waiting)))]
    while rows:
        _round(rows, planner, cost, trust, result)
        for index, row in enumerate(rows):
            if row.left <= 0:
                if not waiting:
                    return result
                trust.free(row.seat)
                if isinstance(planner, LearningPlanner):
                    planner.restart()
                rows[index] = _Row(waiting.pop(0), row.seat)
    return result


def _round(rows: list[_Row], planner: Planner, cost: CostModel, trust: Trust, result: Played) -> None:
    """One round of all rows. Adds to `result`."""
    learns = isinstance(planner, LearningPlanner)
    contexts = tuple(row.recording.num_prompt + row.place for row in rows)
    odds = [trust.odds(row.seat) if learns else 1.0 for row in rows]
    if isinstance(planner, LearningPlanner):
        temperature = sum(row.recording.temperature for row in rows) / len(rows)
        planner.see(Load((1,) * len(rows), contexts, temperature))
    limits = [row.left - 1 for row in rows]
    plan = planner.plan(limits) if any(limits) else NO_DRAFTS
    depths = [min(limit, plan.depth) for limit in limits]
    drafted = grow(rows, depths, plan, odds, cost)
    drafts = planner.prune(drafted.drafts(), plan, len(rows)) if drafted.nodes else drafted.drafts()
    forward = cost.forward(len(rows) + len(drafts), len(rows), sum(contexts))
    result.seconds += forward + cost.host(len(rows) + len(drafts), len(rows)) + drafted.seconds
    result.rounds += 1
    result.nodes += len(rows) + len(drafts)
    held = _verdict(rows, drafts, trust, odds, learns)
    for row, kept in zip(rows, held, strict=True):
        row.place += kept + 1
        result.tokens += kept + 1
    if isinstance(planner, LearningPlanner):
        num_drafting = sum(depth > 0 for depth in depths)
        gain = float(drafts.chances.sum())
        planner.learn(Outcome(num_drafting, drafted.depth, len(drafts), gain, sum(held), drafted.seconds, forward))


def _verdict(rows: Sequence[_Row], drafts: Drafts, trust: Trust, odds: Sequence[float], learns: bool) -> list[int]:
    """How many drafts each row keeps. Lets `trust` learn."""
    held = [0] * len(rows)
    masses: list[dict[int, float]] = [{} for _ in rows]
    lists = zip(drafts.rows.tolist(), drafts.tokens.tolist(), drafts.parents.tolist(), drafts.depths.tolist(), strict=True)
    on_path: dict[int, bool] = {}
    for index, (row, node, parent, depth) in enumerate(lists):
        if parent != ROOT and not on_path[parent]:
            on_path[index] = False
            continue
        tree = rows[row].tree
        masses[row][depth] = masses[row].get(depth, 0.0) + correct(tree.chances[node], odds[row])
        on_path[index] = tree.is_right[node]
        held[row] += tree.is_right[node]
    predicted = [[mass[depth] for depth in sorted(mass)] for mass in masses]
    for row, chances, kept, ratio in zip(rows, predicted, held, odds, strict=True):
        if learns:
            trust.learn_path(row.seat, chances, kept, ratio)
    return held


def grow(rows: Sequence[_Row], depths: Sequence[int], plan: Plan, odds: Sequence[float], cost: CostModel) -> _Drafted:
    """What a drafter grows under a plan, as `headstart.drafters.parts.grow` does, out of recorded trees."""
    drafted = _Drafted()
    beams: dict[int, list[Candidate]] = {}  # row -> recorded node, index, chance, ranks
    for row, depth in enumerate(depths):
        if depth:
            beams[row] = [Candidate(ROOT, ROOT, 1.0, ())]
    depth = 0
    while beams:
        depth += 1
        width = max(map(len, beams.values()))
        if cost.draft is not None:
            drafted.seconds += cost.draft.first_of(len(beams)) if depth == 1 else cost.draft.level(width * len(beams), len(beams))
        chosen: dict[int, list[Candidate]] = {}
        for row, beam in beams.items():
            best = _beam(_children(drafted, row, rows[row].tree, beam, plan.width, odds[row], depth), plan)
            if best and depths[row] > depth and sum(one.chance for one in best) >= plan.min_gain:
                chosen[row] = best
        if plan.level_prices:
            chances = [[one.chance for one in best] for best in chosen.values()]
            paying = paying_rows(chances, depth, plan.level_prices)
            chosen = {row: chosen[row] for row in (list(chosen)[index] for index in paying)}
        beams = chosen
    drafted.depth = depth
    return drafted


def _children(
    drafted: _Drafted,
    row: int,
    tree: Tree,
    beam: Sequence[Candidate],
    width: int,
    odds: float,
    depth: int,
) -> list[Candidate]:
    """Add the children of a row's beam, and return them."""
    candidates = []
    for node, index, chance, ranks in beam:
        for rank, child in enumerate(tree.children[node + 1][:width]):
            child_chance = chance * correct(tree.chances[child], odds)
            candidates.append(Candidate(child, len(drafted.nodes), child_chance, (*ranks, rank)))
            drafted.rows.append(row)
            drafted.nodes.append(child)
            drafted.parents.append(index)
            drafted.depths.append(depth)
            drafted.chances.append(child_chance)
    return candidates


def _beam(candidates: Sequence[Candidate], plan: Plan) -> list[Candidate]:
    """The candidates that are expanded."""
    if plan.parents:
        return [candidate for candidate in candidates if candidate.ranks in plan.parents]
    return sorted(sorted(candidates, key=lambda one: -one.chance)[: plan.beam], key=lambda one: one.order)
