"""Any drafter, tree, distribution and number of rows gives the tokens of plain decoding with the same seed."""

import math

import pytest
import torch
from cells import DISTRIBUTIONS, EMBEDDED, cells, sampling_cases
from scripted import AsDrafted, Scripted, asks, decode, random_trees, right, right_then_wrong, texts, wrong
from tiny import VOCAB, cut, random_model, tiny
from transformers import LlamaConfig

from headstart.bench.identity import Split, _borders, find_split, tie_gap
from headstart.drafters.draft_model import ModelDrafter
from headstart.engine.engine import Engine
from headstart.speculation.distribution import SamplingTensors, warp
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Chain
from headstart.target.target import Target

TOKENS = {"tiny": 90, "stories260K": 90, "babyllama105": 90, "talk13M": 60, "embedded": 60}  # in each of 78 cells


def report(results):
    """Print the cells. Returns where they differ from plain decoding."""
    splits = [split for cell in results for split in cell.splits]
    for cell in results:
        print(cell)
    print(f"{sum(cell.tokens for cell in results)} tokens, {len(splits)} near ties")
    return splits


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_drafter_gives_the_tokens_of_plain_decoding_in_fp64(distribution):
    assert report(list(cells(sampling_cases()["tiny"](), distribution, TOKENS["tiny"]))) == []


@pytest.fixture(scope="module", params=[name for name in sampling_cases() if name != "tiny"])
def sampling(request):
    return sampling_cases()[request.param]()


@pytest.mark.slow
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_trained_model_gives_the_same_tokens_in_fp32_except_at_near_ties(sampling, distribution):
    splits = report(list(cells(sampling, distribution, TOKENS[sampling.name])))
    assert all(split.is_near_tie for split in splits)
    assert len(splits) <= (0 if sampling.target.is_exact else 2)


# -- the number of rounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_chain_right_to_depth_k_needs_one_round_for_k_plus_one_tokens(depth, distribution):
    """The round that ends the prompt emits one token; the last round may emit fewer than the others."""
    target, requests = tiny(), asks(VOCAB, [6], [20], distribution)
    plain, _ = decode(target, requests)
    for script in (right(depth), right_then_wrong(depth, VOCAB)):
        drafted, engine = decode(target, requests, Scripted(script, texts(requests, plain)))
        assert drafted == plain
        assert engine.stats.rounds == 1 + math.ceil(19 / (depth + 1))


def test_a_drafter_that_is_always_right_is_limited_by_the_plan_alone():
    target, requests = tiny(), asks(VOCAB, [6, 3], [22, 22], SamplingParams(temperature=1))
    plain, _ = decode(target, requests)
    drafted, engine = decode(target, requests, Scripted(right(), texts(requests, plain)), AsDrafted(depth=6), max_rows=2)
    assert drafted == plain
    assert engine.stats.rounds == 1 + 21 // 7
    assert engine.stats.acceptance == [1.0] * 6


def test_a_drafter_that_is_always_wrong_costs_no_round_and_no_token():
    target, requests = tiny(), asks(VOCAB, [6], [15], SamplingParams())
    plain, _ = decode(target, requests)
    drafted, engine = decode(target, requests, Scripted(wrong(VOCAB), texts(requests, plain)))
    assert drafted == plain
    assert engine.stats.rounds == engine.stats.tokens == 15
    assert engine.stats.tau == 1.0
    assert engine.stats.acceptance == [0.0, 0.0]


def test_a_target_that_drafts_for_itself_is_always_right_at_temperature_one_too():
    """Shared noise: the same logits and the same noise give the same token."""
    target, requests = tiny(), asks(VOCAB, [6], [21], SamplingParams(temperature=1))
    plain, _ = decode(target, requests)
    drafted, engine = decode(target, requests, ModelDrafter(cut(target.model, 3)), Chain(4))
    assert drafted == plain
    assert engine.stats.rounds == 1 + 20 // 5


# -- near ties --------------------------------------------------------------------------------------------------------------


