"""Exports to vLLM, speculators, SGLang and TGI: the same heads come back, and the files are those that the engines read."""

import json

import pytest
import torch
from folders import write_model
from saved_heads import BIASED, HIDDEN, LAYERS, NARROW, PLAIN, VOCAB, assert_returns, config_of, save_heads, tensors_of

from headstart import formats
from headstart.formats.exporting import export_heads
from headstart.formats.importing import import_heads
from headstart.target.hidden_states import forward_with_hidden_states
from headstart.target.loading import load_model


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("target") / "talker", layers=LAYERS)


# -- the same heads come back --


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("settings", [{}, {"depth": 3, "steps": 2, "noise": 0.2}])
def test_eagle_heads_return(tmp_path, target, engine, settings):
    assert_returns(save_heads(tmp_path / "heads", target, "eagle", **settings), target, engine, tmp_path)


@pytest.mark.parametrize(("engine", "settings"), [("vllm", {"embedding": "own"}), ("sglang", {"bias": True})])
def test_eagle_heads_with_more_tensors_return(tmp_path, target, engine, settings):
    assert_returns(save_heads(tmp_path / "heads", target, "eagle", **settings), target, engine, tmp_path)


@pytest.mark.parametrize("engine", ["vllm", "speculators", "sglang"])
@pytest.mark.parametrize("draft_vocab", [None, 60])
@pytest.mark.parametrize(
    "settings",
    [{}, PLAIN, {"fc_norm": False}, {"norm_output": False}, {"taps": (0, 6)}, {"taps": (1, 3, 4)}, {"taps": (0, 1, 4, 5, 6)}],
)
def test_eagle3_heads_return(tmp_path, target, engine, draft_vocab, settings):
    heads = save_heads(tmp_path / "heads", target, "eagle3", draft_vocab=draft_vocab, **settings)
    assert_returns(heads, target, engine, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_before_residual": True},
        {"fc_norm": False, "norm_before_fc": True},
        {"embedding": "own"},
        {"taps": (3,)},
        {"block": BIASED},
        {"depth": 9, "steps": 2},
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "speculators"])
def test_eagle3_heads_that_only_vllm_and_speculators_take_return(tmp_path, target, engine, settings):
    assert_returns(save_heads(tmp_path / "heads", target, "eagle3", **settings), target, engine, tmp_path)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_eagle3_heads_of_another_width_return(tmp_path, target, engine):
    heads = save_heads(tmp_path / "heads", target, "eagle3", block={**NARROW, "num_hidden_layers": 1}, embedding="own")
    out = assert_returns(heads, target, engine, tmp_path)
    assert config_of(out)["target_hidden_size"] == HIDDEN


