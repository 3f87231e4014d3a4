"""Published Hydra heads: for both kinds, their logits equal the authors' formulas; errors in them are named."""

import pytest
import torch
from folders import write_model
from published import HIDDEN, VOCAB, ImportTrial, random, write
from published_hydra import WHERE, by_formula, heads_of, llama_layer, prefix_of

from headstart import formats


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return ImportTrial(write_model(tmp_path_factory.mktemp("target") / "talker"))


# -- comparison with the formulas --


def assert_same(actual, expected):
    """Compare logits at positions that the text continues far enough; tokens rolled in at its end are left out."""
    for depth, (one, other) in enumerate(zip(actual, list(expected), strict=True), 1):
        torch.testing.assert_close(one[:, :-depth], other[:, :-depth], rtol=1e-5, atol=2e-4)


# -- both kinds --


@pytest.mark.parametrize(("heads", "layers", "offset"), [(4, 1, 0), (3, 4, 0), (2, 3, 1)])
def test_logits_of_mlp_heads_equal_the_papers_formula(trial, tmp_path, heads, layers, offset):
    tensors = heads_of(heads, layers, offset)
    config = {"hydra_head_arch": "mlp", "hydra_num_heads": heads, "hydra_num_layers": layers, "grounded_heads": True}
    write(tmp_path, "hydra_lm_head.pt", tensors | {"input_embed_fn.weight": random(VOCAB, HIDDEN)}, **config)
    assert_same(trial.logits(tmp_path), by_formula(trial, tensors, heads, layers, offset, trial.states))


@pytest.mark.parametrize("prefix", [WHERE, "prefix_embedding_layer."])
def test_logits_of_prefix_mlp_heads_equal_the_papers_formula(trial, tmp_path, prefix):
    """As published: four heads of four layers, dropout offsets, a misspelt name, copies of embeddings."""
    tensors = heads_of(4, 4, 1) | prefix_of(prefix) | {"input_embed_fn.weight": random(VOCAB, HIDDEN)}
    write(tmp_path, "hydra_lm_head.pt", tensors, hydra_head_arch="prefix-mlp", hidden_state_offset=0)
    states = torch.stack([llama_layer(h, lambda name: tensors[f"{prefix}{name}.weight"]) for h in trial.states])
    assert_same(trial.logits(tmp_path), by_formula(trial, tensors, 4, 4, 1, states))


def test_projections_may_have_no_bias(trial, tmp_path):
    tensors = heads_of(2, 2, 1, bias=False)
    write(tmp_path, "hydra_lm_head.pt", tensors)
    assert_same(trial.logits(tmp_path), by_formula(trial, tensors, 2, 2, 1, trial.states))


def test_one_block_under_several_names_becomes_several_equal_blocks(trial, tmp_path):
    write(tmp_path, "hydra_lm_head.pt", heads_of(2, 4, 1))
    heads = formats.published_in(tmp_path).read(trial.target_info, trial.model.config)
    blocks = [block.linear.weight for block in heads.heads[0].blocks]
    assert len({block.data_ptr() for block in blocks}) == 3
    assert all(torch.equal(block, blocks[0]) for block in blocks)


def test_distinct_blocks_stay_distinct(trial, tmp_path):
    tensors = heads_of(2, 3, 1)
    tensors["hydra_mlp.1.5.linear.weight"] = random(HIDDEN, HIDDEN)
    write(tmp_path, "hydra_lm_head.pt", tensors)
    assert_same(trial.logits(tmp_path), by_formula(trial, tensors, 2, 3, 1, trial.states))


@pytest.mark.parametrize("kind", ["mlp", "prefix-mlp"])
def test_imported_heads_are_saved_and_loaded_bit_for_bit(trial, tmp_path, kind):
    write(tmp_path / "theirs", "hydra_lm_head.pt", heads_of(2, 2, 1) | (prefix_of() if kind == "prefix-mlp" else {}))
    heads = formats.published_in(tmp_path / "theirs").read(trial.target_info, trial.model.config)
    formats.save(tmp_path / "ours", heads, trial.target_info, {})
    loaded = formats.load(tmp_path / "ours", trial.target_info)
    assert loaded.config == heads.config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in heads.state_dict().items())


