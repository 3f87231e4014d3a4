"""The record of one drafter in one request, against simulated drafters whose error is known."""

import math
import random

import pytest

from headstart.speculation.trust import CALIBRATED, MAX_ODDS, Trust, correct

DEPTH = 4


def simulate(trust, true_odds, rounds, seed=0, seat=0):
    """Rounds of a drafter whose chances p come true with probability `correct(p, true_odds(round))`, down a path until a miss.

    Returns per round the corrected chance of p = 0.5, before the round.
    """
    generator = random.Random(seed)
    chances = []
    for number in range(rounds):
        chances.append(correct(0.5, trust.odds(seat)))
        predicted, happened = [], []
        for _ in range(DEPTH):
            predicted.append(generator.betavariate(2, 1.5))
            happened.append(generator.random() < correct(predicted[-1], true_odds(number)))
            if not happened[-1]:
                break
        trust.learn(seat, predicted, happened)
    return chances


def mean_after(true_odds, rounds, count=20):
    """The mean corrected chance of p = 0.5 after so many rounds, over several simulations."""
    return sum(simulate(Trust(), true_odds, rounds + 1, seed)[-1] for seed in range(count)) / count


@pytest.mark.parametrize("odds", [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0])
def test_the_ratio_comes_near_the_true_one(odds):
    assert mean_after(lambda _: odds, 80) == pytest.approx(correct(0.5, odds), abs=0.08)


def test_an_overconfident_drafter_is_trusted_less_within_ten_rounds():
    assert mean_after(lambda _: 0.2, 10) < 0.35


def test_an_underconfident_drafter_is_trusted_more_within_ten_rounds():
    assert mean_after(lambda _: 5.0, 10) > 0.65


def test_chances_that_are_right_are_corrected_less_with_the_prior_for_calibrated_ones_and_wrong_ones_still_are():
    def errors(prior, true_odds):
        for seed in range(20):
            trust = Trust(prior=prior)
            simulate(trust, lambda _: true_odds, 40, seed)
            yield abs(math.log(trust.odds(0)) - math.log(true_odds))

    assert sum(errors(CALIBRATED, 1.0)) < 0.8 * sum(errors(1.0, 1.0))
    assert sum(errors(CALIBRATED, 0.3)) < 0.5 * 20 * math.log(1 / 0.3)


def test_a_drafter_that_fails_for_fifty_rounds_is_trusted_again_when_it_recovers():
    runs = [simulate(Trust(), lambda n: 0.02 if 50 <= n < 100 else 1.0, 140, seed) for seed in range(20)]
    before, failing, recovered = (sum(run[number] for run in runs) / len(runs) for number in (49, 99, 139))
    assert before == pytest.approx(0.5, abs=0.08)
    assert failing < 0.15
    assert recovered > 0.4


def test_corrected_chances_of_a_failing_drafter_have_less_cross_entropy_than_its_own():
    trust, generator, own, corrected = Trust(), random.Random(1), 0.0, 0.0
    for number in range(300):
        chance = generator.betavariate(3, 1.5)
        outcome = generator.random() < correct(chance, 0.2 if number % 150 >= 50 else 1.0)
        for value, sign in ((chance, 1), (correct(chance, trust.odds(0)), -1)):
            loss = -math.log(value if outcome else 1 - value)
            own, corrected = (own + loss, corrected) if sign == 1 else (own, corrected + loss)
        trust.learn(0, [chance], [outcome])
    assert corrected < 0.85 * own


def test_a_first_outcome_moves_the_ratio_by_one_newton_step_from_the_prior():
    trust = Trust(prior=2.0)
    trust.learn(3, [0.5], [False])
    assert math.log(trust.odds(3)) == pytest.approx(-0.5 / (0.25 + 2.0))


def test_with_a_constant_chance_the_ratio_settles_where_the_discounted_posterior_has_its_mode():
    trust = Trust(discount=0.9, prior=1.5)
    for _ in range(300):
        trust.learn(0, [0.3], [True])
        trust.learn(0, [0.3], [False])
    chance = correct(0.3, trust.odds(0))
    weight_true, weight_false = 0.9 / (1 - 0.9**2), 1 / (1 - 0.9**2)  # the last outcome was false
    slope = weight_true * (1 - chance) - weight_false * chance - 1.5 * math.log(trust.odds(0))
    assert slope == pytest.approx(0, abs=0.05)


def test_the_ratio_is_bounded_on_both_sides():
    trust = Trust()
    for _ in range(2000):
        trust.learn(0, [0.9, 0.9], [False, False])
        trust.learn(1, [0.1, 0.1], [True, True])
    assert trust.odds(0) == pytest.approx(1 / MAX_ODDS)
    assert trust.odds(1) == pytest.approx(MAX_ODDS)


@pytest.mark.parametrize("outcome", [False, True])
def test_chances_of_zero_and_one_are_learned_from(outcome):
    trust = Trust()
    for _ in range(50):
        trust.learn(0, [0.0, 1.0], [outcome, outcome])
    assert 1 / MAX_ODDS - 1e-9 <= trust.odds(0) <= MAX_ODDS + 1e-9


def test_a_seat_that_rests_returns_to_one():
    trust = Trust()
    for _ in range(30):
        trust.learn(0, [0.9], [False])
    failed = trust.odds(0)
    for _ in range(5):
        trust.rest(0)
    soon = trust.odds(0)
    for _ in range(200):
        trust.rest(0)
    assert failed < soon < 0.2
    assert trust.odds(0) == pytest.approx(1, abs=0.01)


def test_after_a_rest_less_evidence_is_needed_than_before():
    trust = Trust()
    simulate(trust, lambda _: 0.05, 40)
    trust.fork(0, 1)
    for _ in range(40):
        trust.rest(1)
    before = trust.odds(0), trust.odds(1)
    for seat in (0, 1):
        trust.learn(seat, [correct(0.5, 1 / trust.odds(seat))], [True])  # 0.5 when corrected
    assert trust.odds(1) / before[1] > 1.1 * trust.odds(0) / before[0]


def test_nothing_is_known_of_a_seat_at_first_and_after_it_was_freed():
    trust = Trust()
    trust.rest(4)
    assert trust.odds(4) == 1.0
    trust.learn(4, [0.9], [False])
    assert trust.odds(4) < 1.0
    trust.free(4)
    trust.free(5)
    assert trust.odds(4) == 1.0


def test_a_fork_starts_with_what_its_source_knows_and_then_learns_alone():
    trust = Trust()
    trust.learn(0, [0.9], [False])
    trust.learn(1, [0.1], [True])
    known = trust.odds(0)
    trust.fork(0, 1)
    assert trust.odds(1) == known
    trust.learn(1, [0.9], [False])
    assert trust.odds(0) == known > trust.odds(1)
    trust.fork(7, 1)
    assert trust.odds(1) == 1.0


def test_a_snapshot_can_be_restored_twice():
    trust = Trust()
    trust.learn(0, [0.9], [False])
    snapshot, known = trust.snapshot(), trust.odds(0)
    for _ in range(2):
        trust.learn(0, [0.9], [False])
        trust.learn(1, [0.9], [False])
        trust.restore(snapshot)
        assert (trust.odds(0), trust.odds(1)) == (known, 1.0)


CORRECTIONS = [(0.5, 4, 0.8), (0.5, 1, 0.5), (0, 20, 0), (1, 0.05, 1), (0.8, 0.25, 0.5)]


@pytest.mark.parametrize(("chance", "odds", "corrected"), CORRECTIONS)
def test_a_correction_multiplies_the_odds(chance, odds, corrected):
    assert correct(chance, odds) == pytest.approx(corrected)