@pytest.mark.parametrize("engine", ["vllm", "tgi"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("projection", ["own", "shared"])
def test_medusa_heads_return(tmp_path, target, engine, num_layers, projection):
    heads = save_heads(tmp_path / "heads", target, "medusa", num_heads=3, num_layers=num_layers, projection=projection)
    assert_returns(heads, target, engine, tmp_path)


def test_the_embedded_heads_return_with_the_embedded_target(tmp_path):
    from headstart.target.loading import embedded

    for engine, name in (("vllm", "eagle3"), ("tgi", "medusa"), ("sglang", "eagle")):
        assert_returns(embedded(name), embedded("target"), engine, tmp_path / name)


def test_another_dtype_is_written_and_said(tmp_path, target):
    heads = save_heads(tmp_path / "heads", target, "eagle3", draft_vocab=60)
    export_heads(heads, str(target), "vllm", tmp_path / "export", "bfloat16")
    tensors = tensors_of(tmp_path / "export")
    assert {name for name, tensor in tensors.items() if tensor.dtype is not torch.bfloat16} == {"d2t"}
    assert config_of(tmp_path / "export")["dtype"] == "bfloat16"
    report = json.loads((tmp_path / "export" / "conformance.json").read_text())
    assert {entry["how"] for entry in report["tensors"]} == {"derived: cast to bfloat16", "derived: each id minus its index"}


def test_without_its_report_an_export_is_imported_like_any_other_folder(tmp_path, target):
    heads = save_heads(tmp_path / "heads", target, "eagle", depth=3)
    export_heads(heads, str(target), "sglang", tmp_path / "export")
    (tmp_path / "export" / "conformance.json").unlink()
    import_heads(str(tmp_path / "export"), str(target), str(tmp_path / "back"))
    back = formats.load(tmp_path / "back")
    assert (back.config.depth, back.config.bias) == (5, True)  # the default, and the zeros that SGLang needs
    assert not back.fc.bias.any()


def test_a_tensor_that_was_changed_after_the_export_is_imported_as_it_is(tmp_path, target):
    from safetensors.torch import save_file

    heads = save_heads(tmp_path / "heads", target, "eagle")
    export_heads(heads, str(target), "sglang", tmp_path / "export")
    save_file(tensors_of(tmp_path / "export") | {"fc.bias": torch.ones(HIDDEN)}, tmp_path / "export" / "model.safetensors")
    import_heads(str(tmp_path / "export"), str(target), str(tmp_path / "back"))
    assert bool((formats.load(tmp_path / "back").fc.bias == 1).all())


# -- names, shapes and keys --

LLAMA = {
    "self_attn.q_proj.weight": (32, 64), "self_attn.k_proj.weight": (16, 64), "self_attn.v_proj.weight": (16, 64),
    "self_attn.o_proj.weight": (32, 32), "mlp.gate_proj.weight": (64, 32), "mlp.up_proj.weight": (64, 32),
    "mlp.down_proj.weight": (32, 64), "input_layernorm.weight": (32,), "hidden_norm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
}  # fmt: skip


def shapes(folder):
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(folder).items()}


@pytest.mark.parametrize(("engine", "first"), [("vllm", "midlayer."), ("sglang", "midlayer."), ("speculators", "layers.0.")])
def test_eagle3s_tensors_have_their_authors_names(tmp_path, target, engine, first):
    heads = save_heads(tmp_path / "heads", target, "eagle3", draft_vocab=60, taps=(0, 2, 5))
    export_heads(heads, str(target), engine, tmp_path / "export")
    expected = {first + name: shape for name, shape in LLAMA.items()} | {f"fc_norm.{index}.weight": (32,) for index in range(3)}
    expected |= {"fc.weight": (32, 96), "norm.weight": (32,), "lm_head.weight": (60, 32), "d2t": (60,)}
    assert shapes(tmp_path / "export") == expected | ({"t2d": (VOCAB,)} if engine == "speculators" else {})


def test_eagles_tensors_have_no_first_norm_no_final_norm_and_no_lm_head(tmp_path, target):
    narrow = {name: (shape[0], 32) if "_proj" in name and name[10] in "qkv" else shape for name, shape in LLAMA.items()}
    expected = {
        f"layers.0.{name}": shape for name, shape in narrow.items() if name not in ("input_layernorm.weight", "hidden_norm.weight")
    }
    heads = save_heads(tmp_path / "heads", target, "eagle", embedding="own")
    export_heads(heads, str(target), "vllm", tmp_path / "vllm")
    assert shapes(tmp_path / "vllm") == expected | {"fc.weight": (32, 64), "embed_tokens.weight": (VOCAB, 32)}
    heads = save_heads(tmp_path / "shared", target, "eagle")
    export_heads(heads, str(target), "sglang", tmp_path / "sglang")
    assert shapes(tmp_path / "sglang") == expected | {"fc.weight": (32, 64), "fc.bias": (32,)}
    assert not tensors_of(tmp_path / "sglang")["fc.bias"].any()


def test_medusas_tensors_have_the_names_of_each_engine(tmp_path, target):
    heads = save_heads(tmp_path / "heads", target, "medusa", num_heads=2, num_layers=1)
    export_heads(heads, str(target), "vllm", tmp_path / "vllm")
    export_heads(heads, str(target), "tgi", tmp_path / "tgi")
    blocks = {"weight": (32, 32), "bias": (32,)}
    expected = {f"blocks.{head}.layers.0.{part}": shape for head in (0, 1) for part, shape in blocks.items()}
    assert shapes(tmp_path / "vllm") == expected | {f"lm_heads.{head}.weight": (VOCAB, 32) for head in (0, 1)}
    expected = {f"{head}.0.linear.{part}": shape for head in (0, 1) for part, shape in blocks.items()}
    assert shapes(tmp_path / "tgi") == expected | {f"{head}.1.weight": (VOCAB, 32) for head in (0, 1)}
    assert [path.name for path in (tmp_path / "tgi").glob("*.safetensors")] == ["medusa_lm_head.safetensors"]


@pytest.mark.parametrize(("engine", "num_layers", "copies"), [
    ("vllm", 1, {"lm_head.weight"}), ("vllm", 2, {"lm_head.weight"}), ("tgi", 1, set()), ("tgi", 2, {"0.2.weight", "1.2.weight"}),
])  # fmt: skip
def test_a_shared_lm_head_is_the_targets_where_the_engine_wants_one(tmp_path, target, engine, num_layers, copies):
    heads = save_heads(tmp_path / "heads", target, "medusa", num_heads=2, num_layers=num_layers, projection="shared")
    export_heads(heads, str(target), engine, tmp_path / "export")
    tensors, head = tensors_of(tmp_path / "export"), load_model(target, "auto", "cpu").lm_head.weight
    assert {name for name, tensor in tensors.items() if len(tensor) == VOCAB} == copies
    assert all(torch.equal(tensors[name], head) for name in copies)


def test_medusas_configurations_are_those_of_each_engine(tmp_path, target):
    heads = save_heads(tmp_path / "heads", target, "medusa", num_heads=2, num_layers=2, projection="shared")
    export_heads(heads, str(target), "vllm", tmp_path / "vllm")
    export_heads(heads, str(target), "tgi", tmp_path / "tgi")
    assert config_of(tmp_path / "vllm") == {
        "model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_heads": 2,
        "num_hidden_layers": 2, "medusa_fc_bias": True, "original_lm_head": True, "dtype": "float32",
    }  # fmt: skip
    expected = {"medusa_num_heads": 2, "medusa_num_layers": 2, "base_model_name_or_path": str(target)}
    assert config_of(tmp_path / "tgi") == expected


@pytest.mark.parametrize(("engine", "method", "architecture"), [
    ("vllm", "eagle", "LlamaForCausalLM"), ("sglang", "eagle", "LlamaForCausalLMEagle"),
    ("vllm", "eagle3", "LlamaForCausalLMEagle3"), ("sglang", "eagle3", "LlamaForCausalLMEagle3"),
    ("speculators", "eagle3", "Eagle3DraftModel"),
])  # fmt: skip
def test_each_engine_finds_its_class_and_all_keys_of_a_llama(tmp_path, target, engine, method, architecture):
    heads = save_heads(tmp_path / "heads", target, method)
    export_heads(heads, str(target), engine, tmp_path / "export")
    config = config_of(tmp_path / "export")
    assert config["architectures"] == [architecture]
    llama = config.get("transformer_layer_config", config)
    assert engine != "speculators" or "architectures" not in llama  # a null one breaks llama.cpp's converter
    expected = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 1, "vocab_size": VOCAB, "rope_theta": 10000.0,
                "tie_word_embeddings": False}  # fmt: skip
    assert expected.items() <= llama.items()
    assert llama["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_positions_of_another_type_are_written_in_both_forms(tmp_path, target):
    heads = save_heads(tmp_path / "heads", target, "eagle3", block=BIASED)
    export_heads(heads, str(target), "vllm", tmp_path / "export")
    config = config_of(tmp_path / "export")
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    assert (config["rope_theta"], config["rope_scaling"]) == (5000.0, {"rope_type": "linear", "factor": 2.0})


def test_speculators_configuration_names_everything_that_vllm_would_guess(tmp_path, target):
    heads = save_heads(tmp_path / "heads", target, "eagle3", draft_vocab=60)
    export_heads(heads, str(target), "speculators", tmp_path / "export")
    config = config_of(tmp_path / "export")
    switches = {"norm_before_residual": False, "norm_before_fc": False, "fc_norm": True, "norm_output": True}
    assert {"draft_vocab_size": 60, "speculators_model_type": "eagle3", **switches}.items() <= config.items()
    inner = config["speculators_config"]
    assert inner["verifier"] == {"name_or_path": str(target), "architectures": ["LlamaForCausalLM"]}
    assert (inner["algorithm"], inner["proposal_methods"][0]["speculative_tokens"]) == ("eagle3", 3)
    assert inner["default_proposal_method"] == inner["proposal_methods"][0]["proposal_type"]


# -- which layers are read, and which tokens are drafted --


@pytest.mark.parametrize(("engine", "is_input"), [("vllm", True), ("speculators", True), ("sglang", False)])
def test_the_numbers_of_the_layers_name_the_states_that_the_heads_read(tmp_path, target, engine, is_input):
    taps = (0, 2, 5)
    heads = save_heads(tmp_path / "heads", target, "eagle3", taps=taps)
    export_heads(heads, str(target), engine, tmp_path / "export")
    config = config_of(tmp_path / "export")
    numbers = config.get("eagle_config", config)["eagle_aux_hidden_state_layer_ids"]
    model, tokens = load_model(target, "auto", "cpu"), torch.arange(9)[None]
    with torch.no_grad():
        inputs = model(input_ids=tokens, output_hidden_states=True).hidden_states  # transformers: number k is the input of layer k
        _, read = forward_with_hidden_states(model, taps, input_ids=tokens)
    named = [inputs[number if is_input else number + 1] for number in numbers]
    assert all(torch.equal(state, read[tap]) for state, tap in zip(named, taps, strict=True))
    assert not any(
        torch.equal(inputs[number + 1 if is_input else number], read[tap]) for number, tap in zip(numbers, taps, strict=True)
    )


def test_the_usual_layers_are_not_named_to_sglang_and_other_counts_are_said(tmp_path, target):
    for taps, engine, expected in (
        ((1, 3, 4), "sglang", {}),
        ((1, 3, 4), "vllm", {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}),
        ((0, 5), "vllm", {"eagle_aux_hidden_state_layer_ids": [1, 6], "num_aux_hidden_states": 2}),
        ((0, 5), "sglang", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 5]}, "num_aux_hidden_states": 2}),
    ):
        name = f"{engine}-{len(taps)}"
        heads = save_heads(tmp_path / f"heads-{name}", target, "eagle3", taps=taps)
        export_heads(heads, str(target), engine, tmp_path / name)
        keys = ("eagle_aux_hidden_state_layer_ids", "eagle_config", "num_aux_hidden_states")
        assert {key: value for key, value in config_of(tmp_path / name).items() if key in keys} == expected


