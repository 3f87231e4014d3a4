"""The walk against naive walks; the rules against the distribution they promise, with the mistakes that such a test must catch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import asked_logits, drafting, forest_of, joint_law, make_rows, p_value, parallel, paths_of, rounds

from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain, StaticTree
from headstart.speculation.rows import Rows
from headstart.speculation.rules import RULES, coupled_as_reached, coupled_at_once
from headstart.speculation.tree import ROOT, Drafts, merge
from headstart.speculation.verify import Decisions, Rule, asked_nodes, verify

VOCAB = 4
NODES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, VOCAB - 1)), max_size=24)
PARAMS = [
    SamplingParams(temperature=3.0, top_k=1),  # rarely sure
    SamplingParams(),
    SamplingParams(temperature=1.0, top_p=0.7),
    SamplingParams(temperature=0.7, repetition_penalty=1.0),
]


def drafts_of(nodes: list[tuple[int, int, int]], is_whole: tuple[bool, ...] = (True,) * 4) -> Drafts:
    """Random trees of four rows; a node that would repeat its sibling, or hang on a cut stem, is left out."""
    parents, rows, tokens, depths = [], [], [], []
    for back, row, token in nodes:
        before = [node for node, other in enumerate(rows) if other == row]
        parent = before[-back] if 0 < back <= len(before) else ROOT
        siblings = {tokens[node] for node in before if parents[node] == parent}
        if token in siblings or not is_whole[row]:
            continue
        parents.append(parent)
        rows.append(row)
        tokens.append(token)
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    return Drafts.of(tokens, parents, rows, depths, [0.5] * len(tokens)).by_row(4)


def descend(wanted: list[int], drafts: Drafts, row: int) -> tuple[list[int], list[int]]:
    """The naive walk: from the root to the child that is wanted, while there is one. Returns emitted tokens and kept drafts.

    wanted: what each of the row's asked nodes decides, its root first.
    """
    own = [node for node in range(len(drafts)) if drafts.rows[node] == row]
    emitted, kept, node = [wanted[0]], [], ROOT
    while True:
        children = [place for place, child in enumerate(own) if drafts.parents[child] == node]
        following = [place for place in children if drafts.tokens[own[place]] == emitted[-1]]
        if not following:
            return emitted, kept
        kept.append(following[0])
        node = own[following[0]]
        emitted.append(wanted[1 + following[0]])


@given(NODES, st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 999))
def test_the_walk_keeps_the_path_of_wanted_tokens_of_every_whole_row(nodes, whole, seed):
    drafts = drafts_of(nodes, tuple(whole))
    forest = merge([[7], [8, 9], [1], [2]], [0] * 4, whole, drafts, num_nodes=30)
    wanted = torch.randint(0, VOCAB, (forest.num_asked,), generator=torch.Generator().manual_seed(seed))

    def judge(forest, asked, logits, rows, in_full):
        assert len(logits) == len(asked.rows)  # dead nodes are asked, but nobody listens
        return Decisions(wanted, wanted[asked.parents] == forest.drafts.tokens, torch.ones_like(wanted, dtype=torch.bool))

    rows = make_rows([SamplingParams()] * 4, [0] * 4, VOCAB)
    verdict = verify(forest, torch.zeros(len(forest.asked), VOCAB), rows, Rule(judge, "shared"))
    first = 0
    for row in range(4):
        if not whole[row]:
            assert (verdict.emitted[row], verdict.kept[row], verdict.asked[row], verdict.tried[row]) == ((), (), (), 0)
            continue
        emitted, kept = descend(wanted[first:].tolist(), drafts, row)
        assert verdict.emitted[row] == tuple(emitted)
        assert verdict.kept[row] == tuple(kept)
        assert verdict.asked[row] == (first, *(first + 1 + place for place in kept))
        assert verdict.tried[row] == max(drafts.depths[drafts.rows == row].tolist(), default=0)
        first += forest.counts[row] + 1


@given(NODES, st.integers(0, 999))
def test_the_coupled_rule_keeps_what_the_target_decides_alone(nodes, seed):
    """Rows of different kinds; every node decided on its own, at its own position, is the oracle."""
    drafts = drafts_of(nodes)
    forest = merge([[0]] * 4, [3, 0, 8, 5], [True] * 4, drafts)
    asked = asked_nodes(forest)
    logits = torch.randn(len(asked.rows), VOCAB, generator=torch.Generator().manual_seed(seed))
    rows = make_rows(PARAMS, range(seed, seed + 4), VOCAB, root_positions=[3, 0, 8, 5])
    verdict = verify(forest, logits, rows, RULES["coupled"])
    wanted = []
    for line, (row, level) in enumerate(zip(asked.rows.tolist(), asked.levels.tolist(), strict=True)):
        alone = make_rows([PARAMS[row]], [seed + row], VOCAB, root_positions=[rows.root_positions[row] + level])
        wanted.append(alone.decide_fully(logits[line : line + 1], torch.tensor([0]), range(1), paths_of([0])).item())
    first = 0
    for row in range(4):
        assert (list(verdict.emitted[row]), list(verdict.kept[row])) == descend(wanted[first:], drafts, row)
        first += forest.counts[row] + 1


@pytest.mark.parametrize("tries", [1, 2])
@given(NODES, st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 999))
def test_deciding_at_once_keeps_what_deciding_as_reached_keeps(tries, nodes, whole, seed):
    """What a GPU does and what a CPU does, with a shortcut that often does not reach: after one try at a truncated distribution."""
    drafts = drafts_of(nodes, tuple(whole))
    forest = merge([[0]] * 4, [3, 0, 8, 5], whole, drafts, num_nodes=30)
    logits = torch.randn(len(forest.asked), VOCAB, generator=torch.Generator().manual_seed(seed))
    rows = make_rows(PARAMS, range(seed, seed + 4), VOCAB, root_positions=[3, 0, 8, 5])
    decide = Rows.decide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "decide", lambda *args: decide(*args, tries=tries))
        verdicts = [vars(verify(forest, logits, rows, Rule(way, "shared"))) for way in (coupled_at_once, coupled_as_reached)]
    assert verdicts[0] == verdicts[1] == vars(verify(forest, logits, rows, Rule(in_full, "shared")))


def in_full(forest, asked, logits, rows, _):
    """The coupled rule without any shortcut."""
    return coupled_at_once(forest, asked, logits, rows, True)


def test_a_node_off_the_kept_path_may_be_unsure():
    """The distribution is laid out in full, with a sort, only where the answer depends on it."""
    asked_in_full = []

    def judge(forest, asked, logits, rows, in_full):
        asked_in_full.append(in_full)
        return Decisions(torch.tensor([1, 2, 3]), torch.tensor([True, False]), torch.tensor([True, True, False]))

    drafts = Drafts.of([1, 2], [ROOT, ROOT], [0, 0], [1, 1], [0.5, 0.5])
    rows = make_rows(PARAMS[:1], [0], VOCAB)
    assert verify(forest_of(drafts, [[0]]), torch.zeros(3, VOCAB), rows, Rule(judge, "shared")).emitted == ((1, 2),)
    assert asked_in_full == [False]


def test_nothing_is_decided_where_every_stem_is_cut():
    forest = merge([[1, 2], [3]], [0, 0], [False, False], Drafts.none())
    rows = make_rows([SamplingParams(temperature=1.0, top_p=0.5)] * 2, [0, 1], VOCAB)
    for rule in RULES.values():
        assert verify(forest, torch.zeros(1, VOCAB), rows, rule).emitted == ((), ())


def test_penalties_see_the_ancestors_of_a_node():
    """The target wants 1 for ever; with a strong penalty it wants it only once on a path."""
    from headstart.speculation.distribution import History

    history = History(1, VOCAB, "cpu")
    history.start(0, [3])
    params = SamplingParams(presence_penalty=2.0)
    rows = make_rows([params], [0], VOCAB, history=history)
    drafts = Drafts.of([1, 0, 1], [ROOT, 0, 0], [0, 0, 0], [1, 2, 2], [0.5] * 3)
    logits = torch.tensor([0.5, 1.0, 0.0, -1.0]).expand(4, -1)
    for rule in RULES.values():
        assert verify(forest_of(drafts, [[3]]), logits, rows, rule).emitted == ((1, 0, 2),)


# -- sampling -------------------------------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(0)
TARGET = torch.randn(3, 3, 3, generator=GENERATOR)
DRAFTERS = {
    "good": TARGET + 0.5 * torch.randn(3, 3, 3, generator=GENERATOR),
    "bad": torch.randn(3, 3, 3, generator=GENERATOR),
    "adversarial": -3 * TARGET,  # proposes what is least likely
}
SETTINGS = {
    "T=1": SamplingParams(temperature=1.0),
    "T=0.7, top-p": SamplingParams(temperature=0.7, top_p=0.8),
    "top-k": SamplingParams(temperature=1.0, top_k=2),
}
TREE = Best(nodes=4, depth=2, width=2, beam=2)


def picked(table: torch.Tensor):
    """The same trees with the most likely tokens as children, as Medusa or lookup propose them: nothing was drawn."""

    def propose(rows: Rows, texts) -> Drafts:
        params, seeds = [SamplingParams()] * len(rows), [0] * len(rows)
        greedy = make_rows(params, seeds, 3, depths=rows.depths, width=rows.plan.width, beam=rows.plan.beam)
        return drafting(table)(greedy, texts)

    return propose


def law_test(draft, rule="rejection", planner=TREE, params=SETTINGS["T=1"], forests=16, target=TARGET) -> float:
    """How well 4,000 texts of three tokens fit the joint distribution; every forest has 250 rows, and they take several rounds."""
    rule = RULES[rule] if isinstance(rule, str) else rule
    texts = []
    for forest in range(forests):
        texts += rounds(target, draft, rule, planner, [params] * 250, range(250 * forest, 250 * forest + 250), 3)
    return p_value(texts, joint_law(target, params, 3), 3)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_rejection_follows_the_targets_law_whatever_is_drawn(drafter, setting):
    assert law_test(drafting(DRAFTERS[drafter]), params=SETTINGS[setting]) > 1e-3


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_rejection_follows_the_targets_law_whatever_is_picked(drafter):
    assert law_test(picked(DRAFTERS[drafter]), params=SETTINGS["T=0.7, top-p"]) > 1e-3


@pytest.mark.parametrize("planner", [TREE, StaticTree.full(2, 2)], ids=str)
@pytest.mark.parametrize("drafter", ["good", "adversarial"])
def test_rejection_follows_the_targets_law_where_parents_share_what_was_drawn(drafter, planner):
    """Parallel heads draw once per depth: all parents of a level have the same children, and a text passes one of them."""
    assert law_test(parallel(DRAFTERS[drafter]), planner=planner) > 1e-3


@pytest.mark.parametrize("planner", [Chain(2), StaticTree.full(2, 1), Best(nodes=3, depth=2, width=3, beam=1)], ids=str)
def test_the_law_does_not_depend_on_the_shape(planner):
    assert law_test(drafting(DRAFTERS["bad"]), planner=planner) > 1e-3


def test_a_law_that_has_no_mass_left_makes_its_next_child_a_picked_one():
    """The drafter's own truncation leaves one token to draw; the second child is whatever is left."""
    params = SamplingParams(temperature=0.7, top_p=0.8)
    assert law_test(drafting(DRAFTERS["adversarial"]), params=params, forests=24) > 1e-3


