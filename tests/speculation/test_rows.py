"""What the rows of a round choose from a drafter's logits and decide from the target's."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampled_logits import PARAMS, VOCAB, random_logits
from scipy import stats
from tables import make_rows, paths_of

from headstart.speculation.calibration import Calibration
from headstart.speculation.distribution import History, SamplingTensors, warp
from headstart.speculation.params import SamplingParams
from headstart.speculation.trust import correct

ROOT_LEVEL = range(1)


def zeros(lines: int) -> torch.Tensor:
    return torch.zeros(lines, dtype=torch.int64)


def test_the_drafting_rows_are_those_with_a_depth():
    rows = make_rows([SamplingParams()] * 4, range(4), VOCAB, depths=[2, 0, 1, 0])
    assert (rows.drafting, rows.max_depth) == ((0, 2), 2)


# -- deciding ---------------------------------------------------------------------------------------------------------------


@given(st.lists(PARAMS, min_size=1, max_size=4), st.integers(0, 1000), st.integers(1, 3))
def test_a_certain_token_is_the_one_of_decide_fully(params, seed, tries):
    rows = make_rows(params, range(seed, seed + len(params)), VOCAB)
    paths = paths_of([row for row in range(len(params)) for _ in range(5)])
    logits = random_logits(len(paths.rows), seed=seed)
    tokens, is_sure = rows.decide(logits, zeros(len(logits)), ROOT_LEVEL, paths, tries)
    full = rows.decide_fully(logits, zeros(len(logits)), ROOT_LEVEL, paths)
    assert torch.equal(tokens[is_sure], full[is_sure])
    distribution = warp(logits, rows.sampling.rows(paths.rows))
    for line in range(len(logits)):
        if rows.sampling.temperature[paths.rows[line]] > 1e-6:
            assert distribution[line, full[line]] > 0


def test_rows_of_all_kinds_together_decide_as_each_alone_bit_for_bit():
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.8),
        SamplingParams(temperature=1.3, top_k=5, min_p=0.1),
        SamplingParams(temperature=0.9, repetition_penalty=1.4, presence_penalty=0.5, logit_bias={3: 4.0, 4: -math.inf}),
        SamplingParams(top_p=0.5, frequency_penalty=1.0),
    ]
    history = History(len(kinds), VOCAB, "cpu")
    for seat in range(len(kinds)):
        history.start(seat, [1, 2, seat], [seat, seat + 1])
    positions, seeds = [5, 9, 2, 40, 7, 1], [0, 1, 2, 2**64 - 1, -1, 5]
    logits, levels = random_logits(18), torch.arange(3).repeat(6)
    together = make_rows(kinds, seeds, VOCAB, root_positions=positions, history=history)
    lines = paths_of([row for row in range(6) for _ in range(3)])
    tokens, sure = together.decide(logits, levels, range(3), lines)
    children = together.choose(logits, 1, lines, 4)
    for row, params in enumerate(kinds):
        alone = make_rows([params], seeds[row : row + 1], VOCAB, root_positions=positions[row : row + 1], history=history)
        alone.seats = (row,)
        lines_of_row = slice(3 * row, 3 * row + 3)
        actual, is_sure = alone.decide(logits[lines_of_row], levels[lines_of_row], range(3), paths_of([0] * 3))
        assert torch.equal(actual[is_sure], tokens[lines_of_row][is_sure])
        assert torch.equal(is_sure | ~sure[lines_of_row], torch.ones(3, dtype=torch.bool))
        full = alone.decide_fully(logits[lines_of_row], levels[lines_of_row], range(3), paths_of([0] * 3))
        assert torch.equal(full, together.decide_fully(logits, levels, range(3), lines)[lines_of_row])
        choice = alone.choose(logits[lines_of_row], 1, paths_of([0] * 3), 4)
        assert torch.equal(choice.tokens, children.tokens[lines_of_row])
        assert torch.equal(choice.chances, children.chances[lines_of_row])


def test_noise_depends_on_the_sum_of_root_position_and_depth():
    params = SamplingParams(temperature=1.0)
    logits = random_logits(1).expand(4, -1)
    tree = make_rows([params], [3], VOCAB, root_positions=[10])
    tokens, _ = tree.decide(logits, torch.arange(4), range(4), paths_of([0] * 4))
    for level in range(4):
        row = make_rows([params], [3], VOCAB, root_positions=[10 + level])
        assert row.decide(logits[:1], zeros(1), ROOT_LEVEL, paths_of([0]))[0].item() == tokens[level]
        assert tree.choose(logits[:1], level + 1, paths_of([0]), 1).tokens.item() == tokens[level]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.8),
        SamplingParams(temperature=1.5, top_k=3),
        SamplingParams(temperature=1.0, min_p=0.3),
    ],
    ids=["plain", "top-p", "top-k", "min-p"],
)
def test_decided_tokens_follow_the_distribution(params):
    logits = torch.tensor([[1.0, 0.2, 0.0, -0.5, 0.8]])
    counts = torch.zeros(5)
    for position in range(40):
        rows = make_rows([params] * 1000, range(1000), 5, root_positions=[position] * 1000)
        tokens = rows.decide_fully(logits.expand(1000, -1), zeros(1000), ROOT_LEVEL, paths_of(range(1000)))
        counts += torch.bincount(tokens, minlength=5)
    distribution = warp(logits, SamplingTensors.of([params], [0]))[0]
    assert counts[distribution == 0].sum() == 0
    is_inside = distribution > 0
    test = stats.chisquare(counts[is_inside].numpy(), 40_000 * distribution[is_inside].numpy(), sum_check=False)
    assert test.pvalue > 1e-3


# -- history and bias -------------------------------------------------------------------------------------------------------


def by_hand(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """The logits after every penalty, computed from the full list of tokens."""
    result = []
    for token, value in enumerate(logits):
        if token in prompt + output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
        result.append(value + params.logit_bias.get(token, 0.0))
    return result


TEXT = st.lists(st.integers(0, 7), min_size=1, max_size=6)


@given(TEXT, TEXT, st.lists(TEXT, min_size=1, max_size=3), st.integers(0, 99))
def test_penalties_along_a_path_are_those_of_the_whole_text(prompt, output, branches, seed):
    """The root is the last output token; for a node, its ancestors and itself count as output."""
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={2: -1.0, 5: 3.0})
    history = History(2, 8, "cpu")
    history.start(1, prompt)
    history.write(1, output[:-1])
    history.write(1, output[-1:])
    rows = make_rows([params], [0], 8, history=history)
    rows.seats = (1,)
    width = max(map(len, branches))
    padded = [branch + [-1] * (width - len(branch)) for branch in branches]
    logits = random_logits(len(branches), 8, seed).double()
    adjusted = rows.adjust(logits, paths_of([0] * len(branches), padded))
    for line, branch in enumerate(branches):
        assert adjusted[line].tolist() == pytest.approx(by_hand(logits[line].tolist(), params, prompt, output + branch))


def test_a_token_of_bias_minus_infinity_is_never_decided_and_one_of_a_large_bias_always():
    params = [SamplingParams(temperature=1.0, top_p=0.99, logit_bias=bias) for bias in ({0: -math.inf}, {9: 1e5}, {})]
    rows = make_rows(params, [0, 0, 0], 10)
    lines = paths_of([0] * 50 + [1] * 50 + [2] * 50)
    logits = torch.zeros(150, 10)
    logits[:, 0] = 20.0
    tokens = rows.decide_fully(logits, torch.arange(50).repeat(3), range(50), lines)
    assert 0 not in tokens[:50]
    assert set(tokens[50:100].tolist()) == {9}
    assert set(tokens[100:].tolist()) == {0}


# -- choosing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["shared", "fresh"])
def test_a_reduced_vocabulary_chooses_like_the_full_one_with_the_other_tokens_forbidden(rule):
    params = [SamplingParams(temperature=0.8, repetition_penalty=1.3, logit_bias={12: 2.0, 14: -1.0}), SamplingParams()]
    params = params if rule == "shared" else params[:1]
    ids = torch.tensor([3, 12, 13, 14, 40])
    history = History(2, VOCAB, "cpu")
    history.start(0, [3, 40], [13])
    history.start(1, [])
    rows = make_rows(params, [0, 1][: len(params)], VOCAB, history=history, noise_rule=rule)
    paths = paths_of([0, 1, 0, 1] if rule == "shared" else [0] * 4, [[13]] * 4)
    small = random_logits(4, 5, seed=3)
    wide = torch.full((4, VOCAB), -1e5).index_copy(1, ids, small)
    actual, expected = rows.choose(small, 2, paths, 3, ids), rows.choose(wide, 2, paths, 3)
    if rule == "shared":
        assert torch.equal(actual.tokens, expected.tokens)
        assert torch.allclose(actual.chances, expected.chances)
    else:  # fresh noise is indexed by column, so the tokens differ; the distribution is the same
        assert torch.isin(actual.tokens, ids).all()
        assert torch.allclose(actual.distribution, expected.distribution)


def test_the_best_child_of_a_perfect_drafter_is_what_the_target_decides():
    params = [SamplingParams(temperature=1.0, top_k=8), SamplingParams(), SamplingParams(temperature=0.6)]
    rows = make_rows(params, [4, 5, 6], VOCAB, root_positions=[3, 1, 4])
    logits, lines = random_logits(30), paths_of([0, 1, 2] * 10)
    tokens, _ = rows.decide(logits, zeros(30), ROOT_LEVEL, lines)
    choice = rows.choose(logits, 1, lines, VOCAB)
    likely = choice.tokens.gather(1, choice.chances.argmax(-1, keepdim=True)).squeeze(-1)
    full = rows.decide_fully(logits, zeros(30), ROOT_LEVEL, lines)
    assert torch.equal(likely, full)
    assert float((tokens == likely).double().mean()) > 0.9


@given(st.integers(0, 1000), st.sampled_from([0.3, 0.7, 1.0, 1.7]), st.sampled_from([1e-2, 1.0, 1e3]))
def test_chances_are_at_most_one_and_those_of_siblings_sum_to_one(seed, calibration_temperature, scale):
    rows = make_rows([SamplingParams(temperature=0.7)], [seed], VOCAB)
    calibration = Calibration((0.0,), ((calibration_temperature,),), (((0.6,),),))
    logits, parents = random_logits(8, seed=seed, scale=scale), paths_of([0] * 8)
    chances = rows.choose(logits, 1, parents, VOCAB, calibration=calibration).chances
    assert float(chances.max()) <= 1
    assert chances.sum(-1).tolist() == pytest.approx([1.0] * 8, rel=1e-3)


def test_children_drawn_with_fresh_noise_are_drawn_without_replacement():
    """First and second child: p(a) and p(a) p(b) / (1 - p(a)), over many parents of one level."""
    params = SamplingParams(temperature=1.0)
    rows = make_rows([params], [0], 4, noise_rule="fresh")
    logits = torch.tensor([[1.0, 0.0, -0.5, 0.3]])
    choice = rows.choose(logits.expand(40_000, -1), 1, paths_of([0] * 40_000), 2)
    distribution = warp(logits, rows.sampling)[0]
    expected = distribution[:, None] * distribution / (1 - distribution[:, None])
    counts = torch.bincount(choice.tokens[:, 0] * 4 + choice.tokens[:, 1], minlength=16).reshape(4, 4)
    assert counts.diagonal().sum() == 0
    off = ~torch.eye(4, dtype=torch.bool)
    assert stats.chisquare(counts[off].numpy(), 40_000 * expected[off].numpy(), sum_check=False).pvalue > 1e-3
    assert torch.equal(choice.distribution, distribution.expand(40_000, -1))


def test_a_position_that_is_drafted_again_has_other_noise():
    params = SamplingParams(temperature=1.0)
    before = make_rows([params], [0], VOCAB, root_positions=[10], noise_rule="fresh")
    after = make_rows([params], [0], VOCAB, root_positions=[11], noise_rule="fresh")
    logits = torch.zeros(1, VOCAB).expand(100, -1)
    one, other = before.choose(logits, 2, paths_of([0] * 100), 1), after.choose(logits, 1, paths_of([0] * 100), 1)
    assert int((one.tokens == other.tokens).sum()) < 15


def test_a_rows_odds_correct_the_chances_of_its_children_and_leave_their_order():
    logits, parents = random_logits(3), paths_of([0, 1, 1])
    params = [SamplingParams(temperature=0.7), SamplingParams()]
    usual = make_rows(params, [1, 2], VOCAB).choose(logits, 1, parents, 3)
    rows = replace(make_rows(params, [1, 2], VOCAB), odds=(4.0, 0.25))
    corrected = rows.choose(logits, 1, parents, 3)
    assert torch.equal(corrected.tokens, usual.tokens)
    for line, odds in enumerate((4.0, 0.25, 0.25)):
        for before, after in zip(usual.chances[line].tolist(), corrected.chances[line].tolist(), strict=True):
            assert after == pytest.approx(correct(before, odds), rel=1e-5)
