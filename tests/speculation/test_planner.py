"""Planners against brute force: which drafts they verify, and how many slots these take."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trees import NODES, drafts_of
from tables import drafting, make_rows

from headstart.drafters.parts.grow import Level, grow
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain, StaticTree, rank_paths
from headstart.speculation.tree import ROOT, Drafts

VOCAB = 5
TABLE = torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))


@given(NODES, st.integers(1, 5))
def test_best_keeps_the_subset_of_highest_chance_that_contains_its_parents(nodes, budget):
    drafts = drafts_of(nodes)
    planner = Best(nodes=budget)
    plan = planner.plan([1, 0, 0])
    assert plan.nodes == budget
    kept = planner.prune(drafts, plan, 3)
    kept.check()
    size = min(budget, len(drafts))
    chances, parents = drafts.chances.tolist(), drafts.parents.tolist()
    closed = [
        chosen for chosen in combinations(range(len(drafts)), size) if all(parents[node] in (*chosen, ROOT) for node in chosen)
    ]
    assert len(kept) == size
    assert float(kept.chances.sum()) == pytest.approx(max(sum(chances[node] for node in chosen) for chosen in closed))
    for token, depth in zip(kept.tokens.tolist(), kept.depths.tolist(), strict=True):
        assert depth == drafts.depths[token]  # no draft has another parent than before
    assert kept.rows.tolist() == sorted(kept.rows.tolist())


@given(NODES, st.sampled_from([0.1, 0.3, 0.6]))
def test_a_floor_drops_drafts_of_lower_chance(nodes, floor):
    drafts = drafts_of(nodes)
    planner = Best(nodes=99, floor=floor)
    plan = planner.plan([1] * 3)
    kept = planner.prune(drafts, plan, 3)
    kept.check()
    assert sorted(kept.tokens.tolist()) == [node for node, chance in enumerate(drafts.chances) if chance >= floor]


def test_rows_share_one_budget_of_nodes():
    drafts = Drafts.of([0, 1, 2, 3], [ROOT, ROOT, 0, 1], [0, 1, 0, 1], [1, 1, 2, 2], [0.9, 0.2, 0.8, 0.1])
    planner = Best(nodes=1)
    assert planner.prune(drafts, planner.plan([2, 2]), 2).tokens.tolist() == [0, 2]


def test_rows_that_do_not_draft_add_no_nodes_to_the_budget():
    assert Best(nodes=7).plan([3, 0, 1]).nodes == 14
    assert StaticTree.full(2, 1).plan([3, 0, 1]).nodes == 8


def test_a_full_tree_has_every_node_of_every_level():
    assert StaticTree.full(2, 1).paths == ((0,), (1,), (0, 0), (1, 0))
    assert len(StaticTree.full(3, 2, 1).paths) == 3 + 6 + 6


@pytest.mark.parametrize("rule", ["shared", "fresh"])
@pytest.mark.parametrize(
    "tree",
    [
        StaticTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0))),
        StaticTree(((0,), (1,), (1, 0), (1, 1), (1, 1, 0))),  # through less probable children
        StaticTree.full(3, 2, 1),
        StaticTree.full(2),
    ],
    ids=["top", "bottom", "full", "flat"],
)
def test_exactly_the_nodes_of_a_static_tree_are_kept(tree, rule):
    plan = tree.plan([3, 2])
    depths = [min(3, plan.depth), min(2, plan.depth)]
    rows = make_rows(
        [SamplingParams(temperature=1.0)] * 2,
        [0, 1],
        VOCAB,
        depths=depths,
        width=plan.width,
        beam=plan.beam,
        parents=plan.parents,
        noise_rule=rule,
    )
    kept = tree.prune(drafting(TABLE)(rows, [(0, 1), (2, 3)]), plan, 2)
    kept.check()
    ranks = rank_paths(kept)
    assert [{ranks[node] for node in range(len(kept)) if kept.rows[node] == row} for row in range(2)] == [
        set(tree.paths),
        {path for path in tree.paths if len(path) <= 2},
    ]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Chain(0), "depth is 0; it must be at least 1"),
        (lambda: Best(nodes=0), "nodes is 0"),
        (lambda: Best(depth=0), "depth is 0"),
        (lambda: Best(width=0), "width is 0"),
        (lambda: Best(beam=-1), "beam is -1"),
        (lambda: Best(floor=1.0), "floor is 1.0"),
        (lambda: Best(floor=-0.1), "floor is -0.1"),
        (lambda: StaticTree(()), "at least one path"),
        (lambda: StaticTree(((),)), "is not a tuple of ranks"),
        (lambda: StaticTree(((-1,),)), "is not a tuple of ranks"),
        (lambda: StaticTree(((0,), (1, 0))), r"\(1, 0\) of a static tree lacks its parent \(1,\)"),
        (lambda: StaticTree.full(2, 0), "width is 0"),
    ],
)
def test_an_invalid_planner_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


PLANNERS = st.one_of(
    st.builds(Chain, st.integers(1, 5)),
    st.builds(Best, *[st.integers(1, high) for high in (12, 5, 3, 4)]),
    st.builds(lambda widths: StaticTree.full(*widths), st.lists(st.integers(1, 3), min_size=1, max_size=4)),
)


@settings(deadline=None)
@given(PLANNERS, st.lists(st.integers(0, 6), min_size=1, max_size=3).filter(any), st.booleans())
def test_no_row_needs_more_slots_than_its_headroom(planner, limits, is_fixed):
    plan = planner.plan(limits)
    depths = [min(limit, plan.depth) for limit in limits]
    count = len(limits)
    rows = make_rows(
        [SamplingParams(temperature=1.0)] * count,
        range(count),
        VOCAB,
        depths=depths,
        width=plan.width,
        beam=plan.beam,
        parents=plan.parents,
        noise_rule="fresh" if is_fixed else "shared",
    )
    num_run = 0  # per row

    def expand(level: Level) -> torch.Tensor:
        nonlocal num_run
        num_run += level.width
        return TABLE[0, level.tokens.reshape(-1)]

    drafts = grow(rows, TABLE[0, 1].expand(sum(depth > 0 for depth in depths), -1), expand)
    kept = planner.prune(drafts, plan, count)
    kept.check()
    headroom = planner.headroom(count)
    assert len(kept) <= plan.nodes
    for row in range(count):
        is_in_row = kept.rows == row
        assert max(int(is_in_row.sum()), num_run) <= headroom  # besides its root
        assert max(kept.depths[is_in_row].tolist(), default=0) <= depths[row]
