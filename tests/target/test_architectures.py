"""Every architecture: trees and rows of different lengths in one forward give the model's own tokens, in fp64."""

import pytest
import torch
import transformers as hf
from scripted import AsDrafted, Scripted, asks, decode, random_trees, texts
from tiny import ARCHITECTURES, REFUSED, VOCAB, WINDOW, random_model, tiny

from headstart.speculation.params import SamplingParams
from headstart.target import attention, selfcheck
from headstart.target import row_mask as row_mask_module
from headstart.target.target import Target

LENGTHS = [1, 3, 14, 25, 9]  # the window is 8: some begin within it, some beyond
TOKENS = [16, 9, 20, 5, 12]

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0)


@pytest.fixture(params=ARCHITECTURES)
def target(request):
    return tiny(request.param)


@pytest.mark.parametrize("distribution", [GREEDY, SAMPLED], ids=["greedy", "T=1"])
def test_random_trees_over_ragged_rows_give_the_tokens_of_plain_decoding(target, distribution):
    requests = asks(VOCAB, LENGTHS, TOKENS, distribution)
    plain, _ = decode(target, requests)
    drafter = Scripted(random_trees(VOCAB, 12), texts(requests, plain))
    drafted, engine = decode(target, requests, drafter, AsDrafted(12, 6), max_rows=3, chunk=11)
    assert drafted == plain
    assert engine.stats.tau > 1.3  # branches were kept, so slots were moved


def test_padded_rows_and_dead_nodes_change_no_token(target, monkeypatch):
    """What a GPU and what exact kernels need: all rows in one padded call, and forests of a minimum size."""
    requests = asks(VOCAB, LENGTHS[1:4], [10, 16, 7], SAMPLED)
    plain, _ = decode(target, requests)
    monkeypatch.setattr(target, "pad_rows", True)
    monkeypatch.setattr(target, "min_nodes", 20)
    drafter = Scripted(random_trees(VOCAB, 12), texts(requests, plain))
    drafted, _ = decode(target, requests, drafter, AsDrafted(12, 6), max_rows=2, chunk=11)
    assert drafted == plain


def test_plain_decoding_gives_the_tokens_of_generate(target):
    requests = asks(VOCAB, LENGTHS, TOKENS, GREEDY)
    plain, _ = decode(target, requests, max_rows=3)
    for ask, output in zip(requests, plain, strict=True):
        ids = target.model.generate(torch.tensor([ask.prompt]), max_new_tokens=ask.params.max_tokens, do_sample=False)
        assert output == ids[0, len(ask.prompt) :].tolist()


def test_answers_depend_on_early_tokens_unless_a_window_hides_them(target):
    """Guards the tests above: with small weights, every text would end alike, whatever the masks."""
    requests = asks(VOCAB, [20, 20], [12, 12], GREEDY)
    outputs, _ = decode(target, requests)
    assert outputs[0] != outputs[1]
    assert len(set(outputs[0])) > 2


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_served_exactly_is_refused_by_name(name):
    config, reason = REFUSED[name]
    model = random_model(config())
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=name) as refusal:
        Target(model)
    sentence = str(refusal.value)
    assert reason in sentence
    assert "\n" not in sentence
    assert model.config._attn_implementation == before  # given back unchanged


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 48},
    "longrope": {
        "rope_type": "longrope", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 48,
        "short_factor": [1.0 + index / 9 for index in range(8)], "long_factor": [2.0 + index for index in range(8)],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_a_rope_that_depends_on_the_longest_row_limits_the_context(kind):
    config = ARCHITECTURES["phi3" if kind == "longrope" else "llama"]()
    config.rope_parameters = ROPES[kind]
    config.original_max_position_embeddings = 48
    target = Target(random_model(config))
    assert target.context == 48
    requests = asks(VOCAB, [3, 30, 12], [45, 18, 20], GREEDY)
    plain, _ = decode(target, requests)
    drafted, engine = decode(target, requests, Scripted(random_trees(VOCAB, 9), texts(requests, plain)), max_rows=3)
    assert drafted == plain
    ids = target.model.generate(torch.tensor([requests[0].prompt]), max_new_tokens=45, do_sample=False)
    assert plain[0] == ids[0, 3:].tolist()
    with pytest.raises(ValueError, match="context of 48 tokens"):
        engine.add([1] * 30, SamplingParams(max_tokens=19))


def test_the_context_of_llama4_ends_where_it_scales_queries_by_their_index_in_the_forward():
    config = ARCHITECTURES["llama4"]()
    config.attn_temperature_tuning, config.floor_scale = True, 64
    target = Target(random_model(config))
    assert target.context == 63
    requests = asks(VOCAB, [3, 40, 12], [60, 23, 20], GREEDY)
    plain, _ = decode(target, requests)
    drafter = Scripted(random_trees(VOCAB, 9), texts(requests, plain))
    drafted, _ = decode(target, requests, drafter, AsDrafted(9), max_rows=3, chunk=20)
    assert drafted == plain
    ids = target.model.generate(torch.tensor([requests[0].prompt]), max_new_tokens=60, do_sample=False)
    assert plain[0] == ids[0, 3:].tolist()


def test_a_model_that_passes_an_unsupported_keyword_to_its_attention_is_refused(monkeypatch):
    model = random_model(ARCHITECTURES["llama"]())
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: forward(*args, **kwargs, alibi_slopes=torch.ones(4)))
    with pytest.raises(ValueError, match="passes alibi_slopes to its attention, which is not supported"):
        Target(model)


def test_the_tested_models_have_windows_and_chunks():
    windows = {name: {(window.sliding, window.chunk) for window in tiny(name).windows} for name in ARCHITECTURES}
    windowed = {name for name, kinds in windows.items() if (WINDOW, None) in kinds}
    assert windowed == {"mistral", "gemma2", "gemma3", "gpt_oss", "cohere2", "afmoe"}
    assert windows["llama4"] == {(None, WINDOW), (None, None)}
    assert tiny("gpt2").context == 128 == hf.GPT2Config(n_positions=128).n_positions


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 0.1), (torch.float16, 1.0)], ids=["quiet bf16", "loud fp16"])
@pytest.mark.parametrize("name", ["FalconH1ForCausalLM", "BertLMHeadModel", "ElectraForCausalLM"])
def test_state_beside_attention_and_attention_to_later_tokens_are_found_in_every_precision(name, dtype, scale, monkeypatch):
    """By their effect: the attributes and classes of modules, which an unknown model may lack, are not used here."""
    config, reason = REFUSED[name]
    model = random_model(config(), dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale if weight.dim() > 1 else 1)
    monkeypatch.setattr(attention, "_looks_ahead", lambda module, is_causal: False)
    monkeypatch.setattr(selfcheck, "convolutions", lambda target: [])
    with pytest.raises(ValueError, match=reason):
        Target(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_correct_model_passes_in_half_precision(name):
    Target(random_model(ARCHITECTURES[name](), torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_tree_whose_siblings_see_each_other_is_found_in_half_precision(dtype, monkeypatch):
    model = random_model(ARCHITECTURES["llama"](), dtype)
    monkeypatch.setattr(
        row_mask_module, "tree_mask", lambda lineage, stem: torch.ones(stem + len(lineage), stem + len(lineage)).tril() > 0
    )
    with pytest.raises(ValueError, match="scored at once differs from the sequential text"):
        Target(model)
