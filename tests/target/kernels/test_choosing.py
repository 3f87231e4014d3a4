"""The compiled choice of children against the one of tensor operations, and against a stable sort where scores are equal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled_logits import PARAMS, VOCAB, random_logits

from headstart.speculation import choosing as reference
from headstart.speculation.distribution import SamplingTensors
from headstart.speculation.noise import gumbel
from headstart.speculation.params import SamplingParams
from headstart.target.kernels import choosing
from headstart.target.kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="there are no compiled kernels for this processor, or no compiler")
KINDS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=5, min_p=0.1),
    SamplingParams(temperature=1.0, top_k=20, top_p=0.95),
    SamplingParams(temperature=0.2, min_p=0.05),
]


def noise_of(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return gumbel(torch.arange(rows)[:, None] + 1000 * seed, torch.arange(vocab))


def assert_alike(logits, rows, noise, params, k, ids=None, divisors=None):
    """Both choose the same tokens and leave the same ones out, and chances are those of float64 from the same scores."""
    sampling = SamplingTensors.of(params, range(len(params)))
    divisors = torch.linspace(0.4, 1.5, len(params)) if divisors is None else divisors
    tokens, chances = reference.choose(logits, rows, noise, sampling, divisors, k, ids)
    actual = choosing.choose(logits, rows, noise, sampling, divisors, k, ids)
    assert torch.equal(actual[0], tokens)
    assert torch.equal(actual[1] < 1e-30, chances < 1e-30)  # smaller ones the library rounds to 0
    scores = logits.float()
    if noise is not None:
        own = noise[rows] if ids is None else noise[rows][:, ids]
        scores = torch.addcmul(scores, sampling.temperature[rows][:, None], own)
    best = scores.topk(k, -1).indices
    expected = (scores.double() / divisors.expand(len(params))[rows][:, None]).softmax(-1).gather(1, best) * (chances > 0)
    torch.testing.assert_close(actual[1].double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("vocab", [7, 16, 1000, 20_000])
def test_rows_of_all_kinds_choose_the_same_children(level, vocab):
    rows, k = torch.tensor([0, 1, 2, 3, 4, 5, 5, 2, 1]), min(vocab, 9)
    for noise in (noise_of(6, vocab), None):
        assert_alike(random_logits(9, vocab), rows, noise, KINDS, k)
        assert_alike(random_logits(9, vocab, seed=1), rows, noise, KINDS, k, divisors=torch.tensor([0.9]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_row_chooses_the_same_children_from_bf16(level, kind):
    logits = torch.arange(6 * 300).reshape(6, 300)[:, torch.randperm(300)].bfloat16() / 50  # few equal ones, none among the best
    assert_alike(logits, torch.zeros(6, dtype=torch.int64), noise_of(1, 300), [kind if kind.temperature else KINDS[1]], 4)


def test_a_reduced_vocabulary_reads_the_noise_of_its_tokens(level):
    ids = torch.arange(3000)[torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:500]].sort().values
    rows = torch.tensor([1, 1, 4, 2])
    assert_alike(random_logits(4, 500), rows, noise_of(6, 3000), KINDS, 5, ids)


@settings(max_examples=100)
@given(st.lists(PARAMS, min_size=1, max_size=3), st.integers(0, 1000), st.integers(1, VOCAB))
def test_any_settings_choose_the_same_children(params, seed, k):
    rows = torch.arange(2 * len(params)) % len(params)
    logits = random_logits(len(rows), seed=seed)
    assert_alike(logits, rows, noise_of(len(params), VOCAB, seed), params, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [40, 30_000])
def test_of_equal_scores_the_lower_tokens_are_chosen_in_their_order(level, dtype, vocab):
    logits = torch.randint(0, 4, (5, vocab), generator=torch.Generator().manual_seed(0)).to(dtype)
    sampling = SamplingTensors.of([SamplingParams()], [0])
    tokens, chances = choosing.choose(logits, torch.zeros(5, dtype=torch.int64), None, sampling, torch.ones(1), 30, None)
    expected = logits.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(tokens, expected.indices[:, :30])
    torch.testing.assert_close(chances, logits.float().softmax(-1).gather(1, tokens), rtol=1e-5, atol=0)


def test_tokens_without_a_chance_fill_a_line_up_and_are_different(level):
    logits = torch.full((2, 40), -torch.inf)
    logits[:, [7, 30]] = torch.tensor([1.0, 2.0])
    sampling = SamplingTensors.of([SamplingParams(temperature=1.0, top_p=0.99)], [0])
    tokens, chances = choosing.choose(logits, torch.zeros(2, dtype=torch.int64), None, sampling, torch.ones(1), 5, None)
    assert tokens.tolist() == [[30, 7, 0, 1, 2]] * 2
    assert (chances[:, 2:] == 0).all()
    torch.testing.assert_close(chances[:, :2], torch.tensor([[2.0, 1.0]]).softmax(-1).expand(2, -1), rtol=1e-5, atol=0)


def test_a_truncation_leaves_out_the_same_of_equal_logits(level):
    logits = torch.randint(0, 3, (8, 60), generator=torch.Generator().manual_seed(2)).float()
    rows = torch.zeros(8, dtype=torch.int64)
    for params in (SamplingParams(temperature=1.0, top_k=12), SamplingParams(temperature=1.0, top_p=0.3)):
        assert_alike(logits, rows, noise_of(1, 60), [params], 8)


def test_the_number_of_threads_changes_nothing():
    lib, sampling = library(), SamplingTensors.of(KINDS, range(6))
    logits, rows = random_logits(6, 20_000), torch.arange(6)
    made = []
    for threads in (1, 3):
        lib._set_threads(threads)
        made.append(choosing.choose(logits, rows, noise_of(6, 20_000), sampling, torch.ones(1), 8, None))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_what_the_library_does_not_have_is_left_to_tensor_operations():
    sampling, rows = SamplingTensors.of([SamplingParams()], [0]), torch.zeros(1, dtype=torch.int64)
    for logits, k in ((torch.randn(1, 100).double(), 3), (torch.randn(1, 100).half(), 3), (torch.randn(1, 100), 65)):
        assert choosing.choose(logits, rows, None, sampling, torch.ones(1), k, None) is None