def test_tensors_decide_over_the_configuration(tmp_path):
    config = {"hydra_head_arch": "prefix-mlp", "hydra_num_heads": 3, "base_model_name_or_path": "org/talker-7b"}
    write(tmp_path, "hydra_lm_head.pt", heads_of(2, 4, 1) | prefix_of(), **config)
    detected = formats.detect(tmp_path)
    assert (detected.kind, detected.layout) == ("hydra++", "Hydra++ heads (prefix-mlp)")
    assert (detected.num_heads, detected.num_layers, detected.hidden, detected.vocab) == (2, 4, HIDDEN, VOCAB)
    assert detected.notes == ("their config.json says hydra_num_heads = 3, their tensors 2; the tensors count",)
    assert detected.command == f"headstart import {tmp_path} --target org/talker-7b --out FOLDER"


# -- refused --


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("hydra_mlp.1.3.linear.bias"), "hydra_mlp.1.3.linear.bias is missing"),
        (lambda tensors: tensors.pop("hydra_mlp.0.1.res_connection.weight"), "hydra_mlp.0.1.res_connection.weight is missing"),
        (lambda tensors: tensors.pop("hydra_lm_head.1.1.bias"), "hydra_lm_head.1.1.bias is missing"),
        (lambda tensors: tensors.pop(f"{WHERE}norm.weight"), "norm.weight is missing"),
        (lambda tensors: tensors.update(more=random(1)), "has no place in Hydra++ heads (prefix-mlp): more"),
        (
            lambda tensors: tensors.update({"hydra_mlp.1.1.linear.weight": random(HIDDEN, 2 * HIDDEN)}),
            "hydra_mlp.1.1.linear.weight has the shape [32, 64] and should have [32, 96]",
        ),
        (
            lambda tensors: tensors.update({"input_embed_fn.weight": random(VOCAB, 8)}),
            "input_embed_fn.weight has the shape [320, 8] and should have [320, 32]",
        ),
        (
            lambda tensors: tensors.update({f"{WHERE}layers.0.self_attn.k_proj.weight": random(HIDDEN, HIDDEN)}),
            "k_proj.weight has the shape [32, 32] and should have [16, 32]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(trial, tmp_path, change, words):
    tensors = heads_of(2, 2, 1) | prefix_of()
    change(tensors)
    write(tmp_path, "hydra_lm_head.pt", tensors)
    assert words in trial.refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hydra_head_arch": "cross-attn"}, "'cross-attn'; mlp and prefix-mlp can be imported"),
        ({"hydra_head_arch": "eagle-attn"}, "'eagle-attn'; mlp and prefix-mlp can be imported"),
        ({"grounded_heads": False}, "grounded_heads = false"),
        ({"hidden_state_offset": 1}, "they read the state 1 layers below the last"),
    ],
)
def test_architectures_that_cannot_be_imported_are_refused_by_name(trial, tmp_path, config, words):
    write(tmp_path, "hydra_lm_head.pt", heads_of(2, 1, 0), **config)
    assert words in trial.refusal(tmp_path)
    assert any(words in problem for problem in formats.detect(tmp_path).problems)


def test_a_file_without_blocks_is_refused(trial, tmp_path):
    write(tmp_path, "hydra_lm_head.pt", {"hydra_lm_head.0.weight": random(VOCAB, HIDDEN)})
    assert "no hydra_mlp.0.0.linear.weight" in trial.refusal(tmp_path)


def test_a_prefix_layer_for_a_target_with_scaled_positions_is_refused(tmp_path):
    stretched = ImportTrial(write_model(tmp_path / "talker"))
    stretched.model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    write(tmp_path / "theirs", "hydra_lm_head.pt", heads_of(2, 1, 1) | prefix_of())
    assert "positions are of type 'linear'" in stretched.refusal(tmp_path / "theirs")


def test_another_hidden_size_is_refused_with_both_sizes(tmp_path, trial):
    tensors = {
        f"hydra_mlp.0.0.{name}.{part}": random(8, 16) for name in ("linear", "res_connection") for part in ("weight", "bias")
    }
    write(tmp_path, "hydra_lm_head.pt", tensors)
    assert "a hidden size of 8, but the target talker has 32" in trial.refusal(tmp_path)
