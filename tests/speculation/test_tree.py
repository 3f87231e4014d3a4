"""Trees as flat lists, compared with walks in plain Python."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headstart.speculation.tree import ROOT, Drafts, Kept, count_by_row, lineage, merge

# Of every draft: which of the row's last drafts is its parent (0: the root), and its row.
SHAPES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=24)


def drafts_of(shape: list[tuple[int, int]]) -> Drafts:
    """Random trees of four rows, in any order in which parents precede children; all tokens are distinct."""
    parents, rows, depths = [], [], []
    for back, row in shape:
        before = [node for node, other in enumerate(rows) if other == row]
        parent = before[-back] if 0 < back <= len(before) else ROOT
        parents.append(parent)
        rows.append(row)
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    return Drafts.of(range(100, 100 + len(shape)), parents, rows, depths, [0.5] * len(shape))


def path(drafts: Drafts, node: int) -> list[int]:
    """The node and its ancestors."""
    parents = drafts.parents.tolist()
    nodes = []
    while node != ROOT:
        nodes.append(node)
        node = parents[node]
    return nodes


@given(SHAPES)
def test_lineage_is_the_path_to_the_root(shape):
    drafts = drafts_of(shape)
    tree_mask = lineage(drafts.parents, int(max(drafts.depths, default=0)))
    for node in range(len(drafts)):
        assert tree_mask[node].nonzero().flatten().tolist() == sorted(path(drafts, node))


@given(SHAPES)
def test_by_row_sorts_the_rows_and_keeps_every_path(shape):
    drafts = drafts_of(shape)
    flat = drafts.by_row(4)
    flat.check()
    assert flat.rows.tolist() == sorted(drafts.rows.tolist())
    texts = {tuple(drafts.tokens[path(drafts, node)].tolist()) for node in range(len(drafts))}
    assert {tuple(flat.tokens[path(flat, node)].tolist()) for node in range(len(flat))} == texts
    assert count_by_row(flat, 4) == [drafts.rows.tolist().count(row) for row in range(4)]


@given(SHAPES, st.data())
def test_take_keeps_paths_and_distributions(shape, data):
    drafts = replace(drafts_of(shape), distributions=torch.arange(4 + len(shape))[:, None].float())
    drawn = data.draw(st.lists(st.sampled_from(range(len(drafts))))) if len(drafts) else []
    order = sorted({ancestor for node in drawn for ancestor in path(drafts, node)})
    taken = drafts.take(torch.tensor(order, dtype=torch.int64), 4)
    taken.check()
    for index, node in enumerate(order):
        assert taken.tokens[path(taken, index)].tolist() == drafts.tokens[path(drafts, node)].tolist()
    assert taken.distributions.flatten().tolist() == [0, 1, 2, 3, *(4 + node for node in order)]


@given(
    SHAPES, st.lists(st.integers(1, 4), min_size=4, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 40)
)
def test_a_forest_is_every_stem_followed_by_its_drafts(shape, sizes, ends_at_root, num_nodes):
    drafts = drafts_of([(back, row) for back, row in shape if ends_at_root[row]]).by_row(4)
    stems = [[10 * row + index for index in range(size)] for row, size in enumerate(sizes)]
    forest = merge(stems, [7, 0, 3, 5], ends_at_root, drafts, num_nodes)
    tokens, positions, asked = [], [], []
    for row, (stem, start) in enumerate(zip(stems, [7, 0, 3, 5], strict=True)):
        nodes = [node for node in range(len(drafts)) if drafts.rows[node] == row]
        root = start + len(stem) - 1
        first = len(tokens) + len(stem)
        tokens += [*stem, *drafts.tokens[nodes].tolist()]
        positions += [*range(start, root + 1), *(root + depth for depth in drafts.depths[nodes].tolist())]
        asked += range(first - 1, first + len(nodes)) if ends_at_root[row] else []
    dead = max(0, num_nodes - len(tokens))
    assert forest.tokens.tolist() == tokens + [0] * dead
    assert forest.positions.tolist() == positions + [0] * dead
    assert forest.asked[: forest.num_asked].tolist() == asked
    assert forest.num_asked == len(asked)
    assert len(forest.asked) == max(1, num_nodes, len(asked))  # at least one node, and at least `num_nodes`
    assert (len(forest), forest.num_dead, forest.num_rows) == (len(tokens) + dead, dead, 4)


def test_merge_refuses_an_empty_stem_and_drafts_after_a_stem_without_root():
    with pytest.raises(AssertionError, match="a stem is empty"):
        merge([[]], [0], [True], Drafts.none())
    with pytest.raises(AssertionError, match="does not end at its root"):
        merge([[1]], [0], [False], Drafts.of([5], [ROOT], [0], [1], [1.0]))


@pytest.mark.parametrize(
    ("parents", "rows", "depths", "tokens", "sentence"),
    [
        ([1, ROOT], [0, 0], [2, 1], [5, 6], "precedes its parent"),
        ([ROOT, 0], [0, 0], [1, 1], [5, 6], "not one below"),
        ([ROOT, ROOT], [0, 0], [1, 2], [5, 6], "not one below"),
        ([ROOT, 0], [0, 1], [1, 2], [5, 6], "in another row"),
        ([ROOT, ROOT], [0, 0], [1, 1], [5, 5], "the same token"),
        ([ROOT, 0, 0], [0, 0, 0], [1, 2, 2], [5, 6, 6], "the same token"),
    ],
)
def test_check_names_each_broken_property(parents, rows, depths, tokens, sentence):
    with pytest.raises(AssertionError, match=sentence):
        Drafts.of(tokens, parents, rows, depths, [0.5] * len(tokens)).check()


def test_only_siblings_need_distinct_tokens():
    Drafts.of([5, 5, 6, 6], [ROOT, ROOT, 0, 1], [0, 1, 0, 1], [1, 1, 2, 2], [0.5] * 4).check()


def test_no_drafts_are_valid_drafts():
    none = Drafts.none()
    none.check()
    assert len(none.by_row(3)) == 0
    assert count_by_row(none, 3) == [0, 0, 0]


def test_kept_lists_every_token_its_position_and_the_next_token():
    kept = Kept((4, 1), ((7, 8, 9), (5, 6)), (10, 0), (2, 0), (1, 0), None, torch.device("cpu"))
    assert kept.lengths == (2, 1)
    assert kept.tokens.tolist() == [7, 8, 5]
    assert kept.nexts.tolist() == [8, 9, 6]
    assert kept.positions.tolist() == [10, 11, 0]
