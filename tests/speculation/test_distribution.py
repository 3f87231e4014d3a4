"""Truncation and penalties against the logits processors of transformers, and `Truncation` against `warp`."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sampled_logits import PARAMS, VOCAB, random_logits
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headstart.speculation.distribution import History, SamplingTensors, Truncation, penalise, warp
from headstart.speculation.params import SamplingParams


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


@example(SamplingParams(temperature=0.001), 391, 0.8)
@given(PARAMS.filter(lambda params: params.temperature > 1e-6), st.integers(0, 1000), st.sampled_from([1.0, 1.3, 0.8]))
def test_the_distribution_is_that_of_transformers(params, seed, repetition):
    logits = random_logits(3, seed=seed).double()  # without ties
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
    distribution = warp(penalise(logits, sampling, mask, torch.zeros(3, VOCAB, dtype=torch.int32)), sampling)
    # A low temperature magnifies roundings: both sides divide by the same float32 numbers, in float64.
    exact = replace(params, temperature=float(sampling.temperature), repetition_penalty=float(sampling.repetition))
    assert torch.allclose(distribution, by_transformers(logits, exact, seen), atol=1e-6)


@given(PARAMS, st.integers(0, 1000), st.sampled_from(["float", "bfloat16", "coarse", "uniform"]))
def test_admitting_one_token_agrees_with_the_full_distribution(params, seed, kind):
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
    admitted = torch.stack([truncation.admits(torch.full((4,), token)) for token in range(VOCAB)], -1)
    together = torch.arange(VOCAB).expand(4, -1)
    assert torch.equal(truncation.admits(together), admitted)
    on_device, on_host = (larger(together, truncation.scaled) for larger in (truncation._larger, truncation._larger_on_host))
    assert torch.allclose(on_device[0], on_host[0], rtol=1e-14, atol=0)
    assert not params.top_k or torch.equal(on_device[1], on_host[1])
    distribution = warp(logits, sampling)
    matters = truncation.scaled > -80  # tokens without mass in float32 are never candidates
    assert torch.equal(admitted[matters], truncation.members()[matters])
    if params.temperature > 1e-6:
        assert torch.equal(admitted[matters], (distribution > 0)[matters])
    assert distribution.sum(-1).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(
    ("setting", "inside"),
    [({"top_k": 3}, [0, 1, 2]), ({"top_p": 0.25}, [0, 1]), ({"top_p": 0.26}, [0, 1, 2]), ({"top_k": 4, "top_p": 0.5}, [0, 1])],
)
def test_of_equal_logits_at_the_border_the_lower_ids_are_inside(setting, inside):
    sampling = SamplingTensors.of([SamplingParams(temperature=1.0, **setting)], [0])
    distribution = warp(torch.zeros(1, 8), sampling)
    assert distribution.nonzero()[:, 1].tolist() == inside
    assert distribution[distribution > 0].tolist() == pytest.approx([1 / len(inside)] * len(inside))


def test_lines_of_one_row_and_of_several_rows_are_truncated_alike():
    """The settings of one row broadcast over all lines; the top-k mass is each line's own."""
    logits = random_logits(6) * torch.tensor([0.1, 0.5, 1, 2, 3, 4])[:, None]
    params = SamplingParams(temperature=1.0, top_k=20, top_p=0.5)
    lines = torch.zeros(6, dtype=torch.int64)
    one, several = (SamplingTensors.of([params] * count, [0] * count).rows(lines) for count in (1, 2))
    for token in range(VOCAB):
        candidates = torch.full((6,), token)
        assert torch.equal(Truncation(logits, one).admits(candidates), Truncation(logits, several).admits(candidates))


def test_a_greedy_line_is_one_hot_at_the_first_of_equal_maxima():
    sampling = SamplingTensors.of([SamplingParams(top_k=1), SamplingParams(temperature=1.0)], [0, 0])
    distribution = warp(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), sampling)
    assert distribution[0].tolist() == [0, 1, 0]
    assert distribution[1].tolist() == pytest.approx([1 / 3] * 3)


def test_a_new_request_replaces_the_history_of_its_seat():
    history = History(1, 8, "cpu")
    history.start(0, [1, 2], [3])
    history.start(0, [4])
    assert history.seen[0].nonzero().flatten().tolist() == [4]
    assert history.written.sum() == 0


def test_lines_of_nan_admit_nothing_and_do_not_raise():
    sampling = SamplingTensors.of([SamplingParams(temperature=1.0, top_p=0.5)], [0])
    logits = torch.tensor([[math.nan] * 4, [2.0, 0.0, 0.0, 0.0]])
    assert Truncation(logits, sampling).admits(torch.tensor([[0, 1], [0, 1]])).tolist() == [[False, False], [True, False]]