def test_the_coupled_rule_follows_the_targets_law_too():
    assert law_test(drafting(DRAFTERS["good"]), rule="coupled", params=SETTINGS["T=0.7, top-p"]) > 1e-3


def test_rows_of_different_laws_share_a_forest_under_rejection():
    kinds = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=0.5, top_k=2)]
    texts = []
    for forest in range(16):
        seeds = range(252 * forest, 252 * forest + 252)
        texts += rounds(TARGET, drafting(DRAFTERS["bad"]), RULES["rejection"], TREE, kinds * 84, seeds, 2)
    for kind, params in enumerate(kinds):
        assert p_value(texts[kind::3], joint_law(TARGET, params, 2), 3) > 1e-3


# -- mistakes that a distribution test must catch
# ------------------------------------------------------------------------------------


def with_distributions(draft, table: torch.Tensor):
    """Picked children with the drafter's softmax as the distribution they were drawn from: a lie."""

    def propose(rows: Rows, texts) -> Drafts:
        drafts = draft(rows, texts)
        forest = forest_of(drafts.by_row(len(rows)), texts)
        softmax = asked_logits(table, forest, texts).softmax(-1).double()
        asked = asked_nodes(forest)
        return replace(drafts.by_row(len(rows)), distributions=torch.cat([softmax[asked.roots], softmax[asked.drafts]]))

    return propose


