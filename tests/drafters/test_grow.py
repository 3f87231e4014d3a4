"""Trees grown level by level, against a search over a dictionary of paths."""

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import drafting, make_rows, paths_of

from headstart.drafters.parts.grow import Level, compose, grow, grow_on_device
from headstart.drafters.parts.host_tree import grow_on_host
from headstart.speculation.calibration import UNFITTED
from headstart.speculation.distribution import History
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Plan, StaticTree, rank_paths
from headstart.speculation.rows import Rows
from headstart.speculation.tree import ROOT, Drafts

VOCAB = 5
TABLE = 1.5 * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
KINDS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=3),
    SamplingParams(temperature=0.5),
]
DEPTHS = st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any)

Path = tuple[int, ...]


def children(rows: Rows, row: int, text: Path, path: Path) -> list[tuple[int, float]]:
    """The choice for one parent alone: (token, chance), best first."""
    before, last = (*text, *path)[-2:]
    paths = paths_of([row], [[*path]] if path else None)
    choice = rows.choose(TABLE[before, last][None], len(path) + 1, paths, rows.plan.width)
    return list(zip(choice.tokens[0].tolist(), choice.chances[0].tolist(), strict=True))


def grow_naively(rows: Rows, row: int, text: Path) -> dict[Path, float]:
    """Every candidate of a row: its path and chance."""
    candidates: dict[Path, float] = {}
    level: dict[Path, float] = {(): 1.0}
    for _ in range(rows.depths[row]):
        beam = sorted(level, key=lambda path: -level[path])[: rows.plan.beam]
        level = {(*path, token): level[path] * chance for path in beam for token, chance in children(rows, row, text, path)}
        candidates |= level
    return candidates


def paths_in(drafts: Drafts, row: int) -> dict[Path, float]:
    """The drafts of a row: path and chance."""
    paths: list[Path] = []
    for token, parent in zip(drafts.tokens.tolist(), drafts.parents.tolist(), strict=True):
        paths.append((*(() if parent == ROOT else paths[parent]), token))
    return {
        path: chance
        for path, chance, draft_row in zip(paths, drafts.chances.tolist(), drafts.rows.tolist(), strict=True)
        if draft_row == row
    }


@settings(deadline=None)
@given(DEPTHS, st.integers(1, 3), st.integers(1, 5), st.integers(0, 999))
def test_trees_are_those_of_a_naive_search(depths, width, beam, seed):
    count = len(depths)
    rows = make_rows(KINDS[:count], range(seed, seed + count), VOCAB, depths=depths, width=width, beam=beam)
    texts = [(row, (row + seed) % VOCAB) for row in range(count)]
    drafts = drafting(TABLE)(rows, texts)
    drafts.check()
    assert drafts.max_depth == max(depths) == int(drafts.depths.max())
    for row in range(count):
        actual, expected = paths_in(drafts, row), grow_naively(rows, row, texts[row])
        if min(expected.values(), default=1.0) >= 1e-6:  # below, rounding decides which nodes are in the beam
            assert actual.keys() == expected.keys()
        for path in actual.keys() & expected.keys():
            assert abs(actual[path] - expected[path]) < 1e-5


def fields_of(level: Level) -> dict[str, object]:
    """What a drafter reads of a level."""
    return {name: getattr(level, name) for name in ("rows", "tokens", "tree_mask", "depths", "parents", "width", "earlier")}


PLANS = [
    Plan(4, 3, 2, 99),
    StaticTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 1, 1))).plan([1]),
    StaticTree.full(2, 2, 1).plan([1]),
]


