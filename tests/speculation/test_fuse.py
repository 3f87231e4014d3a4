"""Joining the drafts of several sources, against the sets of paths of their trees."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.speculation.fuse import Proposal, Union, _on_host
from headstart.speculation.tree import ROOT, Drafts

ALL = 1000
NODE = st.tuples(st.integers(0, 5), st.integers(0, 3), st.floats(0, 1), st.integers(0, 1))  # parent, token, chance given it, row


def drafts_of(nodes):
    """A forest of two rows. nodes: (parent's number, token, chance, row); impossible ones and double siblings are left out."""
    tokens, parents, rows, depths, chances, left = [], [], [], [], [], {}
    for number, token, chance, row in nodes:
        parent = number - 1 if number - 1 < len(tokens) else ROOT
        row = row if parent == ROOT else rows[parent]
        family = (row, parent)
        if (token, *family) in zip(tokens, rows, parents, strict=True):
            continue
        chance *= left.get(family, 1.0)  # siblings' chances sum to at most one
        left[family] = left.get(family, 1.0) - chance
        tokens.append(token)
        parents.append(parent)
        rows.append(row)
        depths.append(1 if parent == ROOT else depths[parent] + 1)
        chances.append(chance if parent == ROOT else chance * chances[parent])
    return Drafts.of(tokens, parents, rows, depths, chances)


def paths(drafts):
    """Per draft, its row and the tokens from the root's child to itself."""
    result = []
    for token, parent, row in zip(drafts.tokens.tolist(), drafts.parents.tolist(), drafts.rows.tolist(), strict=True):
        result.append((row, token) if parent == ROOT else (*result[parent], token))
    return result


def conditional(drafts):
    """Per path, the chance given the parent."""
    chances = drafts.chances.tolist()
    return {
        path: 0.0 if chance == 0 else chance / (1 if parent == ROOT else chances[parent])
        for path, chance, parent in zip(paths(drafts), chances, drafts.parents.tolist(), strict=True)
    }


def joined(*sources, odds=None, width=ALL, size=ALL):
    union = Union()
    for source, (drafts, ratios) in enumerate(zip(sources, odds or [[1.0, 1.0]] * len(sources), strict=True)):
        union.add(source, Proposal.of(drafts, 2), ratios)
    return union.drafts(width, size)


TREES = st.lists(st.lists(NODE, max_size=12).map(drafts_of), min_size=1, max_size=3)


@given(TREES)
def test_the_union_has_the_paths_of_all_trees_and_no_other(sources):
    drafts = joined(*sources)
    drafts.check()
    assert sorted(paths(drafts)) == sorted({path for source in sources for path in paths(source)})


@given(TREES, st.lists(st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)), min_size=3, max_size=3))
def test_chances_fall_along_a_path_and_those_of_siblings_sum_to_at_most_one(sources, odds):
    drafts = joined(*sources, odds=odds[: len(sources)])
    chances, sums = drafts.chances.tolist(), {}
    for chance, parent, row in zip(chances, drafts.parents.tolist(), drafts.rows.tolist(), strict=True):
        above = 1.0 if parent == ROOT else chances[parent]
        assert 0 <= chance <= above
        sums[row, parent] = sums.get((row, parent), 0.0) + chance
    assert all(total <= (1.0 if parent == ROOT else chances[parent]) * (1 + 1e-5) + 1e-30 for (_, parent), total in sums.items())


@given(TREES)
def test_rows_follow_each_other_and_siblings_are_sorted(sources):
    drafts = joined(*sources)
    rows, families = drafts.rows.tolist(), {}
    assert rows == sorted(rows)
    for chance, parent, row in zip(drafts.chances.tolist(), drafts.parents.tolist(), rows, strict=True):
        families.setdefault((row, parent), []).append(chance)
    assert all(chances == sorted(chances, reverse=True) for chances in families.values())


@given(TREES)
def test_every_drafts_source_proposed_it_and_none_that_did_has_a_larger_chance(sources):
    drafts = joined(*sources)
    given_by = [conditional(source) for source in sources]
    for path, source in zip(paths(drafts), drafts.sources.tolist(), strict=True):
        assert path in given_by[source]
        assert given_by[source][path] >= max(chances.get(path, 0.0) for chances in given_by) - 1e-5


@given(TREES, st.integers(1, 3), st.integers(1, 6))
def test_limits_hold_and_no_parent_is_missing(sources, width, size):
    drafts, everything = joined(*sources, width=width, size=size), joined(*sources)
    drafts.check()
    families = list(zip(drafts.rows.tolist(), drafts.parents.tolist(), strict=True))
    assert all(families.count(family) <= width for family in families)
    assert all(drafts.rows.tolist().count(row) <= size for row in (0, 1))
    assert set(paths(drafts)) <= set(paths(everything))


