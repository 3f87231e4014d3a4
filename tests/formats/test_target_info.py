"""What heads record of their target, and the digest of its weights."""

import re

import pytest
import torch
from folders import write_model, write_tokenizer
from tiny import ARCHITECTURES, random_model

from headstart.formats import describe_target
from headstart.target.loading import digest, load_model
from headstart.target.target import Target


def test_target_info_describes_the_target(tmp_path):
    model = load_model(write_model(tmp_path / "talker"), device="cpu")
    target_info = describe_target(model, write_tokenizer(tmp_path / "talker"))
    assert (target_info.name, target_info.architecture, target_info.hidden, target_info.vocab, target_info.layers) == (
        "talker",
        "LlamaForCausalLM",
        32,
        320,
        2,
    )
    assert re.fullmatch("[0-9a-f]{16}", target_info.digest)
    assert target_info.tokenizer != describe_target(model, write_tokenizer(tmp_path, vocab=300)).tokenizer


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_the_digest_does_not_depend_on_the_kernels(name):
    model = random_model(ARCHITECTURES[name](), torch.float32)
    before = digest(model)
    Target(model).choose_kernels()
    assert digest(model) == before


def test_the_digest_does_not_depend_on_the_dtype_of_loading(tmp_path):
    random_model(ARCHITECTURES["llama"](), torch.bfloat16).save_pretrained(tmp_path)
    assert len({digest(load_model(tmp_path, dtype, "cpu")) for dtype in ("auto", torch.float32, torch.float64)}) == 1


@pytest.mark.parametrize("part", ["model.embed_tokens", "lm_head", "model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"])
def test_the_digest_distinguishes_a_fine_tune(part):
    model = random_model(ARCHITECTURES["llama"]())
    before = digest(model)
    with torch.no_grad():
        model.get_submodule(part).weight.mul_(1.02)
    assert digest(model) != before