@settings(deadline=None)
@given(DEPTHS, st.sampled_from(PLANS), st.sampled_from(["shared", "fresh"]), st.booleans(), st.integers(0, 999))
def test_the_tree_grown_on_the_host_is_the_tree_grown_on_a_device(depths, plan, noise_rule, has_penalties, seed):
    params = [replace(kind, presence_penalty=0.5 * has_penalties) for kind in KINDS[: len(depths)]]
    rows = make_rows(params, range(seed, seed + len(depths)), VOCAB, depths=depths, noise_rule=noise_rule)
    rows = replace(rows, plan=plan, depths=tuple(min(depth, plan.depth) for depth in depths))
    if has_penalties:
        rows.history = History(len(depths), VOCAB, "cpu")

    def expand(level: Level) -> torch.Tensor:
        levels.append(level)
        return TABLE[level.tokens[:, :1].expand_as(level.tokens), level.tokens].reshape(-1, VOCAB)

    grown = []
    for way in (grow_on_host, grow_on_device):
        levels: list[Level] = []
        drafts = way(rows, TABLE[0, 0].expand(len(rows.drafting), -1), expand, None, 3, UNFITTED, 4)
        grown.append(({**vars(drafts), "max_depth": 0}, [fields_of(level) for level in levels]))
    torch.testing.assert_close(*grown, rtol=0, atol=0)


@settings(deadline=None)
@given(DEPTHS, st.integers(1, 3), st.integers(1, 4))
def test_every_node_attends_to_exactly_its_ancestors_and_itself(depths, width, beam):
    rows = make_rows([KINDS[1]] * len(depths), range(len(depths)), VOCAB, depths=depths, width=width, beam=beam)
    run: dict[int, list[Path]] = {}

    def expand(level: Level) -> torch.Tensor:
        for index, row in enumerate(level.rows):
            above = run.get(row, [()])[-widths.get(row, 1) :]
            paths = [
                (*above[parent], token) for parent, token in zip(level.parents[index], level.tokens[index].tolist(), strict=True)
            ]
            run[row] = run.get(row, []) + paths
            assert level.earlier + level.width == len(run[row]) == len(level.depths)
            assert level.depths.tolist() == [len(path) for path in run[row]]
            for path, mask in zip(paths, level.tree_mask[index].tolist(), strict=True):
                attended = [other for other, is_attended in zip(run[row], mask, strict=True) if is_attended]
                assert attended == [path[: size + 1] for size in range(len(path))]
            widths[row] = level.width
        assert all(rows.depths[row] > int(level.depths[-1]) for row in level.rows)
        return torch.zeros(len(level.rows) * level.width, VOCAB)

    widths: dict[int, int] = {}  # of each row's level before
    drafts = grow(rows, torch.zeros(len(rows.drafting), VOCAB), expand)
    for row, paths in run.items():
        assert set(paths) <= paths_in(drafts, row).keys()


def test_every_parent_has_the_distribution_that_its_children_were_drawn_from():
    rows = make_rows([SamplingParams(temperature=1.0)] * 3, range(3), VOCAB, depths=[3, 0, 2], beam=2, noise_rule="fresh")
    texts = [(0, 1), (2, 2), (3, 4)]
    drafts = drafting(TABLE)(rows, texts).by_row(3)
    assert drafts.distributions.shape == (3 + len(drafts), VOCAB)
    assert drafts.distributions[1].sum() == 0  # the row that does not draft
    parents = drafts.parents.tolist()
    for node, parent in enumerate(parents):
        row = int(drafts.rows[node])
        ancestor = parent
        path: list[int] = []
        while ancestor != ROOT:
            path.insert(0, int(drafts.tokens[ancestor]))
            ancestor = parents[ancestor]
        before, last = (*texts[row], *path)[-2:]
        line = drafts.distributions[row if parent == ROOT else 3 + parent]
        assert torch.allclose(line, TABLE[before, last].double().softmax(-1), atol=1e-6)
    leaves = [node for node in range(len(drafts)) if node not in parents]
    assert float(drafts.distributions[3:][leaves].sum()) == 0


def test_children_that_were_not_drawn_have_no_distribution():
    rows = make_rows([SamplingParams(temperature=1.0)], [0], VOCAB, depths=[2])
    assert drafting(TABLE)(rows, [(0, 1)]).distributions is None


def test_a_child_comes_after_its_parent_and_is_never_likelier():
    rows = make_rows(KINDS, range(4), VOCAB, depths=[4, 3, 4, 1], width=3, beam=3)
    drafts = drafting(TABLE)(rows, [(0, 1)] * 4)
    inner = drafts.parents != ROOT
    assert bool((drafts.chances[inner] <= drafts.chances[drafts.parents[inner]]).all())
    assert all(one <= other for one, other in pairwise(drafts.depths.tolist()))


