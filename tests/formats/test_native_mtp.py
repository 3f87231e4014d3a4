"""MTP modules inside models: read under every published name, their logits equal those of transformers' own modules."""

import shutil

import pytest
import torch
import transformers as hf
from command_line import answer
from published_modules import PROMPT, decoded, kept_by_transformers, needs_modules, read, rewritten
from safetensors.torch import load_file
from tiny import _COMMON, REFUSED, random_model
from transformers.cache_utils import MtpCache

import headstart
from headstart import formats
from headstart.drafters.lookup import Lookup
from headstart.drafters.mtp import Mtp
from headstart.drafters.parts.decoder import block_of, decoder
from headstart.drafters.parts.losses import Batch
from headstart.speculation.planner import Chain
from headstart.target.embed_head import EmbedHead
from headstart.target.hidden_states import TAKES_A_LIST
from headstart.target.target import Target

KINDS = [("deepseek_v3", 1), ("deepseek_v3", 2), ("glm4_moe", 2), ("mellum", 1), ("qwen3", 1), ("mimo", 1), ("mimo", 4)]


def drafter_of(model):
    """The drafter of the modules in a model's folder."""
    return formats.inside(model.name_or_path).read(formats.describe_target(model), model.config).bind(EmbedHead(model))


# -- the same logits --


def logits_of(published, drafter_from):
    """Logits by depth after the root of one text, [modules, vocab]: transformers', ours, and our draft depth."""
    model, length = published.reloaded(), len(PROMPT)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states[-1]
        cache = MtpCache(config=published.model.config.get_mtp_config())
        drafted, expected, _ = published.oracle(tokens[:, 1:], states[:, :-1], None, torch.arange(1, length)[None], cache)
        text_and_drafts = torch.cat([tokens, drafted], 1)
        features = torch.nn.functional.pad(states, (0, 0, 0, published.count))
        batch = Batch(text_and_drafts, torch.ones_like(text_and_drafts, dtype=torch.bool), features, features)
        actual = [output.output_head(output.states[0, length - 2]) for output in drafter_from(model).states(batch)]
    return expected[0], torch.stack(actual[: published.count]), len(actual)


@needs_modules
@pytest.mark.parametrize(("family", "modules"), KINDS)
def test_logits_equal_those_of_transformers_modules(publish, family, modules):
    expected, actual, depth = logits_of(publish(family, modules), drafter_of)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert depth == max(3, modules)  # beyond the last module, it is used again


@needs_modules
def test_swapped_norms_are_not_refused_but_change_the_logits(publish):
    """Both norms are vectors of one width, so no check notices; the comparison of logits does."""
    published = publish("deepseek_v3")

    def swapped(model):
        drafter = drafter_of(model)
        stage = drafter.stages[0]
        stage.enorm, stage.hnorm = stage.hnorm, stage.enorm
        return drafter

    expected, actual, _ = logits_of(published, swapped)
    assert (expected - actual).abs().max() > 0.01


@needs_modules
@pytest.mark.parametrize(("family", "modules"), [("deepseek_v3", 1), ("deepseek_v3", 2), ("glm4_moe", 2), ("mellum", 1)])
def test_as_many_drafts_are_accepted_in_every_round_as_by_transformers(publish, family, modules, monkeypatch):
    """`generate(use_mtp=True)` reads the same folder, accepts the same number of drafts per round, and generates the same text."""
    model = publish(family, modules).reloaded()
    plain = model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0].tolist()
    theirs, kept = kept_by_transformers(model, monkeypatch)
    text, rounds = decoded(Target(model), Chain(modules))
    assert PROMPT + text == plain == theirs
    assert rounds[: len(kept)] == kept
    assert sum(kept) > 0


@pytest.mark.parametrize(("family", "modules"), [("deepseek_v3", 2), ("qwen3", 1), ("mimo", 4)])
def test_trees_of_drafts_leave_the_text_unchanged(publish, family, modules):
    model = publish(family, modules).reloaded()
    plain = model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0].tolist()
    text, rounds = decoded(Target(model))
    assert PROMPT + text == plain
    assert sum(rounds) > 0


# -- layouts --


def test_fused_experts_are_read_like_separate_ones(publish, tmp_path):
    published = publish("deepseek_v3")
    shutil.copytree(published.folder, tmp_path / "fused")
    state = published.oracle.layers[0].mtp_block.state_dict()
    fused = {name: tensor for name, tensor in published.tensors.items() if ".experts." not in name}
    fused |= {f"model.layers.3.{name}": tensor for name, tensor in state.items() if ".experts." in name}
    rewritten(published, tmp_path / "fused", fused)
    model = published.reloaded()
    actual = formats.inside(tmp_path / "fused").read(formats.describe_target(model), model.config).state_dict()
    for name, tensor in drafter_of(model).state_dict().items():
        assert torch.equal(actual[name], tensor), name


def test_copies_of_the_embedding_and_the_lm_head_are_compared_and_left_out(publish, tmp_path):
    published = publish("deepseek_v3")
    weights = published.model.state_dict()
    copies = {
        "model.layers.3.embed_tokens.weight": weights["model.embed_tokens.weight"],
        "model.layers.3.shared_head.head.weight": weights["lm_head.weight"],
    }
    folder = rewritten(published, tmp_path, published.tensors | copies)
    assert read(published, folder).config.num_modules == 1
    assert formats.detect(folder).parameters == formats.detect(published.folder).parameters


