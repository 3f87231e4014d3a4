"""`inspect` and `import` on native heads, published heads, formats that are only detected, a model, and other folders."""

import re

import pytest
import torch
from command_line import answer, run
from folders import write_model
from published import HIDDEN, VOCAB, random, write
from safetensors.torch import load_file, save_file

from headstart import formats


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("target") / "talker")


@pytest.fixture
def theirs(tmp_path):
    torch.manual_seed(1)
    return write(tmp_path / "theirs", "medusa_lm_head.pt", heads(), medusa_num_heads=5, base_model_name_or_path="org/talker")


def heads(prefix=""):
    tensors = {}
    for i in range(3):
        tensors |= {f"{prefix}{i}.0.linear.weight": random(HIDDEN, HIDDEN), f"{prefix}{i}.0.linear.bias": random(HIDDEN)}
        tensors[f"{prefix}{i}.1.weight"] = random(VOCAB, HIDDEN)
    return tensors


# -- import --


def test_import_converts_heads_and_reports_what_it_found(target, theirs, tmp_path):
    summary = answer("import", theirs, "--target", target, "--out", tmp_path / "ours")
    assert (summary["found"], summary["method"], summary["heads"], summary["layers"]) == ("Medusa heads", "medusa", 3, 1)
    assert summary["notes"] == ["their config.json says medusa_num_heads = 5, their tensors 3; the tensors count"]
    loaded = formats.load(tmp_path / "ours")
    assert torch.equal(loaded.state_dict()["heads.2.projection.weight"], heads_of(theirs)["2.1.weight"])
    assert "org/talker" in (tmp_path / "ours" / "README.md").read_text()


def heads_of(folder):
    return torch.load(folder / "medusa_lm_head.pt", weights_only=True)


def test_import_prints_a_table(target, theirs, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no path is broken into lines
    printed = " ".join(run("import", theirs, "--target", target, "--out", tmp_path / "ours").stdout.split())
    assert "Medusa heads" in printed
    assert f"headstart generate --model {target} --drafter {tmp_path / 'ours'}" in printed


def test_imported_heads_draft(target, theirs, tmp_path):
    answer("import", theirs, "--target", target, "--out", tmp_path / "ours")
    asked = ("generate", "the cat", "--model", target, "--max-tokens", 12, "--ignore-eos", "--exact", "--drafter")
    assert answer(*asked, tmp_path / "ours")["token_ids"] == answer(*asked, "none")["token_ids"]


def test_heads_inside_a_model_need_no_target(tmp_path):
    folder = write_model(tmp_path / "whole")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | heads("medusa_head."), folder / "model.safetensors", metadata={"format": "pt"})
    summary = answer("import", folder, "--out", tmp_path / "ours")
    assert summary["target"] == str(folder)
    assert summary["notes"] == [f"these heads were trained together with the model in {folder}, which is their target"]
    inspected = answer("inspect", folder)
    assert (inspected["kind"], inspected["heads"], inspected["num_heads"]) == ("target", "Medusa heads inside a whole model", 3)


def test_a_target_of_another_name_is_noted(theirs, tmp_path):
    other = write_model(tmp_path / "other")
    notes = answer("import", theirs, "--target", other, "--out", tmp_path / "ours")["notes"]
    assert f"they name org/talker as their model; whether {other} is the same, `headstart inspect --probe` measures" in notes


