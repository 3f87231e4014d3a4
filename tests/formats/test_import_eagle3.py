"""Published EAGLE-3 heads: imported, their logits equal the formula's, whoever stored them; errors in them are named."""

import pytest
import torch
from folders import write_model
from literal import assert_same, frequencies, llama3
from published import HIDDEN, VOCAB, ImportTrial, random, write
from published_eagle3 import LAYERS, SIZES, SOME, by_formula, heads, of_speculators

from headstart import formats

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return ImportTrial(write_model(tmp_path_factory.mktemp("target") / "talker", layers=LAYERS), torch.float64)


def assert_logits(trial, folder, expected):
    assert_same(trial.logits(folder), list(expected))


# -- layouts --


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_logits_of_the_authors_heads_equal_the_formulas_at_every_unrolled_step(trial, tmp_path, file):
    tensors = heads(draft=SOME)
    write(tmp_path, file, tensors, **SIZES, draft_vocab_size=len(SOME))
    assert_logits(trial, tmp_path, by_formula(trial, tensors))
    assert trial.read(tmp_path).ids.tolist() == SOME


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ({}, {}),
        ({"size": 12}, {"head_dim": 12}),
        ({"draft": SOME}, {"rope_theta": 500000.0}),
        ({"width": 16, "size": 4}, {"hidden_size": 16, "target_hidden_size": HIDDEN}),
        ({"layers": 2}, {"num_hidden_layers": 2}),
    ],
    ids=["every token", "wide heads", "another base", "narrower than the target", "two layers"],
)
def test_logits_of_specforge_heads_equal_the_formulas(trial, tmp_path, shape, config):
    tensors = heads(**shape)
    if "width" in shape:
        tensors["embed_tokens.weight"] = random(VOCAB, shape["width"])
    write(tmp_path, "model.safetensors", tensors, **SIZES | config)
    rotary = frequencies(shape.get("size", 8), config.get("rope_theta", 10000.0))
    expected = by_formula(trial, tensors, shape.get("size", 8), rotary=rotary, layers=shape.get("layers", 1))
    assert_logits(trial, tmp_path, expected)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["older files", "transformers 5"],
)
def test_scaled_rotary_positions_are_the_heads_own(trial, tmp_path, rope):
    tensors = heads(size=12)
    write(tmp_path, "model.safetensors", tensors, **SIZES, head_dim=12, **rope)
    rotary = [llama3(turn, *LLAMA3.values()) for turn in frequencies(12, 5e5)]
    assert_logits(trial, tmp_path, by_formula(trial, tensors, 12, rotary=rotary))


@pytest.mark.parametrize("is_before", [True, False])
def test_logits_of_speculators_heads_equal_the_formulas(trial, tmp_path, is_before):
    tensors = heads("layers.0.", draft=SOME)
    left_out = {"verifier_lm_head.weight": random(VOCAB, HIDDEN), "verifier_norm.weight": random(HIDDEN)}
    write(tmp_path, "model.safetensors", tensors | left_out, **of_speculators(norm_before_residual=is_before))
    assert_logits(trial, tmp_path, by_formula(trial, tensors, prefix="layers.0.", norm_before_residual=is_before))


def test_queries_and_keys_may_have_norms(trial, tmp_path):
    tensors = heads("layers.0.", size=12) | {f"layers.0.self_attn.{name}_norm.weight": 1 + random(12) for name in "qk"}
    layer = {"model_type": "qwen3", "head_dim": 12}
    write(tmp_path, "model.safetensors", tensors, **of_speculators(layer=layer, norm_before_residual=False))
    assert_logits(trial, tmp_path, by_formula(trial, tensors, 12, prefix="layers.0."))


def test_one_norm_may_cover_all_taps(trial, tmp_path):
    tensors = heads("layers.0.", draft=SOME) | {"input_norm.weight": 1 + random(3 * HIDDEN)}
    write(tmp_path, "model.safetensors", tensors, **of_speculators(norm_before_fc=True))
    assert_logits(trial, tmp_path, by_formula(trial, tensors, prefix="layers.0."))


