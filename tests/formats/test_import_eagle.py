"""Published EAGLE heads: imported, their logits equal the formula's, however they are stored; errors in them are named."""

import json

import pytest
import torch
from folders import write_model
from literal import assert_same
from published import HIDDEN, VOCAB, ImportTrial, random, write
from published_eagle import SIZES, by_formula, heads, layer_of

from headstart import formats


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return ImportTrial(write_model(tmp_path_factory.mktemp("target") / "talker"), torch.float64)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ({"bias": True, "kv": 4}, {}),
        ({"kv": 2}, {"bias": False, "num_key_value_heads": 2, "rope_theta": 500000.0}),
        ({"kv": 1, "qkv_bias": True}, {"bias": False, "num_key_value_heads": 1, "rope_theta": 1e6}),
        ({"kv": 2, "size": 12}, {"bias": False, "num_key_value_heads": 2, "head_dim": 12}),
    ],
    ids=["Vicuna's: a bias", "Llama 3's: shared keys, another base", "Qwen2's: biases of queries, keys and values", "wide heads"],
)
def test_logits_equal_the_formulas_at_every_unrolled_step(trial, tmp_path, shape, config, file):
    tensors = heads(**shape)
    write(tmp_path, file, tensors, **SIZES, **config)
    expected = by_formula(trial, tensors, shape["kv"], shape.get("size", 8), config.get("rope_theta", 10000.0))
    assert_same(trial.logits(tmp_path), expected)


def test_an_embedding_equal_to_the_targets_is_left_out(trial, tmp_path):
    embedding = trial.embed_head.embed_weight.half()
    write(tmp_path, "model.safetensors", heads() | {"embed_tokens.weight": embedding}, **SIZES, num_key_value_heads=2)
    published = formats.published_in(tmp_path).for_target(trial.target_info, lambda: trial.embed_head)
    assert "their embedding is the target's, and left out" in published.notes
    assert published.read(trial.target_info, trial.model.config).config.embedding == "shared"


def test_an_embedding_that_differs_from_the_targets_is_kept(trial, tmp_path):
    tensors = heads() | {"embed_tokens.weight": random(VOCAB, HIDDEN)}
    write(tmp_path, "model.safetensors", tensors, **SIZES, num_key_value_heads=2)
    expected = by_formula(trial, tensors, 2, 8, own_embedding=tensors["embed_tokens.weight"])
    assert_same(trial.logits(tmp_path), expected)
    assert trial.read(tmp_path).config.embedding == "own"


def test_an_embedding_is_kept_where_the_targets_is_not_available(trial, tmp_path):
    write(
        tmp_path,
        "model.safetensors",
        heads() | {"embed_tokens.weight": trial.embed_head.embed_weight},
        **SIZES,
        num_key_value_heads=2,
    )
    assert formats.published_in(tmp_path).read(trial.target_info, trial.model.config).config.embedding == "own"


def test_tensor_names_may_begin_with_model(trial, tmp_path):
    tensors = heads()
    write(tmp_path, "model.safetensors", {f"model.{name}": x for name, x in tensors.items()}, **SIZES, num_key_value_heads=2)
    assert_same(trial.logits(tmp_path), by_formula(trial, tensors, 2, 8))


def test_tables_of_rotary_frequencies_are_left_out(trial, tmp_path):
    tensors = heads() | {"layers.0.self_attn.rotary_emb.inv_freq": random(4)}
    write(tmp_path, "model.safetensors", tensors, **SIZES, num_key_value_heads=2)
    assert "rotary" not in " ".join(trial.read(tmp_path).state_dict())


def test_imported_heads_are_saved_and_loaded_bit_for_bit(trial, tmp_path):
    tensors = heads(bias=True) | {"embed_tokens.weight": random(VOCAB, HIDDEN)}
    write(tmp_path / "theirs", "pytorch_model.bin", tensors, **SIZES, num_key_value_heads=2)
    imported = trial.read(tmp_path / "theirs")
    formats.save(tmp_path / "ours", imported, trial.target_info, {})
    loaded = formats.load(tmp_path / "ours", trial.target_info)
    assert loaded.config == imported.config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in imported.state_dict().items())


