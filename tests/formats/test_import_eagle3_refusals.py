"""Published EAGLE-3 heads that are detected, converted by the command, or refused with the reason."""

import json

import pytest
import torch
from folders import write_model
from published import HIDDEN, VOCAB, ImportTrial, random, write
from published_eagle3 import LAYERS, SIZES, SOME, THREE, heads, of_speculators
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from headstart import formats
from headstart.cli import app
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.target.loading import load_model
from headstart.target.target import Target


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return ImportTrial(write_model(tmp_path_factory.mktemp("target") / "talker", layers=LAYERS), torch.float64)


def test_detect_describes_the_heads_and_names_the_import_command(tmp_path):
    write(tmp_path, "model.safetensors", heads("layers.0.", draft=SOME), **of_speculators())
    known = formats.detect(tmp_path)
    assert (known.kind, known.layout) == ("eagle3", "EAGLE-3 heads as speculators stores them")
    assert (known.hidden, known.vocab, known.draft_vocab) == (HIDDEN, VOCAB, 60)
    assert known.command == f"headstart import {tmp_path} --target org/talker --out FOLDER"
    assert known.notes == (
        "their config.json says no rope_theta: 10000, whatever the target's is",
        "their config.json says no norm_before_residual: false, as speculators has it, where vLLM takes true",
    )


def test_wrong_counts_in_the_configuration_are_noted(tmp_path):
    config = SIZES | {"draft_vocab_size": 64, "fc_norm": False, "rope_theta": 1e4}
    write(tmp_path, "model.safetensors", heads(draft=SOME) | {f"fc_norm.{i}.weight": random(HIDDEN) for i in range(3)}, **config)
    assert formats.detect(tmp_path).notes == (
        "their config.json says fc_norm = false, but there is fc_norm.0.weight; the tensors count",
        "their config.json says draft_vocab_size = 64, their tensors 60; the tensors count",
    )


def test_imported_heads_are_saved_and_loaded_bit_for_bit(trial, tmp_path):
    write(tmp_path / "theirs", "model.safetensors", heads(draft=SOME), **SIZES)
    imported = trial.read(tmp_path / "theirs")
    formats.save(tmp_path / "ours", imported, trial.target_info, {})
    loaded = formats.load(tmp_path / "ours", trial.target_info)
    assert (loaded.config, loaded.taps) == (imported.config, THREE)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in imported.state_dict().items())


def test_the_import_command_converts_them(trial, tmp_path):
    target, theirs = write_model(tmp_path / "talker", layers=LAYERS), tmp_path / "theirs"
    stored = heads(draft=SOME) | {"embed_tokens.weight": trial.embed_head.embed_weight.float()}
    write(theirs, "model.safetensors", stored, **SIZES, eagle_aux_hidden_state_layer_ids=[0, 2, 5])
    command = ["import", str(theirs), "--target", str(target), "--out", str(tmp_path / "ours")]
    refused = CliRunner().invoke(app, command)
    assert (refused.exit_code, "--taps: 0,2,5 if they are outputs" in refused.stderr) == (2, True)
    found = json.loads(CliRunner().invoke(app, [*command, "--taps", "0,2,5", "--json"]).stdout)
    assert (found["method"], found["taps"], found["draft_vocab"]) == ("eagle3", [0, 2, 5], 60)
    assert "their embedding is the target's, and left out" in found["notes"]
    assert formats.load(tmp_path / "ours").taps == (0, 2, 5)


def test_imported_heads_leave_the_generated_text_unchanged(trial, tmp_path):
    """From the folder to the engine: features of three layers, trees over a draft vocabulary of 60 tokens."""
    write(tmp_path, "model.safetensors", heads(draft=SOME), **SIZES, norm_output=True)
    target = Target(load_model(trial.folder, torch.float64, "cpu"))
    engine = Engine(target, trial.read(tmp_path))
    request = engine.add(trial.tokens[0].tolist(), SamplingParams(max_tokens=16, ignore_eos=True))
    while request.finish_reason is None:
        engine.step()
    plain = trial.tokens[:1]
    for _ in range(16):
        plain = torch.cat([plain, trial.model(plain).logits[:, -1:].argmax(-1)], 1)
    assert list(request.output) == plain[0, trial.tokens.shape[1] :].tolist()


