"""Chances, static trees, and the file that keeps them: against brute force and arithmetic by hand."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.speculation.calibration import (
    UNFITTED,
    Calibration,
    HeadsPlan,
    Tree,
    acceptance,
    expected_calibration_error,
    expected_tau,
    load_plan,
    save_plan,
    sparse_tree,
    walk,
)
from headstart.speculation.planner import StaticTree

FITTED = Calibration((0.0, 1.0), ((0.5, 0.8), (1.0, 2.0)), (((0.6, 0.2), (0.4, 0.1)), ((0.4, 0.2), (0.2, 0.1))))
shares = st.floats(0, 1, allow_subnormal=False)
tables = st.lists(st.lists(shares, min_size=1, max_size=2), min_size=1, max_size=3).filter(lambda table: max(table[0]) > 0)


@pytest.mark.parametrize(
    ("temperature", "level", "tau"),
    [(0.0, 1, 0.5), (0.25, 1, 0.625), (1.0, 2, 2.0), (5.0, 1, 1.0), (0.5, 2, 1.4), (0.5, 9, 1.4)],
)
def test_a_temperature_between_two_measured_ones_is_interpolated(temperature, level, tau):
    assert FITTED.calibration_temperature_at(torch.tensor([temperature]), level).item() == pytest.approx(tau)


def test_every_row_gets_the_chances_of_its_own_temperature():
    found = FITTED.of_ranks(torch.tensor([0.0, 0.5, 1.0]), 1, 3)
    assert found.tolist() == [pytest.approx([0.6, 0.2, 0.08]), pytest.approx([0.5, 0.2, 0.08]), pytest.approx([0.4, 0.2, 0.08])]


def test_without_a_measurement_chances_are_those_of_the_log():
    temperatures = torch.tensor([0.0, 0.7, 3.0])
    assert UNFITTED.calibration_temperature_at(temperatures, 4).tolist() == pytest.approx([0.6] * 3)
    assert UNFITTED.of_ranks(temperatures, 2, 4)[1].tolist() == pytest.approx([0.6 * 0.4**rank for rank in range(4)])


@pytest.mark.parametrize(
    ("temperatures", "warmth", "ranks", "word"),
    [
        ((1.0, 0.0), ((1.0,),) * 2, (((1.0,),),) * 2, "ascending"),
        ((), (), (), "ascending"),
        ((-1.0,), ((1.0,),), (((1.0,),),), "positive"),
        ((0.0,), ((0.0,),), (((1.0,),),), "positive"),
        ((0.0,), ((math.nan,),), (((1.0,),),), "positive"),
        ((0.0,), ((1.0,),), (((1.5,),),), "shares"),
        ((0.0,), ((1.0,), (1.0,)), (((1.0,),),), "each of 1"),
        ((0.0,), ((1.0,),), ((),), "one depth"),
    ],
)
def test_a_calibration_of_nonsense_is_refused(temperatures, warmth, ranks, word):
    with pytest.raises(ValueError, match=word):
        Calibration(temperatures, warmth, ranks)


# -- trees ------------------------------------------------------------------------------------------------------------------


def all_trees(table, nodes):
    """Every tree of at most `nodes` drafts, by brute force."""
    paths = [path for depth in range(1, len(table) + 1) for path in itertools.product(*(range(len(row)) for row in table[:depth]))]
    for size in range(1, nodes + 1):
        for chosen in itertools.combinations(paths, size):
            if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
                yield chosen


@settings(max_examples=40, deadline=None)
@given(tables, st.integers(1, 4))
def test_no_tree_of_that_size_has_a_larger_expected_tau(table, nodes):
    best = max(expected_tau(tree, table) for tree in all_trees(table, nodes))
    assert expected_tau(sparse_tree(table, nodes), table) == pytest.approx(best)


@given(tables, st.integers(1, 12))
def test_a_sparse_tree_is_a_shape_that_the_planner_takes(table, nodes):
    paths = sparse_tree(table, nodes)
    assert 1 <= len(paths) <= nodes
    assert StaticTree(paths).paths == paths


def test_expected_tau_is_one_and_the_sum_of_the_paths_products():
    assert expected_tau([(0,), (1,), (0, 0)], [[0.6, 0.3], [0.5]]) == pytest.approx(1 + 0.6 + 0.3 + 0.6 * 0.5)


def test_acceptance_is_counted_where_the_parents_were_kept():
    ranks = torch.tensor([[0, 0], [0, 1], [1, 0], [5, 0]])
    assert acceptance(ranks, 2) == ((0.5, 0.25), (pytest.approx(2 / 3), pytest.approx(1 / 3)))


def test_a_walk_by_hand():
    """Six tokens; the tree (0), (1), (0, 0): first token; root 0 keeps two, root 3 keeps rank 1, root 5 is the last."""
    ranks = torch.tensor([[0, 0], [9, 9], [9, 9], [1, 0], [9, 9]])
    assert walk([ranks], [(0,), (1,), (0, 0)]) == 6 / 3
    assert walk([ranks], [(0,)]) == 6 / 5  # the roots are 0, 2, 3, 4


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), max_size=12))
def test_a_walk_never_beats_the_depth_and_never_loses_to_plain(lines):
    tau = walk([torch.tensor(lines).reshape(-1, 2)], [(0,), (0, 0), (1,)])
    assert 1 <= tau <= 3


def test_a_calibrated_coin_has_no_error_and_a_boastful_one_has():
    chances = torch.tensor([0.2] * 10 + [0.9] * 10)
    happened = torch.tensor([True] * 2 + [False] * 8 + [True] * 9 + [False])
    assert expected_calibration_error(chances, happened) == pytest.approx(0, abs=1e-6)
    assert expected_calibration_error(torch.ones(4), torch.tensor([True, False, False, False])) == pytest.approx(0.75)


# -- the file ---------------------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_file(tmp_path):
    plan = HeadsPlan(FITTED, {0.0: {2: Tree(((0,), (1,)), 1.5)}, 0.7: {1: Tree(((0,),), 1.25)}})
    save_plan(tmp_path, plan)
    assert load_plan(tmp_path) == plan


def test_a_size_that_was_not_measured_is_refused_with_those_that_were():
    plan = HeadsPlan(FITTED, {0.0: {2: Tree(((0,), (1,)), 1.5)}, 0.7: {1: Tree(((0,),), 1.25), 4: Tree(((0,),), 1.25)}})
    assert plan.static_tree(2, 0.3) == StaticTree(((0,), (1,)))
    with pytest.raises(ValueError, match="no tree of 2 drafts was measured; there are tree:1, tree:4"):
        plan.static_tree(2, 0.4)
    with pytest.raises(ValueError, match="there are none"):
        HeadsPlan(FITTED, {}).static_tree(2, 0.4)


def test_a_plan_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"plan\.json cannot be written: No such file"):
        save_plan(tmp_path / "nowhere", HeadsPlan(FITTED, {}))


def test_heads_that_were_never_measured_have_no_plan(tmp_path):
    assert load_plan(tmp_path) is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("version",), 2),
        (("format",), "other"),
        (("surprise",), 1),
        (("calibration",), None),
        (("calibration", "warmth"), [["warm"]]),
        (("calibration", "ranks"), 3),
        (("trees",), []),
        (("trees", "0", "2", "paths"), "abc"),
        (("trees", "0", "2", "paths"), [[0, 0]]),
        (("trees", "cold"), {}),
    ],
)
def test_a_file_that_is_no_plan_of_ours_is_refused_by_name(tmp_path, place, value):
    save_plan(tmp_path, HeadsPlan(FITTED, {0.0: {2: Tree(((0,), (1,)), 1.5)}}))
    content = json.loads((tmp_path / "plan.json").read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"plan\.json cannot be used"):
        load_plan(tmp_path)