# -- modules in use --


def test_load_finds_the_modules_of_a_model(publish):
    published = publish("deepseek_v3")
    chosen = headstart.load(published.folder, exact=False).engine.drafter
    assert isinstance(chosen, Mtp) or [part.name for part in chosen.parts] == ["lookup", "mtp"]
    llm = headstart.load(published.folder, drafter="mtp", planner="chain:3", exact=False)
    assert isinstance(llm.engine.drafter, Mtp)
    plain = headstart.load(published.folder, drafter=None, exact=False).generate([PROMPT], max_tokens=20, ignore_eos=True)
    drafted = llm.generate([PROMPT], max_tokens=20, ignore_eos=True)
    assert drafted[0].token_ids == plain[0].token_ids
    assert llm.stats.drafts > 0


def test_auto_falls_back_to_lookup_where_modules_cannot_be_used(publish, tmp_path):
    published = publish("deepseek_v3")
    folder = rewritten(published, tmp_path, {**published.tensors, "model.layers.3.enorm.weight_scale": torch.ones(1)})
    with pytest.warns(UserWarning, match="quantized.*drafting without them"):
        llm = headstart.load(folder, exact=False)
    assert isinstance(llm.engine.drafter, Lookup)


def test_inspect_reports_the_modules_of_a_model(publish):
    folder = publish("deepseek_v3", 2).folder
    summary = answer("inspect", folder)
    assert summary["heads"] == "MTP modules inside a whole model, named as DeepSeek-V3 and GLM name them"
    assert (summary["kind"], summary["num_modules"], summary["problems"]) == ("target", 2, [])
    assert summary["draft"] == f"headstart generate --model {folder} --drafter mtp"


def test_inspect_names_what_is_wrong_with_modules(publish, tmp_path):
    published = publish("deepseek_v3")
    tensors = {name: tensor for name, tensor in published.tensors.items() if "hnorm" not in name}
    summary = answer("inspect", rewritten(published, tmp_path, tensors))
    assert summary["problems"] == ["model.layers.3.hnorm.weight is missing"]
    assert "draft" not in summary


def test_import_makes_heads_of_modules(publish, tmp_path):
    published = publish("mimo")
    summary = answer("import", published.folder, "--out", tmp_path / "heads")
    assert (summary["method"], summary["modules"], summary["target"]) == ("mtp", 1, str(published.folder))
    heads = formats.load(tmp_path / "heads")
    assert torch.equal(heads.state_dict()["stages.0.eh_proj.weight"], published.tensors["model.mtp_layers.0.input_proj.weight"])
    inspected = answer("inspect", tmp_path / "heads")
    assert (inspected["method"], inspected["num_modules"]) == ("mtp", 1)
    generated = answer(
        "generate", "the cat", "--model", published.folder, "--drafter", tmp_path / "heads", "--max-tokens", 8, "--ignore-eos"
    )
    plain = answer("generate", "the cat", "--model", published.folder, "--drafter", "none", "--max-tokens", 8, "--ignore-eos")
    assert generated["token_ids"] == plain["token_ids"]


def test_modules_are_imported_for_a_model_that_lacks_them(publish, tmp_path):
    published = publish("deepseek_v3")
    shutil.copytree(published.folder, tmp_path / "saved")
    published.reloaded().save_pretrained(tmp_path / "saved")
    assert not any(name.startswith("model.layers.3.") for name in load_file(tmp_path / "saved" / "model.safetensors"))
    summary = answer("import", published.folder, "--target", tmp_path / "saved", "--out", tmp_path / "heads")
    assert summary["use"] == f"headstart generate --model {tmp_path / 'saved'} --drafter {tmp_path / 'heads'}"


# -- families --


def test_a_module_has_the_kind_of_the_models_last_layer_even_where_the_first_differs(publish):
    config = publish("deepseek_v3").model.config
    assert config.first_k_dense_replace == 1
    assert "layers.0.mlp.experts.gate_up_proj" in decoder(block_of(config), 64).state_dict()


_LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16}
NO_TARGETS = {
    "InklingForCausalLM": (
        lambda: hf.AutoConfig.for_model(
            "inkling_text", **_COMMON, **_EXPERTS, n_routed_experts=4, swa_num_attention_heads=4, swa_num_key_value_heads=2,
            swa_head_dim=16,
        ),
        "passes position_bias to its attention",
    ),
    "BailingHybridForCausalLM": (
        lambda: hf.AutoConfig.for_model(
            "bailing_hybrid", **_COMMON | {"num_key_value_heads": 4, "pad_token_id": 0, "eos_token_id": None}, **_EXPERTS,
            **_LATENT, num_local_experts=4, n_group=1, topk_group=1, layer_group_size=2,
        ),
        "keeps a state of its own in 2 of 3 layers",
    ),
    "Qwen3NextForCausalLM": REFUSED["Qwen3NextForCausalLM"],
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TARGETS)
def test_a_model_with_modules_that_cannot_be_a_target_is_refused_by_name(name):
    if name == "BailingHybridForCausalLM" and not TAKES_A_LIST:
        pytest.skip("transformers before 5.23 does not know this model")
    config, words = NO_TARGETS[name]
    with pytest.raises(ValueError, match=f"{name}.*cannot be a target: .*{words}"):
        Target(random_model(config()))
