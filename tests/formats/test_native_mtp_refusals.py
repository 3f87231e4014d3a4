"""MTP modules that cannot be imported are refused with the reason, and wrong or missing declarations are named."""

import pytest
import torch
import transformers as hf
from modules import VOCAB
from published_modules import read, rewritten
from tiny import _COMMON, random_model

from headstart import formats
from headstart.engine.drafter_loading import make
from headstart.target.target import Target

BROKEN = {
    "a missing norm": (lambda t: t.pop("model.layers.3.hnorm.weight"), "model.layers.3.hnorm.weight is missing"),
    "a missing projection": (lambda t: t.pop("model.layers.3.eh_proj.weight"), "model.layers.3.eh_proj.weight is missing"),
    "a missing expert": (
        lambda t: t.pop("model.layers.3.mlp.experts.5.up_proj.weight"),
        "model.layers.3.mlp.experts.5.up_proj.weight is missing",
    ),
    "a tensor too many": (
        lambda t: t.update({"model.layers.3.mlp.experts.8.up_proj.weight": torch.zeros(32, 64)}),
        "a tensor that has no place in a module of this model's kind: model.layers.3.mlp.experts.8.up_proj.weight",
    ),
    "a transposed projection": (
        lambda t: t.update({"model.layers.3.eh_proj.weight": torch.zeros(128, 64)}),
        "model.layers.3.eh_proj.weight has the shape [128, 64] and should have [64, 128]",
    ),
    "a misshaped expert": (
        lambda t: t.update({"model.layers.3.mlp.experts.5.up_proj.weight": torch.zeros(64, 32)}),
        "model.layers.3.mlp.experts.5.up_proj.weight has the shape [64, 32] and should have [32, 64]",
    ),
    "a scale beside a weight": (
        lambda t: t.update({"model.layers.3.self_attn.o_proj.weight_scale_inv": torch.zeros(1, 1)}),
        "model.layers.3.self_attn.o_proj.weight_scale_inv shows that they are quantized",
    ),
    "integers": (
        lambda t: t.update({"model.layers.3.eh_proj.weight": torch.zeros(64, 128, dtype=torch.int8)}),
        "is of type torch.int8; quantized heads cannot be imported",
    ),
    "numbers of 8 bits": (
        lambda t: t.update({"model.layers.3.eh_proj.weight": torch.zeros(64, 128).to(torch.float8_e4m3fn)}),
        "is of type torch.float8_e4m3fn; quantized heads cannot be imported",
    ),
    "a gap": (
        lambda t: t.update({"model.layers.5.enorm.weight": torch.zeros(64)}),
        "they are numbered 3, 5, but the first should be 3 and none be left out",
    ),
    "a head of their own": (
        lambda t: t.update({"model.layers.3.shared_head.head.weight": torch.zeros(VOCAB, 64)}),
        "model.layers.3.shared_head.head.weight is not the same as the model's own lm_head.weight",
    ),
    "an embedding of another size": (
        lambda t: t.update({"model.layers.3.embed_tokens.weight": torch.zeros(8, 64)}),
        "model.layers.3.embed_tokens.weight has the shape [8, 64] and should have [320, 64]",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_errors_are_named(publish, tmp_path, what):
    published, (change, words) = publish("deepseek_v3"), BROKEN[what]
    tensors = dict(published.tensors)
    change(tensors)
    with pytest.raises(ValueError, match="cannot be imported") as error:
        read(published, rewritten(published, tmp_path, tensors))
    assert words in str(error.value)


def test_unknown_tensor_names_are_refused(publish, tmp_path):
    published = publish("qwen3")
    folder = rewritten(published, tmp_path, {"model.mtp_block.0.mlp.up_proj.weight": torch.zeros(96, 64)})
    with pytest.raises(ValueError, match=r"their names are not known here, such as model\.mtp_block\.0\.mlp\.up_proj\.weight"):
        read(published, folder)


def test_several_layers_after_one_projection_are_refused(publish, tmp_path):
    published = publish("qwen3")
    second = {
        name.replace("layers.0.", "layers.1."): tensor.clone() for name, tensor in published.tensors.items() if "layers.0." in name
    }
    with pytest.raises(ValueError, match=r"several layers after one projection \(mtp\.layers\.1\.\*\)"):
        read(published, rewritten(published, tmp_path, published.tensors | second))


def test_modules_of_different_kinds_are_refused(publish):
    published = publish("mimo", 4)
    config = hf.Qwen2Config(**{**published.model.config.to_dict(), "mtp_layer_types": ["full_attention", "sliding_attention"]})
    problems = [*formats.inside(published.folder).problems(config)]
    assert problems == [
        "they are of different kinds (full_attention, sliding_attention), but only modules of one kind are supported"
    ]


def test_a_norm_shared_by_all_modules_is_refused(publish):
    published = publish("mimo")
    config = hf.Qwen2Config(**{**published.model.config.to_dict(), "chain_hidden_post_norm": True})
    problems = [*formats.inside(published.folder).problems(config)]
    assert problems == ["their model's configuration has chain_hidden_post_norm, which is not supported"]


def test_a_wrong_count_in_the_configuration_is_noted(publish, tmp_path):
    published = publish("deepseek_v3", 2)
    folder = rewritten(published, tmp_path, published.tensors, num_nextn_predict_layers=1)
    assert formats.detect(folder).notes == (
        "their config.json says num_nextn_predict_layers = 1, their tensors 2; the tensors count",
    )


def test_a_model_without_its_declared_modules_names_where_to_get_them(publish, tmp_path):
    published = publish("deepseek_v3")
    published.reloaded().save_pretrained(tmp_path / "saved")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="transformers leaves them out when it saves a model") as error:
        make("mtp", Target(model))
    assert f"`headstart import ORIGINAL --target {tmp_path / 'saved'} --out FOLDER`" in str(error.value)
    assert "says num_nextn_predict_layers = 1" in formats.detect(tmp_path / "saved").notes[0]


def test_a_model_without_declared_modules_is_refused_as_such():
    target = Target(random_model(hf.LlamaConfig(**_COMMON)))
    with pytest.raises(ValueError, match="comes with no mtp heads, and heads fit one model only") as error:
        make("mtp", target)
    assert "config.json" not in str(error.value)