def refusal(*arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr


def test_import_asks_for_the_target_and_suggests_one(theirs, tmp_path):
    assert "name it with --target, such as --target org/talker" in refusal("import", theirs, "--out", tmp_path / "ours")


def test_import_refuses_to_overwrite_a_model(target, theirs):
    assert "holds something else than heads" in refusal("import", theirs, "--target", target, "--out", target)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "does not exist"),
        ("ours", "already holds native heads"),
        ("target", "holds a model (LlamaForCausalLM), which cannot be imported"),
        ("dflash", "holds DFlash heads, which cannot be imported yet"),
        ("empty", "holds nothing that is known, which cannot be imported"),
    ],
)
def test_import_refuses_a_source_without_published_heads(target, theirs, tmp_path, source, words):
    answer("import", theirs, "--target", target, "--out", tmp_path / "ours")
    write(tmp_path / "dflash", "model.safetensors", {"hidden_norm.weight": random(HIDDEN)}, architectures=["DFlashDraftModel"])
    (tmp_path / "empty").mkdir()
    path = target if source == "target" else tmp_path / source
    assert words in refusal("import", path, "--target", target, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- inspect --


def test_inspect_describes_published_heads(theirs):
    summary = answer("inspect", theirs)
    assert {name: summary[name] for name in ("kind", "num_heads", "num_layers", "hidden", "vocab")} == {
        "kind": "medusa", "num_heads": 3, "num_layers": 1, "hidden": HIDDEN, "vocab": VOCAB,
    }  # fmt: skip
    assert summary["parameters"] == 3 * (HIDDEN * HIDDEN + HIDDEN + VOCAB * HIDDEN)
    printed = run("inspect", theirs).stdout
    assert "headstart import" in printed
    assert re.search(r"\nnote +their config\.json says", printed)


def test_inspect_describes_native_heads(target, theirs, tmp_path):
    answer("import", theirs, "--target", target, "--out", tmp_path / "ours")
    summary = answer("inspect", tmp_path / "ours")
    assert (summary["kind"], summary["method"], summary["num_heads"], summary["target"]) == ("native", "medusa", 3, "talker")
    assert summary["command"] == f"headstart generate --model talker --drafter {tmp_path / 'ours'}"
    assert "medusa heads of headstart" in run("inspect", tmp_path / "ours").stdout


def test_inspect_names_what_prevents_an_import(tmp_path):
    tensors = heads()
    del tensors["1.0.linear.bias"]
    summary = answer("inspect", write(tmp_path, "medusa_lm_head.safetensors", tensors))
    assert summary["problems"] == ["1.0.linear.bias is missing"]
    assert "command" not in summary


@pytest.mark.parametrize(
    ("kind", "names", "config"),
    [
        ("eagle", ("fc.weight", "layers.0.self_attn.q_proj.weight"), {"architectures": ["LlamaForCausalLM"]}),
        ("eagle3", ("fc.weight", "midlayer.hidden_norm.weight", "d2t"), {"architectures": ["LlamaForCausalLM"]}),
        ("eagle3", ("fc.weight", "layers.0.self_attn.q_proj.weight"), {"speculators_model_type": "eagle3"}),
        ("eagle3", ("layers.0.mlp.up_proj.weight",), {"architectures": ["LlamaForCausalLMEagle3"]}),
    ],
)
def test_incomplete_heads_are_still_detected(tmp_path, kind, names, config):
    write(tmp_path, "model.safetensors", {name: torch.zeros(2, 4) for name in names}, **config)
    detected = formats.detect(tmp_path)
    assert (detected.kind, detected.command) == (kind, None)
    assert detected.problems


@pytest.mark.parametrize(
    ("kind", "names", "config"),
    [
        ("eagle", ("fusion_fc.weight", "layers.0.self_attn.q_proj.weight"), {"speculators_model_type": "eagle"}),
        ("dflash", ("fc.weight", "hidden_norm.weight", "layers.0.mlp.up_proj.weight"), {"architectures": ["DFlashDraftModel"]}),
        ("dflash", ("fc.weight", "layers.0.mlp.up_proj.weight", "d2t"), {"speculators_model_type": "dflash"}),
        ("mtp", ("mtp.fc.weight", "model.layers.1.mlp.up_proj.weight"), {"model_type": "llama"}),
        ("mtp", ("model.layers.61.eh_proj.weight",), {}),
        ("redrafter", ("rnn_u.weight", "lm_head.0.linear.weight"), {"model_type": "recurrent_drafting_drafter"}),
    ],
)
def test_formats_that_cannot_be_imported_are_detected(tmp_path, kind, names, config):
    write(tmp_path, "model.safetensors", {name: torch.zeros(2) for name in names}, **config)
    detected = formats.detect(tmp_path)
    assert (detected.kind, detected.command) == (kind, None)
    assert detected.notes == ("they cannot be imported yet",)
    assert detected.is_target == (config.get("model_type") == "llama")


def test_a_model_is_detected_as_a_target(target):
    detected = formats.detect(target)
    assert (detected.kind, detected.is_target, detected.hidden) == ("target", True, HIDDEN)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_folder_is_one_sentence(theirs, name):
    (theirs / "medusa_lm_head.pt").unlink()
    (theirs / name).write_text("{ half")
    assert name in refusal("inspect", theirs)
