"""MTP modules stitched into a copy of their target's checkpoint: read by transformers, by the importer, and refused."""

import json
import os

import pytest
import torch
import transformers as hf
from command_line import answer
from exports import assert_same_heads, exported, mtp, refusal, subject_of
from folders import write_model
from published_modules import PROMPT, decoded, kept_by_transformers, needs_modules
from safetensors.torch import load_file

from headstart import formats
from headstart.formats.weights import safe_in
from headstart.speculation.planner import Chain
from headstart.target.target import Target

FAMILIES = ["deepseek_v3", "glm4_moe", "mellum"]


@pytest.fixture(scope="module")
def target(publish, tmp_path_factory):
    """Folders of targets without modules, by family. Tests must not change them."""
    folders = {}

    def one(family, dtype=torch.float32):
        if (family, dtype) not in folders:
            folder = tmp_path_factory.mktemp(family) / "target"
            model = publish(family).reloaded().to(dtype)
            model.save_pretrained(folder)
            hf.AutoTokenizer.from_pretrained(publish(family).folder).save_pretrained(folder)
            folders[family, dtype] = folder
        return folders[family, dtype]

    return one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_stitched_modules_are_imported_bit_for_bit(target, tmp_path, family, dtype):
    subject = subject_of(target(family, dtype), mtp)
    placed = exported(subject, "hf", tmp_path / "stitched")
    assert_same_heads(subject, tmp_path / "stitched", None, tmp_path / "heads")
    assert {entry.ours for entry in placed} == subject.heads.state_dict().keys()
    stored = safe_in(tmp_path / "stitched")
    assert all(stored.shapes[entry.theirs] == entry.shape for entry in placed)


def test_two_modules_are_stitched_as_two_layers_behind_the_last(target, tmp_path):
    subject = subject_of(target("deepseek_v3"), mtp, num_modules=2)
    placed = exported(subject, "hf", tmp_path / "stitched")
    assert {entry.theirs.split(".")[2] for entry in placed} == {"3", "4"}
    assert json.loads((tmp_path / "stitched" / "config.json").read_text())["num_nextn_predict_layers"] == 2
    assert_same_heads(subject, tmp_path / "stitched", None, tmp_path / "heads")


def test_the_files_of_the_target_stay_as_they_are(target, tmp_path):
    source = target("glm4_moe")
    exported(subject_of(source, mtp), "hf", tmp_path / "stitched")
    assert os.path.samefile(tmp_path / "stitched" / "model-target.safetensors", source / "model.safetensors")
    own, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "stitched"))
    assert {key for key in new if new[key] != own.get(key)} <= {"num_nextn_predict_layers"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "stitched" / name).read_bytes() == (source / name).read_bytes()


def test_the_index_names_every_tensor_and_their_size(target, tmp_path):
    exported(subject_of(target("glm4_moe"), mtp), "hf", tmp_path / "stitched")
    index = json.loads((tmp_path / "stitched" / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in {*index["weight_map"].values()}:
        tensors |= load_file(tmp_path / "stitched" / file)
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_modules_that_the_target_has_are_replaced(publish, tmp_path):
    for modules, name in ((1, "one"), (2, "in a shard of their own")):
        subject = subject_of(publish("deepseek_v3", modules).folder, mtp, num_modules=1)
        exported(subject, "hf", tmp_path / name)
        assert_same_heads(subject, tmp_path / name, None, tmp_path / f"{name} heads")


def test_the_stitched_model_generates_the_same_text_with_its_modules(target, tmp_path):
    exported(subject_of(target("glm4_moe"), mtp), "hf", tmp_path / "stitched")
    options = ("--max-tokens", 8, "--ignore-eos", "--no-exact")
    drafted = answer("generate", "the cat", "--model", tmp_path / "stitched", "--drafter", "mtp", *options)
    plain = answer("generate", "the cat", "--model", target("glm4_moe"), "--drafter", "none", *options)
    assert drafted["token_ids"] == plain["token_ids"]


@needs_modules
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_accepts_as_many_drafts_of_stitched_modules_in_every_round(publish, tmp_path, monkeypatch, family):
    """`generate(use_mtp=True)` reads the stitched folder; the modules are the published ones, of which some drafts are accepted."""
    published = publish(family)
    subject = subject_of(published.folder, mtp)
    subject.heads.load_state_dict(formats.inside(published.folder).read(subject.target_info, subject.model.config).state_dict())
    exported(subject, "hf", tmp_path / "stitched")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "stitched", experts_implementation="eager").eval()
    model._keys_to_ignore_on_load_unexpected = [published.pattern]
    theirs, kept = kept_by_transformers(model, monkeypatch)
    text, rounds = decoded(Target(model), Chain(1))
    assert PROMPT + text == theirs
    assert rounds[: len(kept)] == kept
    assert sum(kept) > 0


# -- refusals --


def test_a_target_whose_family_has_no_modules_is_refused(tmp_path):
    message = refusal(subject_of(write_model(tmp_path / "llama"), mtp), "hf")
    assert "'llama' target" in message
    assert "deepseek_v3, glm4_moe, mellum, mimo" in message


def test_more_modules_than_the_family_has_are_refused(target):
    assert "at most 1; train them with --set num_modules=1" in refusal(subject_of(target("mellum"), mtp, num_modules=2), "hf")


def test_the_other_order_of_state_and_embedding_is_refused(target):
    assert "--set hidden_first=false" in refusal(subject_of(target("glm4_moe"), mtp, hidden_first=True), "hf")


def test_a_layer_that_readers_would_not_build_is_refused(target):
    block = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 1}
    assert "like the target's last layer; train modules without --set block" in refusal(
        subject_of(target("glm4_moe"), mtp, block=block), "hf"
    )