def test_layers_counted_from_the_end_are_counted_from_the_beginning(tmp_path, target):
    heads = save_heads(tmp_path / "heads", target, "eagle3", taps=(0, -3, -2))
    export_heads(heads, str(target), "vllm", tmp_path / "export")
    assert config_of(tmp_path / "export")["eagle_aux_hidden_state_layer_ids"] == [1, 6, 7]


def test_a_reduced_vocabulary_is_written_as_offsets_and_a_whole_one_not_at_all(tmp_path, target):
    heads = save_heads(tmp_path / "heads", target, "eagle3", draft_vocab=60)
    export_heads(heads, str(target), "speculators", tmp_path / "export")
    tensors, ids = tensors_of(tmp_path / "export"), formats.load(heads).ids
    assert tensors["d2t"].dtype is torch.int64
    assert (tensors["d2t"] + torch.arange(60)).tolist() == ids.tolist() == tensors["t2d"].nonzero()[:, 0].tolist()
    heads = save_heads(tmp_path / "whole", target, "eagle3")
    export_heads(heads, str(target), "speculators", tmp_path / "export-whole")
    assert {"d2t", "t2d"} & tensors_of(tmp_path / "export-whole").keys() == set()
    assert config_of(tmp_path / "export-whole")["draft_vocab_size"] == VOCAB
