"""The adaptive planner verifies the drafts that are worth their time, pauses where drafting loses, and tries again."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trees import NODES, drafts_of

from headstart.speculation.adaptive import Adaptive
from headstart.speculation.cost import CostModel, DraftCost
from headstart.speculation.outcome import LearningPlanner, Load, Outcome
from headstart.speculation.planner import NO_DRAFTS, Plan
from headstart.speculation.shape import Limits
from headstart.speculation.tree import ROOT, Drafts

COST = CostModel((1, 8, 64), (1.0, 1.2, 4.0), draft=DraftCost(0.1, (1, 8), (0.1, 0.12)))
LIMITS = Limits(4, 4, 6, 64)


def planner_of(rows: int = 1, cost: CostModel = COST, is_on_host: bool = True, limits: Limits = LIMITS) -> Adaptive:
    planner = Adaptive(cost, limits, is_on_host=is_on_host)
    planner.see(Load((1,) * rows, (20,) * rows, 0.0))
    return planner


def outcome(num_drafts: int = 4, gain: float = 1.0, draft_seconds: float = 0.3, depth: int = 3, num_drafting: int = 1) -> Outcome:
    return Outcome(num_drafting, depth, num_drafts, gain, round(gain), draft_seconds, COST.forward(1 + num_drafts))


@settings(max_examples=60)
@given(NODES, st.floats(0.0, 0.5))
def test_the_verified_drafts_are_the_subset_with_parents_that_is_worth_most(nodes, node_seconds):
    cost = CostModel((1, 33), (1.0, 1 + 32 * node_seconds), draft=DraftCost(0.1, (1,), (0.1,)))
    planner, drafts = planner_of(3, cost), drafts_of(nodes)
    kept = planner.prune(drafts, Plan(4, 4, 6, 99), 3)
    kept.check()
    chances, parents = drafts.chances.tolist(), drafts.parents.tolist()

    def worth(chosen):
        return sum(chances[node] for node in chosen) - planner.rate * (cost.forward(3 + len(chosen), 3) - cost.forward(3, 3))

    closed = [
        chosen
        for size in range(len(drafts) + 1)
        for chosen in combinations(range(len(drafts)), size)
        if all(parents[node] in (*chosen, ROOT) for node in chosen)
    ]
    assert worth(kept.tokens.tolist()) == pytest.approx(max(map(worth, closed)), abs=1e-5)
    assert kept.rows.tolist() == sorted(kept.rows.tolist())


def test_it_is_a_learning_planner():
    assert isinstance(planner_of(), LearningPlanner)


def test_drafting_pauses_where_it_loses_and_is_tried_again_ever_more_rarely():
    planner, drafted = planner_of(), []
    for _ in range(400):
        planner.see(Load((1,), (20,), 0.0))
        plan = planner.plan([9])
        drafted.append(plan is not NO_DRAFTS)
        planner.learn(outcome(num_drafts=0, gain=0.0) if drafted[-1] else Outcome(0, 0, 0, 0.0, 0, 0.0, 1.0))
    assert sum(drafted[:10]) >= 4
    assert sum(drafted[200:]) <= 5
    assert any(drafted[300:])


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_drafting_that_never_pays_loses_a_fiftieth_of_the_time_by_being_tried(rows):
    planner, tries, rounds, lost = planner_of(rows), [], 1000, 0.0
    for number in range(rounds):
        planner.see(Load((1,) * rows, (20,) * rows, 0.0))
        plan = planner.plan([9] * rows)
        seconds = COST.drafting(3, plan.beam, rows) if plan is not NO_DRAFTS else 0.0
        tries += [number] * bool(seconds)
        lost += seconds / COST.plain(rows)
        forward = COST.forward(rows, rows)
        planner.learn(Outcome(rows, 3, 0, 0.0, 0, seconds, forward) if seconds else Outcome(0, 0, 0, 0.0, 0, 0.0, forward))
    until_seen = 4 * (planner_of(rows).rate * COST.plain(rows) / rows - 1)  # what the forecast promised counts for four rounds
    assert lost <= 0.02 * rounds + until_seen + 0.5
    assert sum(number > rounds / 2 for number in tries) >= 3


def test_drafting_goes_on_where_it_beats_plain_decoding_though_the_forecast_promised_more():
    planner, rows = planner_of(4), 4
    beam, base = planner.plan([9] * rows).beam, COST.plain(rows)
    seconds = COST.drafting(3, beam, rows)
    more = COST.forward(12, rows) - base + seconds
    gain = rows * (more / base + 0.02)  # a little more than plain decoding gives in that time
    assert gain < planner.rate * more
    for _ in range(20):
        planner.learn(Outcome(rows, 3, 8, gain, gain, seconds, COST.forward(12, rows)))
        planner.see(Load((1,) * rows, (20,) * rows, 0.0))
        assert planner.plan([9] * rows).depth


def test_drafting_goes_on_at_once_where_it_pays_again_and_with_a_new_request():
    planner = planner_of()
    for _ in range(40):
        planner.see(Load((1,), (20,), 0.0))
        planner.learn(outcome(0, 0.0) if planner.plan([9]).depth else Outcome(0, 0, 0, 0.0, 0, 0.0, 1.0))
    while not planner.plan([9]).depth:
        planner.see(Load((1,), (20,), 0.0))
    for _ in range(20):
        planner.learn(outcome(4, 2.5))
        planner.see(Load((1,), (20,), 0.0))
        assert planner.plan([9]).depth
    for _ in range(40):
        planner.see(Load((1,), (20,), 0.0))
        planner.learn(outcome(0, 0.0) if planner.plan([9]).depth else Outcome(0, 0, 0, 0.0, 0, 0.0, 1.0))
    planner.restart()
    planner.see(Load((1,), (20,), 0.0))
    assert planner.plan([9]).depth


def test_a_drafter_that_costs_nothing_is_always_asked():
    planner = planner_of(cost=CostModel((1, 8), (1.0, 1.2), draft=DraftCost(0.0001, (1,), (0.0,))))
    for _ in range(100):
        planner.see(Load((1,), (20,), 0.0))
        assert planner.plan([9]).depth
        planner.learn(Outcome(1, 0, 0, 0.0, 0, 0.0001, 1.0))


def test_on_a_device_depth_and_nodes_are_chosen_before_drafting_in_powers_of_two():
    plan = planner_of(is_on_host=False).plan([9])
    assert 1 <= plan.depth <= LIMITS.depth
    assert plan.nodes & (plan.nodes - 1) == 0
    assert not plan.level_prices
    crowd = planner_of(32, is_on_host=False).plan([9] * 32)
    assert crowd.nodes / 32 < plan.nodes


def test_on_a_device_pruning_reads_no_value(monkeypatch):
    planner, drafts = planner_of(is_on_host=False), drafts_of([(0, 0, 0.5), (1, 0, 0.5), (0, 0, 0.25)]).to(torch.device("meta"))
    kept = planner.prune(drafts, planner.plan([9]), 1)
    assert kept.tokens.device.type == "meta"
    many = drafts_of([(0, 0, 0.9)] * 99).to(torch.device("meta"))
    assert len(planner.prune(many, planner.plan([9]), 1)) == planner.plan([9]).nodes
    assert planner.headroom(2) >= 1 + min(LIMITS.width * (1 + (LIMITS.depth - 1) * planner.limits.beam), 2 * planner.limits.nodes)


def test_a_row_has_no_more_drafts_than_slots():
    limits = Limits(4, 4, 6, 16)
    planner = planner_of(2, CostModel((1, 512), (1.0, 1.0), draft=DraftCost(0.1, (1,), (0.1,))), limits=limits)
    drafts = drafts_of([(0, 0, 0.9)] * 28 + [(0, 1, 0.1)] * 3)
    kept = planner.prune(drafts, planner.plan([9, 9]), 2)
    kept.check()
    assert torch.bincount(kept.rows).tolist() == [16, 3]
    assert planner.headroom(8) > 16


def test_a_deeper_level_must_promise_more_than_its_time_gives_otherwise():
    cheap = planner_of(cost=CostModel((1, 64), (1.0, 1.1), draft=DraftCost(0.01, (1, 8), (0.01, 0.01))))
    costly = planner_of(cost=CostModel((1, 64), (1.0, 1.1), draft=DraftCost(0.01, (1, 8), (0.5, 0.5))))
    assert cheap.plan([9]).level_prices[0] < 0.1 < costly.plan([9]).level_prices[0]


def test_the_cost_follows_the_measured_rounds():
    planner = planner_of()
    for _ in range(300):
        planner.see(Load((1,), (20,), 0.0))
        planner.learn(Outcome(1, 3, 7, 2.0, 2, 0.6, 2.4))
    assert planner.cost.forward(8) == pytest.approx(2.4, rel=0.05)
    assert planner.draft_scale == pytest.approx(0.6 / COST.drafting(3, planner.plan([9]).beam), rel=0.3)


# -- a limit for the time of a round ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1.01, 1.1, 1.2, 1.35, 1.8, 2.5, math.inf])
@pytest.mark.parametrize("rows", [1, 3])
def test_no_round_is_expected_to_take_longer_than_it_may(longest, rows):
    longest *= COST.plain(rows, 20 * rows)
    planner = Adaptive(COST, LIMITS, longest=longest)
    planner.see(Load((1,) * rows, (20,) * rows, 0.0))
    plan = planner.plan([9] * rows)
    drafting = COST.drafting(plan.depth, plan.beam, rows) if plan.depth else 0.0
    assert COST.plain(rows, 20 * rows) + drafting <= longest
    if plan.depth:
        tree = [(node, node - 1, node + 1) for node in range(plan.depth)]
        drafts = Drafts.of(
            [token for _ in range(rows) for token, _, _ in tree],
            [parent if parent < 0 else parent + row * len(tree) for row in range(rows) for _, parent, _ in tree],
            [row for row in range(rows) for _ in tree],
            [depth for _ in range(rows) for _, _, depth in tree],
            [0.9] * (rows * len(tree)),
        )
        count = len(planner.prune(drafts, plan, rows))
        seconds = COST.forward(rows + count, rows, 20 * rows) + COST.host(rows + count, rows) + drafting
        assert seconds <= longest
        assert count > 0 or longest < 1.5 * COST.plain(rows, 20 * rows)
