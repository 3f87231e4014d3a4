"""Verification and the coupled rule, compared with a naive walk from the root."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import forest_of, make_rows, paths_of

from headstart.speculation.params import SamplingParams
from headstart.speculation.rows import Rows
from headstart.speculation.rules import RULES, coupled_as_reached, coupled_at_once
from headstart.speculation.tree import ROOT, Drafts, merge
from headstart.speculation.verify import Decisions, Rule, asked_nodes, verify

VOCAB = 4
NODES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, VOCAB - 1)), max_size=24)
PARAMS = [
    SamplingParams(temperature=3.0, top_k=1),  # rarely certain
    SamplingParams(),
    SamplingParams(temperature=1.0, top_p=0.7),
    SamplingParams(temperature=0.7, repetition_penalty=1.0),
]


def test_the_drafts_whose_parents_were_kept_are_compared_with_what_became_of_them():
    """Two children of the root, of which the second is kept; its child is not, and the first one's child has no kept parent."""
    drafts = Drafts.of([1, 2, 3, 0], [ROOT, ROOT, 0, 1], [0] * 4, [1, 1, 2, 2], [0.5, 0.25, 0.4, 0.125], source=7)
    forest = merge([(0,)], [0], [True], drafts)
    logits = torch.eye(VOCAB)[[2, 0, 1, 0, 0]]  # the root decides token 2, and that draft decides token 1
    verdict = verify(forest, logits, make_rows([SamplingParams()], [0], VOCAB), RULES["coupled"])
    assert verdict.kept == ((1,),)
    assert [tuple(one) for one in verdict.compared] == [(7, 0.5, False), (7, 0.25, True), (7, 0.5, False)]


def drafts_of(nodes: list[tuple[int, int, int]], ends_at_root: tuple[bool, ...] = (True,) * 4) -> Drafts:
    """Random trees of four rows. Left out: nodes with the token of a sibling, and nodes of rows that do not end at their root."""
    parents, rows, tokens, depths = [], [], [], []
    for back, row, token in nodes:
        before = [node for node, other in enumerate(rows) if other == row]
        parent = before[-back] if 0 < back <= len(before) else ROOT
        siblings = {tokens[node] for node in before if parents[node] == parent}
        if token in siblings or not ends_at_root[row]:
            continue
        parents.append(parent)
        rows.append(row)
        tokens.append(token)
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    return Drafts.of(tokens, parents, rows, depths, [0.5] * len(tokens)).by_row(4)


def descend(decided: list[int], drafts: Drafts, row: int) -> tuple[list[int], list[int]]:
    """The naive walk: from the root to the child with the decided token, while there is one.

    decided: the token decided after each of the row's asked nodes, its root first.
    Returns the emitted tokens and the kept drafts.
    """
    nodes = [node for node in range(len(drafts)) if drafts.rows[node] == row]
    emitted, kept, node = [decided[0]], [], ROOT
    while True:
        children = [index for index, child in enumerate(nodes) if drafts.parents[child] == node]
        following = [index for index in children if drafts.tokens[nodes[index]] == emitted[-1]]
        if not following:
            return emitted, kept
        kept.append(following[0])
        node = nodes[following[0]]
        emitted.append(decided[1 + following[0]])


@given(NODES, st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 999))
def test_every_row_that_ends_at_its_root_keeps_the_path_of_decided_tokens(nodes, ends_at_root, seed):
    drafts = drafts_of(nodes, tuple(ends_at_root))
    forest = merge([[7], [8, 9], [1], [2]], [0] * 4, ends_at_root, drafts, num_nodes=30)
    decided = torch.randint(0, VOCAB, (forest.num_asked,), generator=torch.Generator().manual_seed(seed))

    def judge(forest, asked, logits, rows, in_full):
        assert len(logits) == len(asked.rows)  # the logits of repeated nodes are left out
        return Decisions(decided, decided[asked.parents] == forest.drafts.tokens, torch.ones_like(decided, dtype=torch.bool))

    rows = make_rows([SamplingParams()] * 4, [0] * 4, VOCAB)
    verdict = verify(forest, torch.zeros(len(forest.asked), VOCAB), rows, Rule(judge, "shared"))
    first = 0
    for row in range(4):
        if not ends_at_root[row]:
            assert (verdict.emitted[row], verdict.kept[row], verdict.asked[row], verdict.tried[row]) == ((), (), (), 0)
            continue
        emitted, kept = descend(decided[first:].tolist(), drafts, row)
        assert verdict.emitted[row] == tuple(emitted)
        assert verdict.kept[row] == tuple(kept)
        assert verdict.asked[row] == (first, *(first + 1 + index for index in kept))
        assert verdict.tried[row] == max(drafts.depths[drafts.rows == row].tolist(), default=0)
        first += forest.counts[row] + 1