def test_detect_describes_the_heads_and_names_the_import_command(tmp_path):
    config = SIZES | {"num_key_value_heads": 2, "bias": True, "base_model_name_or_path": "org/talker"}
    write(tmp_path, "model.safetensors", heads() | {"embed_tokens.weight": random(VOCAB, HIDDEN)}, **config)
    detected = formats.detect(tmp_path)
    assert (detected.kind, detected.layout, detected.hidden, detected.vocab) == ("eagle", "EAGLE heads", HIDDEN, VOCAB)
    assert detected.parameters == sum(tensor.numel() for tensor in heads().values()) + VOCAB * HIDDEN
    assert detected.command == f"headstart import {tmp_path} --target org/talker --out FOLDER"
    assert detected.notes == (
        "their config.json says no rope_theta: 10000, whatever the target's is",
        "their config.json says bias = true, their tensors have none; the tensors count",
    )


# -- refused --


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("layers.0.mlp.up_proj.weight"), "layers.0.mlp.up_proj.weight is missing"),
        (lambda tensors: tensors.pop("layers.0.post_attention_layernorm.weight"), "post_attention_layernorm.weight is missing"),
        (
            lambda tensors: tensors.update({"layers.0.input_layernorm.weight": random(HIDDEN)}),
            "no place in EAGLE heads: layers.0.input",
        ),
        (lambda tensors: tensors.update({"lm_head.weight": random(VOCAB, HIDDEN)}), "no place in EAGLE heads: lm_head.weight"),
        (
            lambda tensors: tensors.update({"layers.0.self_attn.k_proj.weight": random(8, HIDDEN)}),
            "layers.0.self_attn.k_proj.weight has the shape [8, 32] and should have [16, 32]",
        ),
        (lambda tensors: tensors.update({"fc.weight": random(HIDDEN, 3 * HIDDEN)}), "fc.weight has the shape [32, 96]"),
        (
            lambda tensors: tensors.update({"layers.0.self_attn.q_proj.weight": random(48, HIDDEN)}),
            "their queries are 48 wide, but their config.json says 4 heads of 8, 32 divided by 4, for it names no head_dim",
        ),
        (
            lambda tensors: tensors.update({"embed_tokens.weight": random(VOCAB - 1, HIDDEN)}),
            "have a vocabulary of 319, but the target talker has 320",
        ),
        (
            lambda tensors: tensors.update({"embed_tokens.weight": random(VOCAB, 8)}),
            "embed_tokens.weight has the shape [320, 8] and should have [320, 32]",
        ),
        (
            lambda tensors: tensors.update({"fc.weight": tensors["fc.weight"].to(torch.int8)}),
            "quantized heads cannot be imported",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(trial, tmp_path, change, words):
    tensors = heads()
    change(tensors)
    write(tmp_path, "model.safetensors", tensors, **SIZES, num_key_value_heads=2)
    assert words in trial.refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_attention_heads": None}, "does not say num_attention_heads"),
        ({"num_attention_heads": "4"}, "says num_attention_heads = '4', which should be a whole number above 0"),
        ({"model_type": "gemma2"}, "model_type 'gemma2', whose layers are not known to compute as a Llama's do"),
        ({"use_sliding_window": True}, "they see a sliding window only"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "positions are of the type 'longrope'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "does not say max_position_embeddings, up to which 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "of the type 'linear', but their config.json says no factor"),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
            "says rope_theta = 500000.0 and, in rope_parameters, 10000.0",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "remove the wrong one",
        ),
        ({"partial_rotary_factor": 0.5}, "only 0.5 of each of their heads has positions"),
        ({"hidden_act": "nonsense"}, "nonsense"),
    ],
)
def test_a_layer_that_cannot_be_built_is_refused_with_the_reason(trial, tmp_path, config, words):
    write(tmp_path, "model.safetensors", heads(), **SIZES | {"num_key_value_heads": 2} | config)
    assert words in trial.refusal(tmp_path)
    assert any(words in problem for problem in formats.detect(tmp_path).problems)


def test_taps_are_refused_for_heads_that_read_the_last_hidden_state(trial, tmp_path):
    write(tmp_path, "model.safetensors", heads(), **SIZES, num_key_value_heads=2)
    assert "EAGLE heads read its last one; leave --taps out" in trial.refusal(tmp_path, taps=(1, 2, 3))


def test_another_hidden_size_is_refused_with_both_sizes(trial, tmp_path):
    tensors = {"fc.weight": random(16, 32), **layer_of("layers.0.", 2, 4, width=16, reads=16)}
    write(tmp_path, "model.safetensors", tensors, **SIZES | {"hidden_size": 16, "num_key_value_heads": 2})
    assert "a hidden size of 16, but the target talker has 32" in trial.refusal(tmp_path)


def test_a_missing_configuration_is_refused(trial, tmp_path):
    write(tmp_path, "model.safetensors", heads())
    assert json.loads((tmp_path / "config.json").read_text()) == {}
    assert "does not say num_attention_heads" in trial.refusal(tmp_path)
