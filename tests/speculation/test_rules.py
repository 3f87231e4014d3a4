"""The acceptance rules against the distribution that they promise, with the mistakes that such a test must notice."""

from dataclasses import replace

import pytest
import torch
from tables import asked_logits, drafting, forest_of, joint_distribution, make_rows, p_value, parallel, rounds

from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain, StaticTree
from headstart.speculation.rows import Rows
from headstart.speculation.rules import RULES
from headstart.speculation.tree import Drafts
from headstart.speculation.verify import asked_nodes

GENERATOR = torch.Generator().manual_seed(0)
TARGET = torch.randn(3, 3, 3, generator=GENERATOR)
DRAFTERS = {
    "good": TARGET + 0.5 * torch.randn(3, 3, 3, generator=GENERATOR),
    "bad": torch.randn(3, 3, 3, generator=GENERATOR),
    "adversarial": -3 * TARGET,  # proposes the least probable tokens
}
SETTINGS = {
    "T=1": SamplingParams(temperature=1.0),
    "T=0.7, top-p": SamplingParams(temperature=0.7, top_p=0.8),
    "top-k": SamplingParams(temperature=1.0, top_k=2),
}
TREE = Best(nodes=4, depth=2, width=2, beam=2)


def picked(table: torch.Tensor):
    """A drafter of the same trees whose children are picked, not drawn: the most probable tokens, as Medusa and lookup propose."""

    def propose(rows: Rows, texts) -> Drafts:
        params, seeds = [SamplingParams()] * len(rows), [0] * len(rows)
        greedy = make_rows(params, seeds, 3, depths=rows.depths, width=rows.plan.width, beam=rows.plan.beam)
        return drafting(table)(greedy, texts)

    return propose


def fit(draft, rule="rejection", planner=TREE, params=SETTINGS["T=1"], forests=16, target=TARGET) -> float:
    """The p-value of 4,000 texts of three tokens under the target's joint distribution. 250 rows share a forest."""
    rule = RULES[rule] if isinstance(rule, str) else rule
    texts = []
    for forest in range(forests):
        texts += rounds(target, draft, rule, planner, [params] * 250, range(250 * forest, 250 * forest + 250), 3)
    return p_value(texts, joint_distribution(target, params, 3), 3)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_rejection_follows_the_targets_distribution_with_any_drawn_drafts(drafter, setting):
    assert fit(drafting(DRAFTERS[drafter]), params=SETTINGS[setting]) > 1e-3


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_rejection_follows_the_targets_distribution_with_any_picked_drafts(drafter):
    assert fit(picked(DRAFTERS[drafter]), params=SETTINGS["T=0.7, top-p"]) > 1e-3


@pytest.mark.parametrize("planner", [TREE, StaticTree.full(2, 2)], ids=str)
@pytest.mark.parametrize("drafter", ["good", "adversarial"])
def test_rejection_follows_the_targets_distribution_where_parents_share_drawn_children(drafter, planner):
    """Parallel heads draw once per depth: all parents of a level have the same children, and a text contains one of them."""
    assert fit(parallel(DRAFTERS[drafter]), planner=planner) > 1e-3


@pytest.mark.parametrize("planner", [Chain(2), StaticTree.full(2, 1), Best(nodes=3, depth=2, width=3, beam=1)], ids=str)
def test_the_distribution_does_not_depend_on_the_planner(planner):
    assert fit(drafting(DRAFTERS["bad"]), planner=planner) > 1e-3


def test_a_child_drawn_from_a_distribution_without_mass_counts_as_picked():
    """The drafter's truncation leaves one token to draw, so the second child is an arbitrary one."""
    params = SamplingParams(temperature=0.7, top_p=0.8)
    assert fit(drafting(DRAFTERS["adversarial"]), params=params, forests=24) > 1e-3


def test_the_coupled_rule_follows_the_targets_distribution_too():
    assert fit(drafting(DRAFTERS["good"]), rule="coupled", params=SETTINGS["T=0.7, top-p"]) > 1e-3


def test_rows_of_different_settings_share_a_forest_under_rejection():
    kinds = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=0.5, top_k=2)]
    texts = []
    for forest in range(16):
        seeds = range(252 * forest, 252 * forest + 252)
        texts += rounds(TARGET, drafting(DRAFTERS["bad"]), RULES["rejection"], TREE, kinds * 84, seeds, 2)
    for kind, params in enumerate(kinds):
        assert p_value(texts[kind::3], joint_distribution(TARGET, params, 2), 3) > 1e-3


# -- mistakes that a test of the distribution must notice -------------------------------------------------------------------


def with_distributions(draft, table: torch.Tensor):
    """A drafter of picked children that claims to have drawn them from its softmax."""

    def propose(rows: Rows, texts) -> Drafts:
        drafts = draft(rows, texts)
        forest = forest_of(drafts.by_row(len(rows)), texts)
        softmax = asked_logits(table, forest, texts).softmax(-1).double()
        asked = asked_nodes(forest)
        return replace(drafts.by_row(len(rows)), distributions=torch.cat([softmax[asked.roots], softmax[asked.drafts]]))

    return propose


def test_picked_children_judged_by_the_drafters_softmax_are_noticed():
    table = DRAFTERS["bad"]
    assert fit(with_distributions(picked(table), table)) < 1e-9


def test_proposal_noise_that_is_reused_across_rounds_is_noticed():
    """Keyed by level only: the second round draws with the noise of the first, on which the text already depends."""

    def propose(rows: Rows, texts) -> Drafts:
        rows = replace(rows, root_positions=(0,) * len(rows), _noise={})
        return drafting(DRAFTERS["good"])(rows, texts)

    assert fit(propose, planner=Chain(1)) < 1e-9


def test_a_planner_that_looks_at_the_drawn_tokens_is_noticed():
    """It drops children of low probability in the distribution they were drawn from."""

    class Peeking(Chain):
        def prune(self, drafts, plan, num_rows):
            probabilities = drafts.distributions[drafts.rows].gather(1, drafts.tokens[:, None]).squeeze(1)
            return drafts.take((probabilities > 0.4).nonzero().flatten(), num_rows).by_row(num_rows)

    assert fit(drafting(DRAFTERS["bad"]), planner=Peeking(1)) < 1e-9


def test_a_distribution_that_is_not_updated_after_a_rejection_is_noticed():
    """The second child is judged as if the first had not been tried: its token still has its probability."""
    from headstart.speculation import rules

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "_residual", lambda p, q, token: p)
        assert fit(drafting(DRAFTERS["bad"])) < 1e-9


def test_chances_of_drawn_children_do_not_depend_on_the_drawn_tokens():
    rows = make_rows([SamplingParams(temperature=1.0)] * 50, range(50), 3, depths=[2] * 50, noise_rule="fresh")
    drafts = drafting(DRAFTERS["bad"])(rows, [[0, 0]] * 50)
    chances = drafts.by_row(50).chances.reshape(50, -1)
    assert torch.equal(chances, chances[:1].expand_as(chances))
