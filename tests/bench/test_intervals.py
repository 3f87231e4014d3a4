"""Confidence intervals, time per token and lengths of rounds, against other ways to compute them."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from headstart.bench.intervals import interval, ratio
from headstart.bench.latency import lengths, token_ms


@pytest.fixture(scope="module")
def columns():
    """Tokens and seconds of 40 prompts, at about 50 tokens/s."""
    random = np.random.default_rng(7)
    seconds = random.uniform(1, 3, 40)
    return random.poisson(50 * seconds), seconds


def test_the_interval_is_that_of_scipy(columns):
    def rate(tokens, seconds, axis):
        return tokens.sum(axis) / seconds.sum(axis)

    theirs = bootstrap(columns, rate, paired=True, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1))
    ours = interval(ratio, *columns, draws=20_000)
    assert ours == pytest.approx(list(theirs.confidence_interval), rel=2e-3)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        seconds = random.uniform(1, 3, 40)
        low, high = interval(ratio, random.normal(50 * seconds, 10), seconds, draws=500)
        covered += low <= 50 <= high
    assert 270 <= covered <= 297


def test_an_interval_is_the_same_each_time_and_has_no_width_for_one_prompt(columns):
    assert interval(ratio, *columns) == interval(ratio, *columns)
    assert interval(ratio, [6], [3]) == [2, 2]
    assert interval(ratio, [6], [0]) == [0, 0]


@pytest.mark.parametrize("columns", [((), ()), ((1, 2), (1,))])
def test_columns_without_prompts_or_of_different_lengths_are_refused(columns):
    with pytest.raises(ValueError, match="same number, at least 1"):
        interval(ratio, *columns)


def test_each_token_of_a_round_takes_its_part_of_the_round():
    bursts = [(1, 0.010), (4, 0.020), (1, 0.030)]
    each = [10, 5, 5, 5, 5, 30]
    assert token_ms(bursts) == pytest.approx(
        {name: np.percentile(each, share) for name, share in (("p50", 50), ("p90", 90), ("p99", 99))}
    )
    assert token_ms([]) == {"p50": 0, "p90": 0, "p99": 0}


def test_lengths_count_the_rounds_by_their_tokens():
    assert lengths([(1, 0.1), (3, 0.1), (1, 0.2)]) == [2, 0, 1]
    assert lengths([]) == []
