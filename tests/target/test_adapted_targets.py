"""Targets with an adapter of peft, and targets with quantised linears."""

import json
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from folders import write_model, write_tokenizer
from heads import heads_for
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import headstart
from headstart.drafters.parts.losses import Objective
from headstart.formats import describe, describe_target
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import digest, load_model
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.training.dataset import TextBatch
from headstart.training.features import Online
from headstart.training.frozen_target import FrozenTarget
from headstart.training.train import resolve, train

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

PROMPT = [5, 9, 31, 77, 12, 40]
LAYERS = ["q_proj", "down_proj"]
TEXTS = TextBatch(torch.tensor([[5, 9, 3, 77, 12, 40, 8, 21, 33, 60]]), torch.tensor([[False] * 3 + [True] * 7]), (0,))


def write_adapter(base: Path, folder: Path, targets: list[str] = LAYERS) -> Path:
    """A LoRA that changes the output, as peft writes it: without a tokenizer, and without the configuration of a model."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about heads that are tied
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory) -> Path:
    return write_adapter(model_folder, tmp_path_factory.mktemp("adapters") / "lora")


def greedy_tokens(model, tokens: int = 20) -> list[int]:
    """Greedy tokens by transformers alone."""
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(PROMPT) :].tolist()


def unmerged(base: Path, adapter: Path):
    """The reference: peft's model, with nothing merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def tokens_of_its_model(llm) -> list[int]:
    return greedy_tokens(llm.engine.target.model)


# -- adapters --


@pytest.mark.parametrize("drafter", [None, "lookup"])
def test_an_adapter_generates_what_peft_generates(adapter, model_folder, drafter):
    llm = headstart.load(adapter, drafter=drafter, device="cpu")
    answer = llm.generate(PROMPT, max_tokens=20, ignore_eos=True)[0]
    assert list(answer.token_ids) == greedy_tokens(unmerged(model_folder, adapter))
    assert list(answer.token_ids) != greedy_tokens(load_model(model_folder))


def test_an_adapter_becomes_part_of_ordinary_weights(adapter, model_folder):
    model = load_model(adapter)
    assert model.state_dict().keys() == load_model(model_folder).state_dict().keys()
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_an_adapter_has_another_digest_and_name_than_its_base_model(adapter, model_folder):
    assert digest(load_model(adapter)) != digest(load_model(model_folder))
    assert describe_target(load_model(adapter)).name == "lora"


def test_an_adapter_without_a_tokenizer_has_that_of_its_base_model(adapter, model_folder, tmp_path):
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(model_folder).get_vocab()
    own = write_adapter(model_folder, tmp_path / "own")
    write_tokenizer(own, vocab=300)
    assert len(load_tokenizer(own)) == 300


def test_heads_are_trained_for_an_adapter_and_belong_to_it(asked, tmp_path, adapter, model_folder):
    train(resolve(None, asked(method="eagle3", settings={"depth": 3}, target=str(adapter), steps=3)))
    assert describe(tmp_path / "heads").target.name == "lora"
    answers = [
        headstart.load(adapter, drafter=drafter, device="cpu").generate(PROMPT, max_tokens=16, ignore_eos=True)[0].token_ids
        for drafter in (str(tmp_path / "heads"), None)
    ]
    assert answers[0] == answers[1]
    with pytest.warns(UserWarning, match="trained for other weights"):
        headstart.load(model_folder, drafter=str(tmp_path / "heads"), device="cpu")


def test_an_adapted_model_can_be_trained_with_heads(asked, tmp_path, adapter):
    train(resolve(None, asked(target=str(adapter), joint={"mode": "lora", "base": "ce"}, steps=2)))
    assert not (tmp_path / "heads" / "model" / "adapter_config.json").exists()
    headstart.load(tmp_path / "heads" / "model", drafter=str(tmp_path / "heads"), device="cpu")


def test_an_adapter_of_a_tied_lm_head_leaves_the_embedding_as_it_is(model_folder, tmp_path):
    """Merging would change the embedding too."""
    folder = write_adapter(model_folder, tmp_path / "head", [*LAYERS, "lm_head"])
    answer = headstart.load(folder, drafter=None, device="cpu").generate(PROMPT, max_tokens=20, ignore_eos=True)[0]
    assert list(answer.token_ids) == greedy_tokens(unmerged(model_folder, folder))
    ids = torch.arange(9)
    assert torch.equal(load_model(folder).get_input_embeddings()(ids), load_model(model_folder).get_input_embeddings()(ids))


# -- faults of an adapter --


def changed(adapter: Path, folder: Path, **keys: object) -> Path:
    """A copy of the adapter with other configuration keys."""
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | keys
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    return folder


def test_an_adapter_whose_base_model_is_missing_is_refused_with_the_key_to_correct(adapter, tmp_path):
    folder = changed(adapter, tmp_path / "lost", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"is an adapter of .*gone, and model folder .* does not exist; .*base_model_name_or_path"):
        load_model(folder)
    with pytest.raises(ValueError, match="does not say which model it adapts"):
        load_model(changed(adapter, tmp_path / "silent", base_model_name_or_path=None))


def test_an_adapter_of_another_shape_is_refused_in_one_sentence(adapter, tmp_path):
    wide = changed(adapter, tmp_path / "wide", r=8)
    with pytest.raises(ValueError, match=r"the adapter in .*wide cannot be used with its model: .*size mismatch") as caught:
        load_model(wide)
    assert "\n" not in str(caught.value)


