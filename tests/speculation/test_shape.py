"""The best shape of a tree by brute force, and what must come out of it: smaller trees with more rows, none where nothing pays."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.speculation.calibration import expected_tau, sparse_tree
from headstart.speculation.cost import CostModel, DraftCost
from headstart.speculation.shape import BEAMS, Limits, best_shape, fastest_shape, level_chances

TABLE = [[0.6, 0.2, 0.1], [0.5, 0.2, 0.1], [0.4, 0.2, 0.1]]
LIMITS = Limits(depth=3, width=3, beam=4, nodes=24)
FREE = CostModel((1, 64), (1.0, 1.0), draft=DraftCost(0.0, (1,), (0.0,)))
SHARES = st.lists(st.floats(0.01, 0.5), min_size=3, max_size=3).map(lambda shares: sorted(shares, reverse=True))


def of_beam(table, depth, beam, width):
    """Chances of all candidates of a growing tree, by enumeration of paths."""
    alive, pool = [(1.0, ())], []
    for level in range(depth):
        children = [(chance * table[level][rank], (*path, rank)) for chance, path in alive for rank in range(width)]
        pool += [chance for chance, _ in children]
        alive = sorted(children, reverse=True)[:beam]
    return sorted(pool, reverse=True)


@settings(max_examples=50)
@given(st.lists(SHARES, min_size=3, max_size=3), st.floats(0.01, 0.5), st.floats(0, 0.5), st.integers(1, 4))
def test_the_fastest_shape_is_that_of_all_shapes(table, node_seconds, level_seconds, rows):
    cost = CostModel((1, 65), (1.0, 1 + 64 * node_seconds), draft=DraftCost(level_seconds, (1,), (level_seconds,)))
    shape = fastest_shape(cost, table, LIMITS, rows)
    rates = [rows / cost.plain(rows)]
    for depth, beam in product((1, 2, 3), (beam for beam in BEAMS if beam <= LIMITS.beam)):
        chances = of_beam(table, depth, beam, LIMITS.width)
        for nodes in range(1, min(len(chances), LIMITS.nodes) + 1):
            seconds = cost.forward(rows * (1 + nodes), rows) + cost.drafting(depth, beam, rows)
            rates.append(rows * (1 + sum(chances[:nodes])) / seconds)
    assert shape.rate == pytest.approx(max(rates), rel=1e-6)


def test_at_a_free_pass_of_fixed_size_the_shape_is_medusas_sparse_tree():
    for nodes in (2, 5, 9):
        limits = Limits(3, 3, 32, nodes)
        shape = best_shape(FREE, TABLE, limits)
        assert shape.nodes == nodes
        assert 1 + shape.gain == pytest.approx(expected_tau(sparse_tree(TABLE, nodes), TABLE))


def test_trees_shrink_as_rows_are_added_and_end_in_plain_decoding():
    cost = CostModel((1, 16, 64), (1.0, 1.1, 4.4), draft=DraftCost(0.1, (1, 64), (0.1, 0.4)))
    sizes = [fastest_shape(cost, TABLE, LIMITS, rows).nodes for rows in (1, 2, 4, 8, 16, 32, 64)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] >= 8
    assert sizes[-1] <= 1


def test_nothing_is_drafted_where_nothing_pays():
    cost = CostModel((1, 2), (1.0, 2.0), draft=DraftCost(0.0, (1,), (0.0,)))
    shape = fastest_shape(cost, TABLE, LIMITS)
    assert (shape.depth, shape.nodes, shape.rate) == (0, 0, 1.0)
    hopeless = CostModel((1, 64), (1.0, 1.0), draft=DraftCost(9.0, (1,), (9.0,)))
    assert fastest_shape(hopeless, TABLE, LIMITS).nodes == 0


def test_an_expensive_pass_is_worth_hundreds_of_nodes():
    offloaded = CostModel((1, 512), (3.0, 3.3), draft=DraftCost(0.02, (1, 32), (0.02, 0.03)))
    shape = fastest_shape(offloaded, [[0.6, 0.2, 0.1, 0.05]] * 16, Limits(16, 4, 32, 512))
    assert shape.nodes > 200
    assert shape.beam > 8


def test_no_candidate_is_likelier_than_its_parents_level():
    levels = list(level_chances(TABLE, 3, 4, 3))
    assert all(level[0] <= before[0] for before, level in pairwise(levels))
    assert [len(level) for level in levels] == [3, 9, 12]
