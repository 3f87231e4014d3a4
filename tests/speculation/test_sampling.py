"""SamplingTensors, penalties and the choice that target and drafter share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tables import make_rows, paths_of
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headstart.speculation.calibration import Calibration
from headstart.speculation.distribution import History, SamplingTensors, Truncation, penalise, warp
from headstart.speculation.params import SamplingParams

VOCAB = 50
ROOT_LEVEL = range(1)


def random_logits(lines: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(lines, vocab, generator=torch.Generator().manual_seed(seed))


def zeros(lines: int) -> torch.Tensor:
    return torch.zeros(lines, dtype=torch.int64)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1e-40, 1e-3, 0.3, 0.7, 1.0, 1.9, 50.0]),
    top_k=st.sampled_from([None, 1, 2, 5, VOCAB, 10**30]),
    top_p=st.sampled_from([None, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.05, 0.5, 1.0]),
)


# -- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"temperature": -0.1}, r"temperature is -0.1; it must be 0 \(greedy\)"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e38}, "at most 1e[+]06"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1, or None for off"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"presence_penalty": 1e300}, "presence_penalty is 1e[+]300"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"logit_bias": {7: math.inf}}, "logit_bias of token 7 is inf"),
        ({"logit_bias": {7: math.nan}}, "logit_bias of token 7 is nan"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
        ({"n": 0}, "n is 0"),
        ({"stop": ""}, "stop is"),
        ({"stop": ("a", "")}, "stop is"),
        ({"logprobs": -1}, "logprobs is -1"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused_in_a_sentence(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**setting)


def test_limits_themselves_are_accepted():
    SamplingParams(max_tokens=1, top_k=1, top_p=1.0, min_p=1.0, seed=2**64 - 1, logit_bias={3: -math.inf}, logprobs=0)
    assert SamplingParams(stop="a").stop == ("a",)


# -- the distribution
# ----------------------------------------------------------------------------------------------------------------


def by_transformers(logits: torch.Tensor, params: SamplingParams, ids: torch.Tensor) -> torch.Tensor:
    """The processors of transformers, in the order of `generate`."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k is not None:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p is not None:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(ids, logits.double()).softmax(-1)


@given(PARAMS.filter(lambda params: params.temperature > 1e-6), st.integers(0, 1000), st.sampled_from([1.0, 1.3, 0.8]))
def test_the_law_is_that_of_transformers(params, seed, repetition):
    logits = random_logits(3, seed=seed)  # without ties
    seen = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=repetition,
    )
    sampling = SamplingTensors.of([params], [0])
    mask = torch.zeros(3, VOCAB, dtype=torch.bool).scatter_(1, seen, True)
    found = warp(penalise(logits, sampling, mask, torch.zeros(3, VOCAB, dtype=torch.int32)), sampling)
    assert torch.allclose(found, by_transformers(logits, params, seen), atol=1e-6)


@given(PARAMS, st.integers(0, 1000), st.sampled_from(["float", "bfloat16", "coarse", "uniform"]))
def test_asking_for_one_token_says_what_the_whole_law_says(params, seed, kind):
    """Ties at k and at p included: many logits are equal in bfloat16, and more where they are rounded to halves."""
    logits = random_logits(4, seed=seed)
    logits = {
        "float": logits,
        "bfloat16": logits.bfloat16().float(),
        "coarse": (logits * 2).round() / 2,
        "uniform": torch.zeros_like(logits),
    }[kind]
    sampling = SamplingTensors.of([params], [0])
    truncation = Truncation(logits, sampling)
    asked = torch.stack([truncation.admits(torch.full((4,), token)) for token in range(VOCAB)], -1)
    distribution = warp(logits, sampling)
    matters = truncation.scaled > -80  # what has no mass in float32 is never asked for
    assert torch.equal(asked[matters], truncation.members()[matters])
    if params.temperature > 1e-6:
        assert torch.equal(asked[matters], (distribution > 0)[matters])
    assert distribution.sum(-1).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(
    ("setting", "inside"),
    [({"top_k": 3}, [0, 1, 2]), ({"top_p": 0.25}, [0, 1]), ({"top_p": 0.26}, [0, 1, 2]), ({"top_k": 4, "top_p": 0.5}, [0, 1])],
)
def test_ties_at_the_border_go_to_the_lower_ids(setting, inside):
    sampling = SamplingTensors.of([SamplingParams(temperature=1.0, **setting)], [0])
    distribution = warp(torch.zeros(1, 8), sampling)
    assert distribution.nonzero()[:, 1].tolist() == inside
    assert distribution[distribution > 0].tolist() == pytest.approx([1 / len(inside)] * len(inside))


def test_lines_of_several_rows_and_of_one_row_are_judged_alike():
    """One row's settings stand for all lines; every line still has its own top-k mass."""
    logits = random_logits(6) * torch.tensor([0.1, 0.5, 1, 2, 3, 4])[:, None]
    params = SamplingParams(temperature=1.0, top_k=20, top_p=0.5)
    one, several = SamplingTensors.of([params], [0]).rows(zeros(6)), SamplingTensors.of([params] * 2, [0, 0]).rows(zeros(6))
    for token in range(VOCAB):
        asked = torch.full((6,), token)
        assert torch.equal(Truncation(logits, one).admits(asked), Truncation(logits, several).admits(asked))