@pytest.mark.parametrize("names", [("fc_norm.0", "fc_norm.1", "fc_norm.2"), ("aux_norm_low", "aux_norm_mid", "aux_norm_high")])
@pytest.mark.parametrize("is_normed", [True, False])
def test_each_tap_may_have_a_norm_and_the_next_state_may_be_normed(trial, tmp_path, names, is_normed):
    """EAGLE-3.1, and its norms under their older names."""
    tensors, norms = heads(draft=SOME), [1 + random(HIDDEN) for _ in range(3)]
    stored = tensors | {f"{name}.weight": weight for name, weight in zip(names, norms, strict=True)}
    write(tmp_path, "model.safetensors", stored, **SIZES, fc_norm=True, norm_output=is_normed)
    known = tensors | {f"fc_norm.{index}.weight": weight for index, weight in enumerate(norms)}
    assert_logits(trial, tmp_path, by_formula(trial, known, norm_output=is_normed))


def test_the_projection_may_have_a_bias(trial, tmp_path):
    tensors = heads() | {"fc.bias": random(HIDDEN)}
    write(tmp_path, "model.safetensors", tensors, **SIZES)
    assert_logits(trial, tmp_path, by_formula(trial, tensors))


def test_heads_may_have_their_own_embedding(trial, tmp_path):
    tensors = heads(draft=SOME) | {"embed_tokens.weight": random(VOCAB, HIDDEN)}
    write(tmp_path, "model.safetensors", tensors, **SIZES)
    assert_logits(trial, tmp_path, by_formula(trial, tensors))


def test_an_embedding_equal_to_the_targets_is_left_out(trial, tmp_path):
    tensors = heads(draft=SOME)
    write(tmp_path, "model.safetensors", tensors | {"embed_tokens.weight": trial.embed_head.embed_weight.float()}, **SIZES)
    assert_logits(trial, tmp_path, by_formula(trial, tensors))
    assert trial.read(tmp_path).config.embedding == "shared"


def test_tensor_names_may_begin_with_model(trial, tmp_path):
    tensors = heads(draft=SOME)
    stored = {name if name == "lm_head.weight" else f"model.{name}": tensor for name, tensor in tensors.items()}
    write(tmp_path, "model.safetensors", stored, **SIZES)
    assert_logits(trial, tmp_path, by_formula(trial, tensors))


# -- draft vocabulary --


def test_rows_in_another_order_are_sorted_with_their_token_ids(trial, tmp_path):
    mixed = SOME[::-1]
    tensors = heads(draft=mixed)
    write(tmp_path, "model.safetensors", tensors, **SIZES)
    assert trial.read(tmp_path).ids.tolist() == SOME
    assert_logits(trial, tmp_path, by_formula(trial, tensors | {"lm_head.weight": tensors["lm_head.weight"].flip(0)}))


def test_a_full_draft_vocabulary_needs_no_ids_even_where_some_are_stored(trial, tmp_path):
    tensors = heads(draft=list(range(VOCAB)))
    write(tmp_path, "model.safetensors", tensors, **SIZES)
    assert trial.read(tmp_path).config.draft_vocab is None
    assert_logits(trial, tmp_path, by_formula(trial, tensors))


def test_heads_without_an_lm_head_use_the_targets(trial, tmp_path):
    tensors = heads()
    del tensors["lm_head.weight"]
    write(tmp_path, "model.safetensors", tensors, **SIZES, draft_vocab_size=None)
    assert_logits(trial, tmp_path, by_formula(trial, tensors | {"lm_head.weight": trial.embed_head.lm_head_weight}))


def test_unused_d2t_and_t2d_may_be_empty(trial, tmp_path):
    """speculators stores both for heads that draft every token, without filling them in."""
    tensors = heads("layers.0.", draft=list(range(VOCAB)))
    tensors["t2d"].fill_(False)
    assert not tensors["d2t"].any()
    write(tmp_path, "model.safetensors", tensors, **of_speculators(norm_before_residual=False))
    assert formats.detect(tmp_path).problems == ()
    assert trial.read(tmp_path).config.draft_vocab is None
    assert_logits(trial, tmp_path, by_formula(trial, tensors, prefix="layers.0."))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d2t: d2t.index_fill_(0, torch.tensor(5), 400), "draft token 5 would be token 405 of the target, which has 320"),
        (lambda d2t: d2t.index_fill_(0, torch.tensor(0), -1), "draft token 0 would be token -1 of the target"),
        (lambda d2t: d2t[4].copy_(SOME[3] - 4), f"draft tokens 3 and 4 would both be token {SOME[3]} of the target"),
        (lambda d2t: d2t.add_(torch.arange(60)), "it holds ids themselves, and should hold offsets"),
    ],
)
def test_an_invalid_draft_vocabulary_is_refused(trial, tmp_path, change, words):
    tensors = heads(draft=SOME)
    change(tensors["d2t"])
    write(tmp_path, "model.safetensors", tensors, **SIZES)
    assert words in trial.refusal(tmp_path)