def test_picked_children_judged_by_the_drafters_softmax_are_noticed():
    table = DRAFTERS["bad"]
    assert law_test(with_distributions(picked(table), table)) < 1e-9


def test_proposal_noise_that_is_reused_across_rounds_is_noticed():
    """Keyed by level only: the second round's draws meet the first's noise, which the text already depends on."""

    def propose(rows: Rows, texts) -> Drafts:
        rows = replace(rows, root_positions=(0,) * len(rows), _noise={})
        return drafting(DRAFTERS["good"])(rows, texts)

    assert law_test(propose, planner=Chain(1)) < 1e-9


def test_a_planner_that_peeks_at_what_was_drawn_is_noticed():
    """It drops children that the drafter itself finds unlikely, after it saw which they are."""

    class Peeking(Chain):
        def prune(self, drafts, plan, num_rows):
            own = drafts.distributions[drafts.rows].gather(1, drafts.tokens[:, None]).squeeze(1)
            return drafts.take((own > 0.4).nonzero().flatten(), num_rows).by_row(num_rows)

    assert law_test(drafting(DRAFTERS["bad"]), planner=Peeking(1)) < 1e-9


def test_a_law_that_is_not_updated_after_a_refusal_is_noticed():
    """The second child judged as if the first had been put back: its distribution still holds the first one's token."""
    from headstart.speculation import rules

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "_residual", lambda p, q, token: p)
        assert law_test(drafting(DRAFTERS["bad"])) < 1e-9


def test_chances_of_drawn_children_say_nothing_about_what_was_drawn():
    rows = make_rows([SamplingParams(temperature=1.0)] * 50, range(50), 3, depths=[2] * 50, noise_rule="fresh")
    drafts = drafting(DRAFTERS["bad"])(rows, [[0, 0]] * 50)
    chances = drafts.by_row(50).chances.reshape(50, -1)
    assert torch.equal(chances, chances[:1].expand_as(chances))