def test_a_greedy_line_is_one_hot_at_the_first_of_the_best():
    sampling = SamplingTensors.of([SamplingParams(top_k=1), SamplingParams(temperature=1.0)], [0, 0])
    distribution = warp(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), sampling)
    assert distribution[0].tolist() == [0, 1, 0]
    assert distribution[1].tolist() == pytest.approx([1 / 3] * 3)


# -- deciding ---------------------------------------------------------------------------------------------------------------


@given(st.lists(PARAMS, min_size=1, max_size=4), st.integers(0, 1000), st.integers(1, 3))
def test_a_sure_decision_is_the_full_one(params, seed, tries):
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
    places, seeds = [5, 9, 2, 40, 7, 1], [0, 1, 2, 2**64 - 1, -1, 5]
    logits, levels = random_logits(18), torch.arange(3).repeat(6)
    together = make_rows(kinds, seeds, VOCAB, root_positions=places, history=history)
    lines = paths_of([row for row in range(6) for _ in range(3)])
    tokens, sure = together.decide(logits, levels, range(3), lines)
    children = together.choose(logits, 1, lines, 4)
    for row, params in enumerate(kinds):
        alone = make_rows([params], seeds[row : row + 1], VOCAB, root_positions=places[row : row + 1], history=history)
        alone.seats = (row,)
        own = slice(3 * row, 3 * row + 3)
        found, is_sure = alone.decide(logits[own], levels[own], range(3), paths_of([0] * 3))
        assert torch.equal(found[is_sure], tokens[own][is_sure])
        assert torch.equal(is_sure | ~sure[own], torch.ones(3, dtype=torch.bool))
        full = alone.decide_fully(logits[own], levels[own], range(3), paths_of([0] * 3))
        assert torch.equal(full, together.decide_fully(logits, levels, range(3), lines)[own])
        choice = alone.choose(logits[own], 1, paths_of([0] * 3), 4)
        assert torch.equal(choice.tokens, children.tokens[own])
        assert torch.equal(choice.chances, children.chances[own])


def test_the_depth_of_a_node_and_the_place_of_its_row_name_the_same_noise():
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
def test_decided_tokens_follow_the_law(params):
    logits = torch.tensor([[1.0, 0.2, 0.0, -0.5, 0.8]])
    counts = torch.zeros(5)
    for place in range(40):  # of many seeds, at several positions
        rows = make_rows([params] * 1000, range(1000), 5, root_positions=[place] * 1000)
        tokens = rows.decide_fully(logits.expand(1000, -1), zeros(1000), ROOT_LEVEL, paths_of(range(1000)))
        counts += torch.bincount(tokens, minlength=5)
    distribution = warp(logits, SamplingTensors.of([params], [0]))[0]
    assert counts[distribution == 0].sum() == 0
    assert (
        stats.chisquare(counts[distribution > 0].numpy(), 40_000 * distribution[distribution > 0].numpy(), sum_check=False).pvalue
        > 1e-3
    )


# -- history and bias -------------------------------------------------------------------------------------------------------


def by_hand(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """Every penalty from the full list of tokens."""
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
    """The root is the last output token; a node sees its ancestors and itself, each as often as it stands there."""
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
    found = rows.adjust(logits, paths_of([0] * len(branches), padded))
    for line, branch in enumerate(branches):
        assert found[line].tolist() == pytest.approx(by_hand(logits[line].tolist(), params, prompt, output + branch))


def test_a_seat_forgets_its_last_request():
    history = History(1, 8, "cpu")
    history.start(0, [1, 2], [3])
    history.start(0, [4])
    assert history.seen[0].nonzero().flatten().tolist() == [4]
    assert history.written.sum() == 0


def test_a_forbidden_token_is_never_decided_and_a_favoured_one_always():
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
def test_a_reduced_vocabulary_chooses_what_the_full_one_would_with_the_rest_forbidden(rule):
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
    found, expected = rows.choose(small, 2, paths, 3, ids), rows.choose(wide, 2, paths, 3)
    if rule == "shared":
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.allclose(found.chances, expected.chances)
    else:  # fresh noise counts places in the distribution, but the distribution is the same
        assert torch.isin(found.tokens, ids).all()
        assert torch.allclose(found.distribution, expected.distribution)


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
def test_a_chance_is_never_above_one_and_siblings_share_one(seed, warmth, scale):
    rows = make_rows([SamplingParams(temperature=0.7)], [seed], VOCAB)
    fitted = Calibration((0.0,), ((warmth,),), (((0.6,),),))
    chances = rows.choose(random_logits(8, seed=seed, scale=scale), 1, paths_of([0] * 8), VOCAB, calibration=fitted).chances
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


def test_a_position_that_is_drafted_again_meets_fresh_noise():
    params = SamplingParams(temperature=1.0)
    before = make_rows([params], [0], VOCAB, root_positions=[10], noise_rule="fresh")
    after = make_rows([params], [0], VOCAB, root_positions=[11], noise_rule="fresh")
    logits = torch.zeros(1, VOCAB).expand(100, -1)
    one, other = before.choose(logits, 2, paths_of([0] * 100), 1), after.choose(logits, 1, paths_of([0] * 100), 1)
    assert int((one.tokens == other.tokens).sum()) < 15
