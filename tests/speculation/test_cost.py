"""The cost of a round: interpolated between what was measured, monotone, refined by every round."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from headstart.speculation.cost import CostModel, DraftCost, interpolated, monotone

COST = CostModel((1, 4, 16), (10.0, 13.0, 37.0), context_seconds=0.5, row_seconds=2.0, host_seconds=1.0)
SECONDS = st.lists(st.floats(0, 100), min_size=1, max_size=20)


def test_the_cost_of_a_forward_is_linear_between_the_measured_sizes_and_beyond_them():
    assert [COST.forward(nodes) for nodes in (1, 2, 4, 10, 16, 20)] == [10, 11, 13, 25, 37, 45]
    assert COST.forward(4, rows=3, context=10) == 13 + 2 * 2 + 10 * 0.5
    assert COST.plain(2, 8) == 11 + 2 + 4 + 1


def test_every_node_of_a_row_reads_its_context():
    cost = CostModel((1, 4, 16), (10.0, 13.0, 37.0), context_seconds=0.5, context_node_seconds=0.125)
    assert cost.forward(1, 1, 10) == 10 + 10 * 0.5
    assert cost.forward(4, 1, 10) == 13 + 10 * (0.5 + 3 * 0.125)
    assert cost.forward(4, 4, 10) == 13 + 10 * 0.5
    assert cost.forward(16, 4, 10) == 37 + 10 * (0.5 + 3 * 0.125)
    moved = cost.refined(4, 1, 10, 1.5 * cost.forward(4, 1, 10))
    assert moved.context_node_seconds / cost.context_node_seconds == pytest.approx(moved.context_seconds / cost.context_seconds)
    assert moved.context_node_seconds > cost.context_node_seconds


def test_the_rest_of_a_round_costs_more_with_each_row_and_each_node():
    cost = CostModel((1, 4), (10.0, 13.0), host_seconds=1.0, host_row_seconds=0.5, host_node_seconds=0.25)
    assert (cost.host(1), cost.host(9), cost.host(9, 3)) == (1, 3, 4)
    assert cost.plain(3) == 12 + 1 + 2 * 0.5 + 2 * 0.25


def test_a_single_measured_size_costs_in_proportion_above_it():
    assert interpolated((4,), (8.0,), 2) == 8
    assert interpolated((4,), (8.0,), 12) == 24


def test_drafting_costs_its_first_level_and_each_further_one_by_what_it_runs():
    draft = DraftCost(3.0, (1, 8), (1.0, 8.0))
    assert draft.seconds_of(0, 4) == 0
    assert draft.seconds_of(1, 4) == 3
    assert draft.seconds_of(3, 2, rows=4) == 3 + 2 * 8
    by_row = DraftCost(3.0, (1, 8), (1.0, 8.0), 0.5, 0.25)
    assert by_row.seconds_of(3, 2, rows=4) == 3 + 3 * 0.5 + 2 * (8 + 3 * 0.25)
    assert by_row.scaled(2).seconds_of(3, 2, rows=4) == 2 * by_row.seconds_of(3, 2, rows=4)


@given(SECONDS)
def test_monotone_is_isotonic_regression(values):
    np.testing.assert_allclose(monotone(values), isotonic_regression(values).x, atol=1e-9)


def test_a_cost_read_back_from_json_is_the_same():
    cost = CostModel((1, 4), (1.0, 2.0), 0.1, 0.2, DraftCost(0.5, (1, 4), (0.1, 0.2)), 0.3)
    assert CostModel.from_dict(json.loads(json.dumps(cost.as_dict()))) == cost
    assert CostModel.from_dict(json.loads(json.dumps(COST.as_dict()))) == COST


def test_forwards_of_one_size_move_the_cost_of_that_size_to_what_they_take():
    cost = COST
    for _ in range(400):
        cost = cost.refined(4, 1, 0, 20.0)
    assert cost.forward(4) == pytest.approx(20, rel=0.01)
    assert list(cost.seconds) == sorted(cost.seconds)


def test_a_machine_that_is_slower_by_half_is_believed_for_sizes_that_were_not_seen():
    cost = COST
    for _ in range(400):
        for nodes in (1, 16):
            cost = cost.refined(nodes, 1, 0, 1.5 * COST.forward(nodes))
    assert cost.forward(4) == pytest.approx(1.5 * 13, rel=0.15)


def test_a_disturbed_forward_changes_nothing():
    assert COST.refined(4, 1, 0, 100.0) is COST


@pytest.mark.parametrize(
    ("nodes", "seconds", "why"),
    [
        ((), (), "nodes is .*; it must be ascending"),
        ((4, 1), (1.0, 2.0), "nodes is .*; it must be ascending"),
        ((1, 4), (1.0,), "seconds is .*; it must be given for each of 2 nodes"),
        ((1,), (-1.0,), "seconds is .*; it must be positive"),
    ],
)
def test_what_is_no_cost_is_refused(nodes, seconds, why):
    with pytest.raises(ValueError, match=why):
        CostModel(nodes, seconds)
