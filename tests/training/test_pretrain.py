"""Pretraining from end to end: an ordinary model folder with heads beside it, the same after interruptions."""

import json
from pathlib import Path

import pytest
import torch
from folders import write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import headstart
from headstart import formats
from headstart.training.loop import Loop
from headstart.training.pretrain import pretrain
from headstart.training.run_config import PretrainConfig, TrainConfig
from headstart.training.train import train

HEADS = {"mtp": {"depth": 2}, "mtp-parallel": {"num_heads": 2}}


@pytest.fixture
def asked(model_folder, data, tmp_path):
    """A function that returns the configuration of a short run with some keys changed."""

    def ask(**keys: object) -> PretrainConfig:
        base = {"model": model_folder, "data": [data], "out": tmp_path / "run", "steps": 6, "rows": 4, "length": 24}
        base |= {"heads": HEADS, "device": "cpu", "threads": 1, "held_out": 0.1, "save_every": 2, "log_every": 1}
        return PretrainConfig(**{name: value for name, value in (base | keys).items() if value is not None})

    return ask


def weights(out: Path) -> dict[str, torch.Tensor]:
    parts = ("model", *HEADS)
    return {f"{part}/{name}": w for part in parts for name, w in load_file(out / part / "model.safetensors").items()}


def stop_after(monkeypatch, step):
    """Interrupt the run after a step, as Ctrl-C does."""
    is_interrupted = Loop._is_interrupted
    monkeypatch.setattr(Loop, "_is_interrupted", lambda self, interrupt: self.state.step == step or is_interrupted(self, interrupt))


def test_the_trunk_is_saved_as_a_model_folder_and_its_heads_draft_for_it(asked, tmp_path):
    record = pretrain(asked())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.model_type == "llama"
    assert record["steps"] == 6
    assert record["held_out_loss"] > 0
    plain = headstart.load(tmp_path / "run" / "model", drafter=None, device="cpu")
    for name in HEADS:
        llm = headstart.load(tmp_path / "run" / "model", drafter=str(tmp_path / "run" / name), device="cpu")
        settings = {"max_tokens": 12, "temperature": 0.8, "seed": 3}
        assert llm.generate("the cat", **settings)[0].token_ids == plain.generate("the cat", **settings)[0].token_ids
        assert llm.stats.drafts > 0
    assert formats.describe(tmp_path / "run" / "mtp").target.name == "run"
    written = formats.describe(tmp_path / "run" / "mtp").training
    assert written["with_trunk"]
    assert written["held_out_top1"] == record["held_out_mtp_top1"]
    assert not [key for key in written if "parallel" in key]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_resumes_to_the_same_bits(asked, tmp_path, monkeypatch, optimizer):
    pretrain(asked(out=tmp_path / "uninterrupted", optimizer=optimizer))
    config = asked(optimizer=optimizer)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    pretrain(config, resume=True)
    one, other = weights(tmp_path / "uninterrupted"), weights(tmp_path / "run")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_warm_start_takes_trunk_and_heads_of_an_earlier_run(asked, tmp_path):
    pretrain(asked())
    first = tmp_path / "run"
    heads = {"mtp": {"from": str(first / "mtp"), "depth": 3}}
    pretrain(asked(model=None, start=str(first / "model"), out=tmp_path / "second", heads=heads, learning_rate=1e-12, held_out=0.0))
    assert formats.describe(tmp_path / "second" / "mtp").settings["depth"] == 3
    before, after = (load_file(folder / "mtp" / "model.safetensors") for folder in (first, tmp_path / "second"))
    for name, weight in before.items():
        torch.testing.assert_close(weight, after[name])


def test_without_heads_only_the_trunk_is_trained(asked, tmp_path):
    pretrain(asked(heads={}))
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["model"]
    assert "mtp_tau" not in json.loads((tmp_path / "run" / "training.json").read_text())


def test_the_loss_falls(asked, tmp_path):
    pretrain(asked(steps=30, learning_rate=1e-2, optimizer="muon"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert losses[-1] < losses[0] - 1


def test_the_weight_of_the_heads_changes_at_weight_until(asked):
    config = asked(weight=0.3, weight_end=0.1, weight_until=0.5)
    assert [config.heads_weight(progress) for progress in (0.0, 0.49, 0.5, 1.0)] == [0.3, 0.3, 0.1, 0.1]


def test_an_impossible_run_is_refused_in_one_sentence(asked, tmp_path, model_folder, data):
    for keys, words in (
        ({"heads": {"medusa": {}}}, "medusa heads are trained on an existing trunk"),
        ({"heads": {"mtp": {"dept": 3}}}, "heads mtp has no key dept"),
        ({"model": data, "tokenizer": str(model_folder)}, "is no configuration of a causal language model"),
        ({"length": 9999}, "length is 9999, and the target takes 256"),
        (
            {"model": tmp_path / "none.json", "tokenizer": str(model_folder)},
            "there is no model configuration .*none.json'; name a config.json",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            pretrain(asked(**keys))


def test_parallel_heads_need_a_trunk_below_its_last_layer(asked, tmp_path):
    shallow = write_model(tmp_path / "shallow", layers=1)
    with pytest.raises(ValueError, match="read layer -2, and the target has 1; choose another method"):
        pretrain(asked(model=shallow))


def test_a_trained_model_is_not_overwritten(asked, tmp_path):
    pretrain(asked())
    with pytest.raises(ValueError, match="holds a trained model already"):
        pretrain(asked())


def test_heads_trained_with_the_trunk_are_a_warm_start_for_training_alone(asked, tmp_path, data):
    pretrain(asked())
    keys = {
        "target": str(tmp_path / "run" / "model"),
        "data": [data],
        "steps": 2,
        "rows": 4,
        "learning_rate": 1e-12,
        "held_out": 0.0,
    }
    keys |= {"method": "mtp", "start": tmp_path / "run" / "mtp", "out": tmp_path / "more", "device": "cpu", "threads": 1}
    train(TrainConfig(**keys, settings={"depth": 4}))
    assert formats.describe(tmp_path / "more").settings["depth"] == 4
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run" / "mtp", tmp_path / "more"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(weight, after[name])
    for settings, method, words in (
        ({"num_modules": 2}, "mtp", "num_modules 1 is now 2"),
        ({}, "mtp-parallel", "holds mtp heads, and mtp-parallel heads were asked"),
    ):
        with pytest.raises(ValueError, match=words):
            train(TrainConfig(**keys | {"settings": settings, "method": method, "out": tmp_path / "other"}))


def test_a_stopped_run_can_be_finished_at_its_checkpoint(asked, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            pretrain(asked())
    record = pretrain(asked(), finish=True)
    assert {"steps": 3, "steps_planned": 6}.items() <= record.items()
    pretrain(asked(out=tmp_path / "short", steps=3, schedule="constant", warmup=0.0))
    one, other = weights(tmp_path / "run"), weights(tmp_path / "short")
    assert one.keys() == other.keys()
    assert not (tmp_path / "run" / "checkpoint").exists()