def test_d2t_and_t2d_must_agree(trial, tmp_path):
    tensors = heads(draft=SOME)
    tensors["t2d"][SOME[7]] = False
    write(tmp_path, "model.safetensors", tensors, **SIZES)
    assert f"d2t and t2d do not agree on whether token {SOME[7]} can be drafted" in trial.refusal(tmp_path)
    assert formats.detect(tmp_path).command is None


# -- layers of the target --


@pytest.mark.parametrize(
    ("config", "taps"),
    [
        (SIZES, (1, 3, 4)),
        (SIZES | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}}, (1, 3, 4)),
        (SIZES | {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}, (1, 3, 4)),
        (of_speculators(eagle_aux_hidden_state_layer_ids=[2, 4, 5]), (1, 3, 4)),
        (of_speculators(eagle_aux_hidden_state_layer_ids=[1, 3, 6]), (0, 2, 5)),
        (of_speculators(eagle_aux_hidden_state_layer_ids=[1, 3, 6, 8]), (0, 2, 5)),
    ],
    ids=["none named", "outputs", "inputs", "speculators", "speculators, others", "and one for training"],
)
def test_layers_are_resolved_to_their_outputs(trial, tmp_path, config, taps):
    tensors = heads("layers.0.")
    write(tmp_path, "model.safetensors", tensors, **config)
    assert trial.read(tmp_path).taps == taps
    assert_logits(trial, tmp_path, by_formula(trial, tensors, prefix="layers.0.", taps=taps))


def test_a_person_may_name_the_layers(trial, tmp_path):
    write(tmp_path, "model.safetensors", heads(taps=2), **SIZES, eagle_aux_hidden_state_layer_ids=[3, 5, 6])
    assert trial.read(tmp_path, taps=(6, 0)).taps == (6, 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SIZES | {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}, "--taps: 1,3,6 if they are outputs, 0,2,5 if they are inputs"),
        (SIZES | {"eagle_aux_hidden_state_layer_ids": [1, 3]}, "names 2 layers, [1, 3], but fc.weight reads 3"),
        (SIZES | {"eagle_aux_hidden_state_layer_ids": "2,4,5"}, "should be a list of whole numbers"),
        (of_speculators(eagle_aux_hidden_state_layer_ids=[0, 3, 6]), "names layer 0 for its input"),
        (of_speculators(eagle_aux_hidden_state_layer_ids=[2, 4, 8]), "before the last of the target's 8"),
        (
            SIZES
            | {"eagle_aux_hidden_state_layer_ids": [2, 4, 5], "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}},
            "[2, 4, 5] and [1, 3, 4]; remove the wrong one",
        ),
    ],
)
def test_ambiguous_layers_are_refused(trial, tmp_path, config, words):
    write(tmp_path, "model.safetensors", heads("layers.0."), **config)
    assert words in trial.refusal(tmp_path)


@pytest.mark.parametrize(
    ("taps", "words"),
    [
        ((1, 2), "names 2 layers, 1,2, but fc.weight reads 3"),
        ((1, 2, 8), "names layer 8, but the target's 8 are counted from 0 to 7"),
        ((1, 2, 2), "names a layer twice: 1,2,2"),
    ],
)
def test_layers_that_a_person_names_are_checked(trial, tmp_path, taps, words):
    write(tmp_path, "model.safetensors", heads(), **SIZES)
    assert words in trial.refusal(tmp_path, taps)


def test_a_target_too_shallow_for_the_usual_layers_is_refused(tmp_path):
    shallow = ImportTrial(write_model(tmp_path / "talker", layers=6))
    write(tmp_path / "theirs", "model.safetensors", heads(), **SIZES)
    assert "the usual layers in a target of 6, 1, 2 and 2, do not follow one another" in shallow.refusal(tmp_path / "theirs")


def test_four_layers_must_be_named(trial, tmp_path):
    write(tmp_path, "model.safetensors", heads(taps=4), **SIZES)
    assert "fc.weight reads 4 layers of the target, and their config.json does not say which" in trial.refusal(tmp_path)