def test_an_incomplete_adapter_is_refused(adapter, tmp_path):
    """Its configuration names one more linear than it has weights for."""
    with pytest.raises(ValueError, match="cannot be used with its model: Found missing adapter keys"):
        load_model(changed(adapter, tmp_path / "half", target_modules=[*LAYERS, "k_proj"]))
    damaged = changed(adapter, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be used with its model"):
        load_model(damaged)
    (damaged / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        load_model(damaged)


def test_a_folder_with_a_model_and_an_adapter_is_refused(model_folder, adapter, tmp_path):
    """transformers would apply an adapter a second time to a model into which it was merged."""
    both = write_model(tmp_path / "both")
    (both / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(ValueError, match=r"holds a whole model \(model.safetensors\) and an adapter .*; move one of them away"):
        load_model(both)


def test_prefix_tuning_is_refused(model_folder, tmp_path):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match="is of type PREFIX_TUNING, which puts tokens of its own before a text"):
        load_model(tmp_path / "prefix")


def test_an_adapter_without_peft_is_refused_in_one_sentence(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"holds an adapter, which needs peft; pip install 'headstart\[train\]'"):
        load_model(adapter)


# -- quantised weights --

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao, which quantises the linears of these models, is not installed"
)


def quantised(folder: Path, bits: int = 8):
    """The model in `folder` with linears of this many bits, and an LM head of 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own, when it is imported
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

        model = load_model(folder, device="cpu")
        few = IntxWeightOnlyConfig(torch.int4, PerGroup(32)) if bits == 4 else Int8WeightOnlyConfig()
        quantize_(model.model, few)
        quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name == "lm_head")
    return model


@pytest.fixture(params=[8, 4], ids=["int8", "int4"])
def few_bits(request, model_folder):
    return quantised(model_folder, request.param)


@needs_torchao
def test_a_quantised_target_generates_what_the_model_generates_alone(few_bits, model_folder):
    alone = greedy_tokens(few_bits)
    assert alone != greedy_tokens(load_model(model_folder))
    for drafter in (None, "lookup"):
        llm = headstart.load(few_bits, tokenizer=load_tokenizer(model_folder), drafter=drafter)
        assert list(llm.generate(PROMPT, max_tokens=20, ignore_eos=True)[0].token_ids) == alone
        llm.engine.target.release()


@needs_torchao
def test_kernels_leave_quantised_linears_as_they_are(few_bits):
    before = [type(linear.weight) for linear in few_bits.modules() if isinstance(linear, torch.nn.Linear)]
    Target(few_bits).choose_kernels()
    assert [type(linear.weight) for linear in few_bits.modules() if isinstance(linear, torch.nn.Linear)] == before


@needs_torchao
def test_a_quantised_model_has_a_digest_of_its_own(few_bits, model_folder):
    assert digest(few_bits) == digest(few_bits) != digest(load_model(model_folder))


@needs_torchao
@pytest.mark.parametrize("kind", ["medusa", "hydra", "eagle", "eagle3.1, 40 tokens"])
def test_heads_are_trained_on_a_quantised_target_and_its_output_stays(few_bits, model_folder, kind):
    target = Target(few_bits)
    heads = heads_for(target, kind)
    target.release()
    loss, _ = FrozenTarget(heads, Objective(), Online(few_bits, heads.taps))(TEXTS)
    loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in heads.parameters())
    llm = headstart.load(few_bits, tokenizer=load_tokenizer(model_folder), drafter=heads)
    assert list(llm.generate(PROMPT, max_tokens=20, ignore_eos=True)[0].token_ids) == tokens_of_its_model(llm)


@needs_torchao
def test_the_weight_of_a_quantised_lm_head_gives_its_logits(few_bits):
    embed_head = EmbedHead(few_bits)
    states = torch.randn(3, embed_head.hidden)
    torch.testing.assert_close(
        torch.nn.functional.linear(states, embed_head.lm_head_weight), embed_head.logits(states), rtol=1e-4, atol=1e-4
    )


@needs_torchao
def test_a_folder_with_a_quantised_model_is_a_target_like_any_other(asked, tmp_path, model_folder):
    folder = write_quantised(model_folder, tmp_path / "int8")
    train(resolve(None, asked(method="eagle3", settings={"depth": 3}, target=str(folder), steps=3)))
    llm = headstart.load(folder, drafter=str(tmp_path / "heads"), device="cpu")
    assert type(llm.engine.target.model.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    assert list(llm.generate(PROMPT, max_tokens=20, ignore_eos=True)[0].token_ids) == tokens_of_its_model(llm)
    with pytest.raises(ValueError, match="a quantised target cannot learn with its heads; leave joint out"):
        train(resolve(None, asked(target=str(folder), out=tmp_path / "joint", joint={})))


@needs_torchao
def test_an_adapter_of_a_quantised_model_stays_beside_its_weights(tmp_path, model_folder):
    """Merged, the sum would be rounded to 8 bits."""
    base = write_quantised(model_folder, tmp_path / "int8")
    adapter = changed(write_adapter(model_folder, tmp_path / "plain"), tmp_path / "lora", base_model_name_or_path=str(base))
    answer = headstart.load(adapter, drafter="lookup", device="cpu").generate(PROMPT, max_tokens=20, ignore_eos=True)[0]
    assert list(answer.token_ids) == greedy_tokens(unmerged(base, adapter))


def write_quantised(folder: Path, to: Path) -> Path:
    """A quantised model as transformers writes it; the LM head is not quantised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(to)
    load_tokenizer(folder).save_pretrained(to)
    return to