def test_equal_answers_have_no_split_and_a_short_one_is_no_tie():
    target, prompt, params = tiny(), (1, 2, 3), SamplingParams(seed=0)
    assert find_split(target, prompt, params, [4, 5], [4, 5]) is None
    assert find_split(target, prompt, params, [4, 5], [4]) == Split(1, (5, None), math.inf)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_a_wrong_token_is_no_near_tie(distribution):
    target, (ask,) = tiny(), asks(VOCAB, [6], [8], distribution)
    (plain,), _ = decode(target, [ask])
    for index in range(8):
        forged = [*plain]
        forged[index] = (plain[index] + 1) % VOCAB
        split = find_split(target, ask.prompt, ask.params, plain, forged)
        assert split is not None
        assert (split.index, split.tokens) == (index, (plain[index], forged[index]))
        assert not split.is_near_tie


def test_the_gap_of_a_greedy_split_is_the_difference_of_the_logits():
    target, prompt = tiny(), [5, 9, 2]
    with torch.inference_mode():
        logits = target.model(torch.tensor([prompt])).logits[0, -1]
    best, second, third = logits.topk(3).indices.tolist()
    gap = tie_gap(target, prompt[:1], SamplingParams(seed=1), prompt[1:], (second, best))
    assert gap == pytest.approx(float(logits[best] - logits[second]), abs=1e-6)
    gap = tie_gap(target, prompt[:1], SamplingParams(seed=1), prompt[1:], (third, second))
    assert gap == pytest.approx(float(logits[best] - logits[third]), abs=1e-6)


TRUNCATIONS = [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.7, "min_p": 0.05}]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_near_ties_are_judged_with_the_truncation_of_the_sampler(truncation):
    params = SamplingParams(temperature=0.8, **truncation)
    for seed in range(50):
        logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)).double()
        distribution = warp(logits[None], SamplingTensors.of([params], [0]))[0]
        assert torch.equal(distribution > 0, _borders(logits, params) > 0)


def test_a_token_at_the_border_of_top_p_is_a_near_tie_though_its_score_is_not():
    """0.5 + 0.25 is just beyond or just below p: the third token is in or out by a rounding."""
    logits = torch.tensor([0.5, 0.25, 0.25 - 1e-9]).log().double()
    borders = _borders(logits, SamplingParams(temperature=1, top_p=0.75 + 1e-7))
    assert borders.tolist() == pytest.approx([0.75 + 1e-7, 0.25 + 1e-7, 1e-7], abs=1e-8)


# -- to the bit -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_exact_target_decides_by_the_same_bits_whatever_was_drafted(dtype, exact_folder):
    """Tokens and every log-probability: from trees in several rows at once, and from plain decoding of one row."""
    try:
        target = Target.load(exact_folder, dtype=dtype, device="cpu", exact=True)
    except ValueError as error:
        pytest.skip(str(error))
    distribution = SamplingParams(temperature=1.0, logprobs=0)
    requests = asks(target.vocab, [5, 1, 40, 17], [20, 12, 25, 30], distribution)
    plain = logprobs(Engine(target), requests)
    answers = texts(requests, [[token for token, _ in answer] for answer in plain])
    drafter = Scripted(random_trees(target.vocab, 14, skill=0.8), answers)
    assert logprobs(Engine(target, drafter, max_rows=3, chunk=32), requests) == plain


@pytest.fixture
def exact_folder(model_folder):
    """The embedded model, or a random one in a checkout without it."""
    return EMBEDDED if (EMBEDDED / "config.json").is_file() else model_folder


def logprobs(engine, requests):
    """The tokens of every request, with their log-probabilities."""
    running = [engine.add(ask.prompt, ask.params) for ask in requests]
    for _ in engine.run():
        pass
    return [[(token, logprob) for token, (logprob, _) in zip(r.output, r.logprobs, strict=True)] for r in running]


@pytest.mark.slow
def test_the_first_token_after_a_prompt_has_the_same_bits_alone_and_with_other_rows():
    """A prompt has many nodes, of which one needs logits: an LM head this wide adds a single row in another order than several."""
    wide = {"hidden_size": 2304, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=1, max_position_embeddings=128, tie_word_embeddings=False, **wide)
    target = Target(random_model(config, torch.float32), check=False)
    try:
        target.choose_kernels(True)
    except ValueError as error:
        pytest.skip(str(error))
    requests = asks(target.vocab, [30, 7, 45, 3], [3, 3, 3, 3], SamplingParams(logprobs=0))
    assert logprobs(Engine(target, max_rows=4), requests) == logprobs(Engine(target, max_rows=1), requests)
