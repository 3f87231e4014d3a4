"""Headstart inside transformers: `model.generate(..., custom_generate=headstart.custom_generate)`."""

import pytest
import torch
import transformers as hf
from tiny import ARCHITECTURES, VOCAB, random_model

import headstart
from headstart.drafters.lookup import Lookup
from headstart.planner import Chain
from headstart.target import Target

PROMPT = torch.tensor([[5, 9, 3, 5, 9, 3, 5]])


@pytest.fixture(scope="module")
def model():
    return random_model(ARCHITECTURES["llama"]())


def ours(model, ids, **settings):
    return model.generate(ids, custom_generate=headstart.custom_generate, **settings)


@pytest.mark.parametrize("drafter", [None, "lookup", Lookup()], ids=["none", "lookup", "object"])
def test_greedy_tokens_are_generates_own(model, drafter):
    expected = model.generate(PROMPT, max_new_tokens=30)
    assert torch.equal(ours(model, PROMPT, max_new_tokens=30, drafter=drafter), expected)
    assert torch.equal(ours(model, PROMPT, max_length=20, drafter=drafter), expected[:, :20])


def test_a_planner_may_be_given(model):
    expected = model.generate(PROMPT, max_new_tokens=20)
    assert torch.equal(ours(model, PROMPT, max_new_tokens=20, planner=Chain(3)), expected)


def test_the_model_keeps_its_own_attention(model):
    ours(model, PROMPT, max_new_tokens=3)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="context of 128 tokens"):
        ours(model, PROMPT, max_new_tokens=400)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_an_engine_holds_can_generate_too():
    model = random_model(ARCHITECTURES["llama"]())
    expected = model.generate(PROMPT, max_new_tokens=10)
    target = Target(model)
    assert torch.equal(ours(model, PROMPT, max_new_tokens=10), expected)
    target.check()


@pytest.mark.parametrize("stop", [None, "early"])
def test_a_batch_with_left_padding_says_what_each_prompt_says_alone(model, stop):
    prompts = [[7, 8, 9], [1, 2, 3, 4, 5, 6], [50]]
    ids = torch.tensor([[0] * (6 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (6 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 15, "pad_token_id": 0}
    if stop:
        first = model.generate(torch.tensor([prompts[0]]), max_new_tokens=15)[0, 3:].tolist()
        settings["eos_token_id"] = [first[4], first[9]]
    expected = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(ours(model, ids, attention_mask=mask, **settings), expected)
    for row, prompt in enumerate(prompts):
        alone = ours(model, torch.tensor([prompt]), **settings)[0, len(prompt) :]
        assert torch.equal(expected[row, 6 : 6 + len(alone)], alone)


def test_a_repetition_penalty_is_honoured(model):
    settings = {"max_new_tokens": 25, "repetition_penalty": 1.5}
    expected = model.generate(PROMPT, **settings)
    assert not torch.equal(expected, model.generate(PROMPT, max_new_tokens=25))
    assert torch.equal(ours(model, PROMPT, **settings), expected)


def test_torchs_seed_repeats_a_sampled_answer(model):
    settings = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.9, "top_k": 20}
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(ours(model, PROMPT, **settings))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    torch.manual_seed(1)
    assert torch.equal(ours(model, PROMPT, drafter=None, **settings), answers[0])  # whatever the drafter


def test_samples_of_one_prompt_differ(model):
    torch.manual_seed(0)
    answers = ours(model, PROMPT, max_new_tokens=20, do_sample=True, num_return_sequences=3)
    assert answers.shape == (3, 27)
    assert len({tuple(row) for row in answers.tolist()}) == 3


def test_sampling_follows_generates_law(model):
    """One token, many times: the frequencies are those of the truncated law, within five standard errors."""
    settings = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.8, "top_k": 6}
    torch.manual_seed(3)
    count = 400
    tokens = ours(model, PROMPT.repeat(count, 1), **settings)[:, -1]
    with torch.inference_mode():
        best = (model(PROMPT).logits[0, -1] / 0.8).topk(6)
    law = torch.zeros(VOCAB, dtype=torch.float64).scatter_(0, best.indices, best.values.softmax(-1))
    seen = torch.bincount(tokens, minlength=VOCAB) / count
    assert ((seen - law).abs() <= 5 * (law * (1 - law) / count).sqrt() + 1e-12).all()


REFUSED = [
    ({"num_beams": 3}, "num_beams=3"),
    ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
    ({"bad_words_ids": [[3]]}, "bad_words_ids"),
    ({"min_new_tokens": 4}, "min_new_tokens=4"),
    ({"typical_p": 0.9, "do_sample": True}, "typical_p=0.9"),
    ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
    ({"max_time": 3.0}, "max_time"),
    ({"logits_processor": hf.LogitsProcessorList([hf.NoBadWordsLogitsProcessor([[3]])])}, "NoBadWordsLogitsProcessor"),
    ({"stopping_criteria": hf.StoppingCriteriaList([hf.MaxTimeCriteria(3.0)])}, "MaxTimeCriteria"),
    ({"prefix_allowed_tokens_fn": lambda batch, ids: [1, 2]}, "PrefixConstrainedLogitsProcessor"),
    ({"drafter": "crystal-ball"}, "crystal-ball"),
]


@pytest.mark.parametrize(("settings", "word"), REFUSED, ids=[word for _, word in REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_what_would_change_the_text_is_refused_not_ignored(model, settings, word):
    with pytest.raises(ValueError, match=word):
        ours(model, PROMPT, max_new_tokens=5, **settings)
    assert model.config._attn_implementation == "sdpa"
