"""Sequoia's dynamic programme against all trees of a size, against the most probable paths, and against arithmetic by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.speculation.calibration import expected_tau, sparse_tree
from headstart.speculation.planner import StaticTree
from headstart.speculation.sequoia import Sequoia

shares = st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5, 0.8, 1.0]) | st.floats(0, 1, allow_subnormal=False)
tables = st.lists(st.lists(shares, min_size=1, max_size=3), min_size=1, max_size=3)
falling = st.lists(st.lists(shares, min_size=1, max_size=4).map(lambda row: sorted(row, reverse=True)), min_size=1, max_size=5)


def forests(nodes, table, depth, rank=0):
    """Every list of subtrees below a node, from a rank on: each a tuple of its children's, without gaps, `nodes` in all at most.

    table: [depth][rank] shares, a line for every level below the node.
    depth: levels below the node.
    """
    yield ()
    for size in range(1, nodes + 1 if depth and rank < len(table[0]) else 1):
        for child in forests(size - 1, table[1:], depth - 1):
            if count(child) == size - 1:
                yield from ((child, *siblings) for siblings in forests(nodes - size, table, depth, rank + 1))


def count(forest):
    return sum(1 + count(child) for child in forest)


def value(forest, table):
    """Expected kept tokens of the subtrees, straight from the definition."""
    return sum(share * (1 + value(child, table[1:])) for share, child in zip(table[0] if forest else (), forest, strict=False))


def extended(table, depth):
    """A line for every level: beyond the table, its last one."""
    return [table[min(level, len(table) - 1)] for level in range(depth)]


@given(tables, st.integers(1, 6), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_the_tree_is_the_best_of_all_trees_of_its_size_and_depth(table, nodes, depth):
    lines = extended(table, depth)
    best = 1 + max(value(forest, lines) for forest in forests(nodes, lines, depth))
    assert Sequoia(table, nodes, depth).taus[depth, nodes] == pytest.approx(best)


@given(tables, st.integers(1, 20), st.integers(1, 5))
@settings(deadline=None)
def test_the_paths_are_a_tree_without_gaps_that_has_the_promised_tau(table, nodes, depth):
    programme = Sequoia(table, nodes, depth)
    paths = programme.tree(nodes, depth)
    assert len(paths) <= nodes
    assert max(map(len, paths), default=0) <= depth
    assert all(path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths for path in paths)
    assert expected_tau(paths, extended(table, depth)) == pytest.approx(programme.taus[depth, nodes])
    assert not paths or StaticTree(paths).paths == paths


@given(falling.filter(lambda table: table[0][0] > 0), st.integers(1, 40))
@settings(deadline=None)
def test_the_most_probable_paths_have_the_same_tau_where_shares_fall_with_the_rank(table, nodes):
    depth = len(table)
    assert Sequoia(table, nodes, depth).taus[depth, nodes] == pytest.approx(expected_tau(sparse_tree(table, nodes), table))


@given(tables.filter(lambda table: max(table[0]) > 0), st.integers(1, 20))
@settings(deadline=None)
def test_a_tree_that_may_leave_gaps_is_never_worse(table, nodes):
    assert Sequoia(table, nodes, len(table)).taus[-1, -1] <= expected_tau(sparse_tree(table, nodes), table) + 1e-9


def test_a_likelier_second_child_brings_the_first_one_with_it():
    assert Sequoia([[0.1, 0.6]], 2, 1).tree(2, 1) == ((0,), (1,))
    assert sparse_tree([[0.1, 0.6]], 1) == ((1,),)


def test_tau_grows_with_the_size_and_with_the_depth():
    taus = Sequoia([[0.6, 0.2, 0.1], [0.5, 0.3, 0.1]], 30, 6).taus
    assert min(np.diff(taus, axis=0).min(), np.diff(taus, axis=1).min()) >= 0
    assert {*taus[0], *taus[:, 0]} == {1.0}


def test_a_vector_by_rank_gives_the_papers_recurrence():
    """Chen et al. 2024: T[m][l][b] is the value of m nodes, the root counted, at most l levels, and b children of the root."""
    ranks, size, depth = [0.5, 0.3, 0.15], 12, 4
    tree = {(1, level, 0): 1.0 for level in range(depth + 1)}

    def best(nodes, level):
        return max(tree.get((nodes, level, branches), -math.inf) for branches in range(len(ranks) + 1))

    for level, nodes, branches in itertools.product(range(1, depth + 1), range(2, size + 1), range(1, len(ranks) + 1)):
        tree[nodes, level, branches] = max(
            tree.get((first, level, branches - 1), -math.inf) + ranks[branches - 1] * best(nodes - first, level - 1)
            for first in range(1, nodes)
        )
    programme = Sequoia([ranks], size - 1, depth)
    assert programme.taus[depth] == pytest.approx(
        [max(best(m, depth) for m in range(1, nodes + 1)) for nodes in range(1, size + 1)]
    )


def test_the_choice_has_the_most_tokens_per_second_of_all_sizes_and_depths():
    programme = Sequoia([[0.6, 0.2, 0.1]], 40, 8)
    forward, drafting = [10.0 + max(0, nodes - 8) for nodes in range(41)], [0.5 * depth for depth in range(9)]
    choice = programme.choose(forward, drafting)
    rates = [programme.taus[depth, nodes] / (forward[nodes] + drafting[depth]) for depth in range(9) for nodes in range(41)]
    assert choice.tokens_per_second == pytest.approx(max(rates))
    assert choice.tau / (forward[len(choice.paths)] + drafting[choice.depth]) == pytest.approx(max(rates))
    assert max(map(len, choice.paths)) == choice.depth


def test_free_verification_takes_the_largest_tree_and_dear_verification_takes_none():
    programme = Sequoia([[0.6, 0.2, 0.1]], 64, 6)
    assert len(programme.choose([1.0] * 65, [0.0] * 7).paths) == 64
    dear = programme.choose([1.0 + nodes for nodes in range(65)], [0.0] * 7)
    assert (dear.paths, dear.depth, dear.tau, dear.tokens_per_second) == ((), 0, 1.0, 1.0)


def test_dear_drafting_makes_the_tree_shallow():
    programme, forward = Sequoia([[0.6, 0.2, 0.1]], 32, 8), [10.0] * 33
    depths = [programme.choose(forward, [seconds * depth for depth in range(9)]).depth for seconds in (0.0, 1.0, 5.0, 50.0)]
    assert depths == sorted({*depths}, reverse=True)
    assert depths[-1] == 0


@pytest.mark.parametrize(
    ("table", "nodes", "depth", "word"),
    [
        ([], 4, 2, "table"),
        ([[]], 4, 2, "table"),
        ([[1.5]], 4, 2, "shares"),
        ([[0.5]], 0, 2, "max_nodes"),
        ([[0.5]], 4, 0, "max_depth"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(table, nodes, depth, word):
    with pytest.raises(ValueError, match=word):
        Sequoia(table, nodes, depth)


def test_more_than_the_limits_is_refused():
    programme = Sequoia([[0.5, 0.2]], 4, 2)
    with pytest.raises(ValueError, match="nodes is 5"):
        programme.tree(5, 2)
    with pytest.raises(ValueError, match="depth is 3"):
        programme.tree(4, 3)
    with pytest.raises(ValueError, match="forward_seconds"):
        programme.choose([0.0], [0.0])
    with pytest.raises(ValueError, match="draft_seconds"):
        programme.choose([1.0], [-1.0])