def test_a_reduced_vocabulary_and_the_source_reach_the_drafts():
    rows = make_rows([SamplingParams()], [0], 50, depths=[2], width=2, beam=1)
    ids = torch.tensor([7, 40, 11])
    drafts = grow(rows, torch.tensor([[0.0, 2.0, 1.0]]), lambda level: torch.tensor([[3.0, 0.0, 1.0]]), ids, source=2)
    assert drafts.tokens.tolist() == [40, 11, 7, 11]
    assert drafts.parents.tolist() == [ROOT, ROOT, 0, 0]
    assert drafts.sources.tolist() == [2] * 4


@settings(deadline=None)
@given(DEPTHS, st.integers(1, 3), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_composed_trees_are_those_grown_from_logits_that_depend_on_the_depth_alone(depths, width, beam, seed, is_static):
    """One choice per depth gives the tree that one choice per node would give."""
    count = len(depths)
    parents = frozenset({(0,), (0, 0)}) if is_static else frozenset()
    width = min(width, 1) if is_static else width
    rows = make_rows(
        KINDS[:count], range(seed, seed + count), VOCAB, depths=depths, width=width, beam=1 if is_static else beam, parents=parents
    )
    logits = [TABLE[depth, torch.tensor(rows.drafting)] for depth in range(4)]  # [depth][drafting rows, vocab]

    def expand(level: Level) -> torch.Tensor:
        lines = torch.tensor([rows.drafting.index(row) for row in level.rows])
        return logits[int(level.depths[-1])][lines].repeat_interleave(level.width, 0)

    if is_static and max(depths) > 3:
        return  # the static tree has no parent so deep
    by_node, by_depth = grow(rows, logits[0], expand), compose(rows, logits[: max(depths)])
    for name in ("tokens", "parents", "rows", "depths", "chances"):
        assert torch.equal(getattr(by_node, name), getattr(by_depth, name))
    for drafts in (by_node, by_depth):
        assert drafts.rank_paths is not None or not is_static
        assert rank_paths(drafts) == rank_paths(replace(drafts, rank_paths=None))  # as the host remembers and as it counts them


@settings(deadline=None)
@given(DEPTHS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))
def test_levels_that_cannot_be_verified_are_not_run_and_no_draft_is_lost(depths, width, beam, nodes, seed):
    count = len(depths)
    planner = Best(nodes=nodes, depth=4, width=width, beam=beam)
    kept = []
    for budget in (10**6, planner.plan(depths).nodes):
        rows = make_rows(KINDS[:count], range(seed, seed + count), VOCAB, depths=depths, width=width, beam=beam, nodes=budget)
        drafts = planner.prune(drafting(TABLE)(rows, [(row, row) for row in range(count)]), planner.plan(depths), count)
        kept.append([paths_in(drafts, row) for row in range(count)])
    assert kept[0] == kept[1]


def test_growth_stops_where_the_tree_is_full_of_better_drafts():
    certain = torch.full((VOCAB,), -9.0)
    certain[:2] = torch.tensor([1.0, 0.9])
    levels = []

    def expand(level):
        levels.append(level.width)
        return torch.zeros(level.width, VOCAB)

    rows = make_rows([SamplingParams()], [0], VOCAB, depths=[4], width=2, beam=2, nodes=1)
    assert grow(rows, certain[None], expand).max_depth == 1
    assert levels == []


def test_a_row_is_drafted_deeper_only_where_that_promises_min_gain():
    sure, unsure = torch.tensor([9.0, 0, 0, 0, 0]), torch.zeros(VOCAB)
    for min_gain, expected in ((0.0, {0, 1}), (0.9, {0})):
        rows = make_rows([SamplingParams()] * 2, [0, 1], VOCAB, depths=[2, 2], width=2, beam=2, min_gain=min_gain)
        deeper = []
        grow(
            rows,
            torch.stack([sure, unsure]),
            lambda level, rows_run=deeper: rows_run.extend(level.rows) or torch.zeros(2 * len(level.rows), VOCAB),
        )
        assert set(deeper) == expected
