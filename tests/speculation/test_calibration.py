"""Chances, static trees and plan.json, against brute force and arithmetic by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.speculation.calibration import (
    UNFITTED,
    Calibration,
    acceptance,
    expected_calibration_error,
    expected_tau,
    sparse_tree,
    walk,
)
from headstart.speculation.planner import StaticTree

CALIBRATION = Calibration((0.0, 1.0), ((0.5, 0.8), (1.0, 2.0)), (((0.6, 0.2), (0.4, 0.1)), ((0.4, 0.2), (0.2, 0.1))))
shares = st.floats(0, 1, allow_subnormal=False)
tables = st.lists(st.lists(shares, min_size=1, max_size=2), min_size=1, max_size=3).filter(lambda table: max(table[0]) > 0)


@pytest.mark.parametrize(
    ("temperature", "level", "expected"),
    [(0.0, 1, 0.5), (0.25, 1, 0.625), (1.0, 2, 2.0), (5.0, 1, 1.0), (0.5, 2, 1.4), (0.5, 9, 1.4)],
)
def test_a_temperature_between_two_measured_ones_is_interpolated(temperature, level, expected):
    assert CALIBRATION.calibration_temperature_at(torch.tensor([temperature]), level).item() == pytest.approx(expected)


def test_each_row_has_the_chances_of_its_own_temperature():
    chances = CALIBRATION.of_ranks(torch.tensor([0.0, 0.5, 1.0]), 1, 3)
    assert chances.tolist() == [pytest.approx([0.6, 0.2, 0.08]), pytest.approx([0.5, 0.2, 0.08]), pytest.approx([0.4, 0.2, 0.08])]


def test_without_a_measurement_chances_are_the_documented_defaults():
    temperatures = torch.tensor([0.0, 0.7, 3.0])
    assert UNFITTED.calibration_temperature_at(temperatures, 4).tolist() == pytest.approx([0.6] * 3)
    assert UNFITTED.of_ranks(temperatures, 2, 4)[1].tolist() == pytest.approx([0.6 * 0.4**rank for rank in range(4)])


@pytest.mark.parametrize(
    ("temperatures", "calibration_temperature", "ranks", "word"),
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
def test_a_calibration_with_invalid_numbers_is_refused(temperatures, calibration_temperature, ranks, word):
    with pytest.raises(ValueError, match=word):
        Calibration(temperatures, calibration_temperature, ranks)


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
def test_a_sparse_tree_is_a_valid_static_tree(table, nodes):
    paths = sparse_tree(table, nodes)
    assert 1 <= len(paths) <= nodes
    assert StaticTree(paths).paths == paths


def test_expected_tau_is_one_plus_the_sum_over_paths_of_the_products_of_their_shares():
    assert expected_tau([(0,), (1,), (0, 0)], [[0.6, 0.3], [0.5]]) == pytest.approx(1 + 0.6 + 0.3 + 0.6 * 0.5)


def test_acceptance_rates_count_only_positions_whose_parents_were_kept():
    ranks = torch.tensor([[0, 0], [0, 1], [1, 0], [5, 0]])
    assert acceptance(ranks, 2) == ((0.5, 0.25), (pytest.approx(2 / 3), pytest.approx(1 / 3)))


def test_walk_agrees_with_counting_by_hand():
    """Six tokens, tree (0), (1), (0, 0): the root at token 0 keeps two drafts, that at 3 keeps one, that at 5 is the last."""
    ranks = torch.tensor([[0, 0], [9, 9], [9, 9], [1, 0], [9, 9]])
    assert walk([ranks], [(0,), (1,), (0, 0)]) == 6 / 3
    assert walk([ranks], [(0,)]) == 6 / 5  # the roots are 0, 2, 3, 4


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), max_size=12))
def test_the_tau_of_a_walk_is_between_one_and_the_depth_plus_one(lines):
    tau = walk([torch.tensor(lines).reshape(-1, 2)], [(0,), (0, 0), (1,)])
    assert 1 <= tau <= 3


def test_calibrated_chances_have_no_calibration_error_and_overconfident_ones_have():
    chances = torch.tensor([0.2] * 10 + [0.9] * 10)
    happened = torch.tensor([True] * 2 + [False] * 8 + [True] * 9 + [False])
    assert expected_calibration_error(chances, happened) == pytest.approx(0, abs=1e-6)
    assert expected_calibration_error(torch.ones(4), torch.tensor([True, False, False, False])) == pytest.approx(0.75)