def test_sources_that_agree_have_the_larger_chance_and_both_ones_children():
    first = Drafts.of([7, 1], [ROOT, 0], [0, 0], [1, 2], [0.5, 0.25])
    second = Drafts.of([7, 2, 8], [ROOT, 0, ROOT], [0, 0, 0], [1, 2, 1], [0.6, 0.24, 0.1])
    drafts = joined(first, second)
    assert paths(drafts) == [(0, 7), (0, 7, 1), (0, 7, 2), (0, 8)]
    assert drafts.chances.tolist() == pytest.approx([0.6, 0.3, 0.24, 0.1])
    assert drafts.sources.tolist() == [1, 0, 1, 1]


def test_sources_that_contradict_each_other_share_the_chance():
    first, second = Drafts.of([7], [ROOT], [0], [1], [0.9]), Drafts.of([8], [ROOT], [0], [1], [0.6])
    assert joined(first, second).chances.tolist() == pytest.approx([0.6, 0.4])


def test_an_odds_ratio_corrects_the_sum_of_siblings():
    drafts = Drafts.of([7, 8, 7], [ROOT, ROOT, ROOT], [0, 0, 1], [1, 1, 1], [0.6, 0.2, 0.8])
    assert joined(drafts, odds=[[0.25, 1.0]]).chances.tolist() == pytest.approx([0.375, 0.125, 0.8])


def test_the_likeliest_drafts_of_each_row_are_left():
    drafts = Drafts.of([1, 2, 3, 4], [ROOT, 0, ROOT, ROOT], [0, 0, 0, 1], [1, 2, 1, 1], [0.5, 0.1, 0.3, 0.05])
    assert paths(joined(drafts, size=2)) == [(0, 1), (0, 3), (1, 4)]
    assert paths(joined(drafts, width=1)) == [(0, 1), (0, 1, 2), (1, 4)]


def test_what_was_proposed_is_compared_with_the_text_until_it_leaves_the_tree():
    drafts = Drafts.of([1, 2, 3, 9], [ROOT, ROOT, 0, ROOT], [1, 1, 1, 0], [1, 1, 2, 1], [0.5, 0.25, 0.4, 0.3])
    proposal = Proposal.of(drafts)
    assert proposal.compare(1, [1, 3, 5]) == ([0.75, pytest.approx(0.8)], [True, True])
    assert proposal.compare(1, [1, 4]) == ([0.75, pytest.approx(0.8)], [True, False])
    assert proposal.compare(1, [6, 6]) == ([0.75], [False])
    assert proposal.compare(0, [9]) == ([pytest.approx(0.3)], [True])
    assert proposal.compare(2, [9]) == ([], [])


def test_sources_without_drafts_are_no_obstacle():
    drafts = Drafts.of([1], [ROOT], [0], [1], [0.5])
    assert joined(Drafts.none(), drafts).sources.tolist() == [1]
    assert len(joined(Drafts.none(), Drafts.none())) == 0


def test_a_union_expects_the_sum_of_its_chances_per_row():
    union = Union()
    assert union.expected(2) == [0.0, 0.0]
    union.add(0, Proposal.of(Drafts.of([1, 2, 3], [ROOT, 0, ROOT], [0, 0, 1], [1, 2, 1], [0.5, 0.25, 0.1])), [1.0, 1.0])
    union.add(1, Proposal.of(Drafts.of([1, 9], [ROOT, 0], [0, 0], [1, 2], [0.25, 0.125])), [1.0, 1.0])
    assert union.expected(2) == pytest.approx([0.5 + 0.25 + 0.25, 0.1])


def test_of_many_drafts_the_likeliest_are_read():
    drafts = Drafts.of([1, 2, 3, 4], [ROOT, 0, ROOT, 2], [0, 0, 1, 1], [1, 2, 1, 2], [0.5, 0.1, 0.6, 0.3])
    proposal = Proposal.of(drafts, 2, most=3)
    assert (proposal.tokens, proposal.parents) == ([1, 3, 4], [-1, -2, 1])
    assert proposal.chances == pytest.approx([0.5, 0.6, 0.5])


@given(TREES)
def test_drafts_come_to_the_host_in_one_copy_unchanged(sources):
    for drafts in sources:
        copied = _on_host(drafts)
        for name in ("tokens", "parents", "rows", "depths", "chances", "sources"):
            assert getattr(copied, name).tolist() == getattr(drafts, name).tolist()