def test_taps_must_be_numbers(tmp_path):
    result = CliRunner().invoke(app, ["import", str(tmp_path), "--out", "x", "--taps", "low,high"])
    assert (result.exit_code, "--taps is 'low,high'; write the numbers of layers" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([3, 5, 400]), "draft token 2 would be token 400 of the target, which has 320"),
        (torch.tensor([3, 5, 5]), "draft tokens 1 and 2 would both be token 5"),
        (torch.tensor([3, 9, 5]), "tokens 9 and 5 stand in this order, and should ascend"),
        (torch.tensor([3, 5, 9], dtype=torch.int32), "of type torch.int32 and should be torch.int64"),
        (torch.tensor([3.0, 5.0, 9.0]), "has ids of type torch.float32, but these heads need torch.int64"),
    ],
)
def test_an_invalid_draft_vocabulary_in_native_heads_is_refused(trial, tmp_path, ids, words):
    write(tmp_path / "theirs", "model.safetensors", heads(draft=[3, 5, 9]), **SIZES)
    formats.save(tmp_path / "ours", trial.read(tmp_path / "theirs"), trial.target_info, {})
    file = tmp_path / "ours" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file) | {"ids": ids}, file, metadata=metadata)
    with pytest.raises(ValueError, match=words):
        formats.load(tmp_path / "ours")


def without(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("fc.weight"), "fc.weight is missing, which projects the target's hidden states"),
        (without("norm.weight"), "norm.weight is missing"),
        (without("midlayer.hidden_norm.weight"), "midlayer.hidden_norm.weight is missing"),
        (without("lm_head.weight"), "lm_head.weight is missing, and only their own can score the 60 tokens of d2t"),
        (without("d2t"), "lm_head.weight scores 60 tokens of a vocabulary of 320, but no d2t says which ones"),
        (lambda tensors: tensors.update(more=random(1)), "no place in EAGLE-3 heads: more"),
        (lambda tensors: tensors.update(t2d=torch.tensor(1)), "t2d has the shape [] and should be a list"),
        (lambda tensors: tensors.update(d2t=tensors["d2t"][None]), "d2t has the shape [1, 60] and should be a list"),
        (lambda tensors: tensors.update({"t2d": torch.zeros(300)}), "a vocabulary of 300, but the target talker has 320"),
        (lambda tensors: tensors.update({"d2t": torch.zeros(60)}), "d2t is of type torch.float32 and should hold whole numbers"),
        (lambda tensors: tensors.update({"fc.weight": random(HIDDEN, 100)}), "fc.weight has 100 columns, no multiple of the 32"),
        (
            lambda tensors: tensors.update({"lm_head.weight": random(61, HIDDEN)}),
            "lm_head.weight has the shape [61, 32] and should have [60, 32]",
        ),
        (
            lambda tensors: tensors.update({"midlayer.self_attn.q_proj.weight": random(HIDDEN, HIDDEN)}),
            "midlayer.self_attn.q_proj.weight has the shape [32, 32] and should have [32, 64]",
        ),
        (lambda tensors: tensors.update(mask_hidden=random(1, 96)), "they are P-EAGLE's"),
        (lambda tensors: tensors.update({"midlayer.self_attn.q_a_proj.weight": random(4, 64)}), "belongs to latent attention"),
        (
            lambda tensors: tensors.update({"midlayer.mlp.experts.0.up_proj.weight": random(4, 4)}),
            "belongs to a mixture of experts",
        ),
        (
            lambda tensors: tensors.update({"norm.weight": torch.ones(HIDDEN).to(torch.int8)}),
            "quantized heads cannot be imported",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(trial, tmp_path, change, words):
    tensors = heads(draft=SOME)
    change(tensors)
    write(tmp_path, "model.safetensors", tensors, **SIZES)
    assert words in trial.refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"speculators_model_type": "peagle"}, "they are P-EAGLE's"),
        ({"parallel_drafting": True}, "they are P-EAGLE's"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "they read the last hidden state only"),
        ({"eagle_config": "yes"}, "says eagle_config = 'yes', which should be an object"),
        ({"norm_output": "yes"}, "says norm_output = 'yes', which should be true or false"),
        ({"norm_before_fc": True}, "input_norm.weight is missing"),
        ({"fc_norm": True}, "fc_norm.0.weight is missing"),
        ({"fc_norm": True, "norm_before_fc": True}, "nothing says which comes first"),
        ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3'"),
        ({"target_hidden_size": 48}, "a hidden size of 48, but the target talker has 32"),
        ({"target_hidden_size": 24, "hidden_size": 24}, "embed_tokens.weight is missing, and the target's own is 24 wide"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused_with_the_reason(trial, tmp_path, config, words):
    tensors = heads(draft=SOME)
    if config.get("target_hidden_size") == 48:
        tensors |= {"embed_tokens.weight": random(VOCAB, HIDDEN)}
    write(tmp_path, "model.safetensors", tensors, **SIZES | config)
    assert words in trial.refusal(tmp_path)


def test_the_targets_lm_head_must_fit(trial, tmp_path):
    tensors = heads()
    del tensors["lm_head.weight"]
    write(tmp_path, "model.safetensors", tensors, **SIZES, draft_vocab_size=100)
    assert "the target's own does not fit 100 tokens" in trial.refusal(tmp_path)