@given(NODES, st.integers(0, 999))
def test_the_coupled_rule_keeps_what_the_target_decides_alone(nodes, seed):
    """Rows of different kinds; the oracle decides every node alone, at its own position."""
    drafts = drafts_of(nodes)
    forest = merge([[0]] * 4, [3, 0, 8, 5], [True] * 4, drafts)
    asked = asked_nodes(forest)
    logits = torch.randn(len(asked.rows), VOCAB, generator=torch.Generator().manual_seed(seed))
    rows = make_rows(PARAMS, range(seed, seed + 4), VOCAB, root_positions=[3, 0, 8, 5])
    verdict = verify(forest, logits, rows, RULES["coupled"])
    decided = []
    for line, (row, level) in enumerate(zip(asked.rows.tolist(), asked.levels.tolist(), strict=True)):
        alone = make_rows([PARAMS[row]], [seed + row], VOCAB, root_positions=[rows.root_positions[row] + level])
        decided.append(alone.decide_fully(logits[line : line + 1], torch.tensor([0]), range(1), paths_of([0])).item())
    first = 0
    for row in range(4):
        assert (list(verdict.emitted[row]), list(verdict.kept[row])) == descend(decided[first:], drafts, row)
        first += forest.counts[row] + 1


@pytest.mark.parametrize("tries", [1, 2])
@given(NODES, st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 999))
def test_coupled_at_once_keeps_what_coupled_as_reached_keeps(tries, nodes, ends_at_root, seed):
    """The GPU's and the CPU's variant. With one try per truncated distribution, many tokens are not certain at first."""
    drafts = drafts_of(nodes, tuple(ends_at_root))
    forest = merge([[0]] * 4, [3, 0, 8, 5], ends_at_root, drafts, num_nodes=30)
    logits = torch.randn(len(forest.asked), VOCAB, generator=torch.Generator().manual_seed(seed))
    rows = make_rows(PARAMS, range(seed, seed + 4), VOCAB, root_positions=[3, 0, 8, 5])
    decide = Rows.decide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "decide", lambda *args: decide(*args, tries=tries))
        verdicts = [vars(verify(forest, logits, rows, Rule(judge, "shared"))) for judge in (coupled_at_once, coupled_as_reached)]
    assert verdicts[0] == verdicts[1] == vars(verify(forest, logits, rows, Rule(in_full, "shared")))


def in_full(forest, asked, logits, rows, _):
    """The coupled rule with every token certain."""
    return coupled_at_once(forest, asked, logits, rows, True)


def test_a_node_off_the_kept_path_may_be_uncertain():
    """The rule runs in full only where a token on the kept path is uncertain."""
    asked_in_full = []

    def judge(forest, asked, logits, rows, in_full):
        asked_in_full.append(in_full)
        return Decisions(torch.tensor([1, 2, 3]), torch.tensor([True, False]), torch.tensor([True, True, False]))

    drafts = Drafts.of([1, 2], [ROOT, ROOT], [0, 0], [1, 1], [0.5, 0.5])
    rows = make_rows(PARAMS[:1], [0], VOCAB)
    assert verify(forest_of(drafts, [[0]]), torch.zeros(3, VOCAB), rows, Rule(judge, "shared")).emitted == ((1, 2),)
    assert asked_in_full == [False]


def test_nothing_is_decided_where_no_stem_ends_at_its_root():
    forest = merge([[1, 2], [3]], [0, 0], [False, False], Drafts.none())
    rows = make_rows([SamplingParams(temperature=1.0, top_p=0.5)] * 2, [0, 1], VOCAB)
    for rule in RULES.values():
        assert verify(forest, torch.zeros(1, VOCAB), rows, rule).emitted == ((), ())


def test_penalties_count_the_ancestors_of_a_node():
    """Token 1 has the largest logit everywhere; with a strong penalty it is decided only once on a path."""
    from headstart.speculation.distribution import History

    history = History(1, VOCAB, "cpu")
    history.start(0, [3])
    params = SamplingParams(presence_penalty=2.0)
    rows = make_rows([params], [0], VOCAB, history=history)
    drafts = Drafts.of([1, 0, 1], [ROOT, 0, 0], [0, 0, 0], [1, 2, 2], [0.5] * 3)
    logits = torch.tensor([0.5, 1.0, 0.0, -1.0]).expand(4, -1)
    for rule in RULES.values():
        assert verify(forest_of(drafts, [[3]]), logits, rows, rule).emitted == ((1, 0, 2),)


@given(NODES, st.integers(0, 999))
def test_a_verdict_sums_the_chances_of_the_kept_paths_children_level_by_level(nodes, seed):
    drafts = drafts_of(nodes)
    noise = torch.Generator().manual_seed(seed)
    shares = (0.1 + 0.8 * torch.rand(len(drafts), generator=noise)).tolist()
    totals: list[float] = []
    for share, parent in zip(shares, drafts.parents.tolist(), strict=True):
        totals.append(share * (1 if parent == ROOT else totals[parent]))
    drafts = replace(drafts, chances=torch.tensor(totals))
    forest = merge([[1]] * 4, [0] * 4, [True] * 4, drafts)
    logits = torch.randn(forest.num_asked, VOCAB, generator=noise)
    verdict = verify(forest, logits, make_rows([SamplingParams()] * 4, range(4), VOCAB), RULES["coupled"])
    assert verdict.gain == pytest.approx(sum(totals), abs=1e-4)
    for row, (kept, predicted) in enumerate(zip(verdict.kept, verdict.predicted, strict=True)):
        own = [node for node in range(len(drafts)) if drafts.rows[node] == row]
        expected = []
        for parent in [ROOT, *(own[draft] for draft in kept)]:
            children = [node for node in own if drafts.parents[node] == parent]
            if children:
                expected.append(sum(shares[child] for child in children))
        assert predicted == pytest.approx(expected, abs=1e-4)
