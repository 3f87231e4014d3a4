"""The configuration of runs: keys of each kind, options merged into a file, and `headstart pretrain`."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from folders import TEXT, write_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner, Result

from headstart.cli import app
from headstart.training.config_file import resolve
from headstart.training.lr_schedule import lr_schedule
from headstart.training.run_config import WATCHING, PretrainConfig, RunConfig, TrainConfig

BASE = {"data": ["a.jsonl"], "out": "o", "model": "config.json", "steps": 3}


def pretraining(path: Path | None = None, **options: object) -> PretrainConfig:
    return resolve(path, options if path else BASE | options, kind=PretrainConfig)


# -- configurations --


def test_each_kind_of_run_has_its_own_keys_and_the_shared_ones():
    shared = RunConfig.model_fields.keys()
    assert shared == TrainConfig.model_fields.keys() & PretrainConfig.model_fields.keys() - {"dtype", "start"}
    assert TrainConfig.model_fields.keys() | PretrainConfig.model_fields.keys() >= WATCHING
    with pytest.raises(ValueError, match="a training run has no key loss; there are model, start, tokenizer, heads"):
        pretraining(loss={"hard": 1})
    with pytest.raises(ValueError, match="has no key optimizer, times; there are method, settings, start, target"):
        resolve(None, {"times": {}, "optimizer": "muon"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": None}, "model or start is missing; give exactly one of model, start"),
        ({"start": "talk"}, r"model or start is given 2 times \(model=config.json, start=talk\)"),
        ({"steps": None}, "the budget is missing; give exactly one of tokens, epochs, steps"),
        ({"epochs": 1}, r"the budget is given 2 times \(epochs=1, steps=3\)"),
        ({"heads": {"mtp": 3}}, "heads.mtp is 3: Input should be a valid dictionary"),
        ({"heads": ["mtp"]}, r"heads is \['mtp'\]"),
        ({"weight": 0.1}, "weight is about heads that are trained with the trunk, and there are none; give heads"),
        ({"heads": {"mtp": {}}, "weight_until": 0.5}, "weight_until says when weight_end replaces weight, and there is none"),
        ({"heads": {"mtp": {}}, "weight_until": 0}, "weight_until is 0: Input should be greater than 0"),
        ({"heads": {"mtp": {}}, "decay": 2}, "decay is 2: Input should be less than or equal to 1"),
        ({"times": {"a.jsonl": 0}}, "times.a.jsonl is 0: Input should be greater than 0"),
        ({"floor": 1}, "floor is 1: Input should be less than 1"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd': Input should be 'adamw' or 'muon'"),
    ],
)  # fmt: skip
def test_a_bad_key_is_one_sentence(options, words):
    keys = {name: value for name, value in (BASE | options).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        resolve(None, keys, kind=PretrainConfig)


def test_options_are_merged_into_the_file_and_replace_its_alternatives(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "{data: [a.jsonl, b.npy], out: o, model: c, tokens: 9, heads: {mtp: , mtp-parallel: {num_heads: 2}}, times: {b.npy: 2}}"
    )
    config = pretraining(file, start="talk", steps=4, heads={"mtp": {"depth": 5}}, times={"a.jsonl": 0.5})
    assert (config.model, config.start, config.tokens, config.steps) == (None, "talk", None, 4)
    assert config.heads == {"mtp": {"depth": 5}, "mtp-parallel": {"num_heads": 2}}
    assert config.times == {"a.jsonl": 0.5, "b.npy": 2}
    assert pretraining(file).heads["mtp"] == {}


def test_the_written_file_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").mkdir()
    config = pretraining(
        tokenizer="words", times={"a.jsonl": 2}, held_out="b.txt", heads={"mtp": {"from": "first"}}, weight_end=0.1
    )
    config.write(tmp_path)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (written["model"], written["tokenizer"]) == (str(tmp_path / "config.json"), str(tmp_path / "words"))
    assert written["held_out"] == str(tmp_path / "b.txt")
    assert written["heads"] == {"mtp": {"from": str(tmp_path / "first")}}
    assert written["times"] == {str(tmp_path / "a.jsonl"): 2}
    assert pretraining(tmp_path / "config.yaml").as_dict() == config.as_dict() == written


def test_values_that_are_no_paths_are_not_changed():
    written = pretraining(data=["there/a.jsonl"], times={"a.jsonl": 2}, tokenizer="someone/words").as_dict()
    assert (written["times"], written["tokenizer"]) == ({"a.jsonl": 2}, "someone/words")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_falls_to_the_floor(schedule):
    def rates(floor: float) -> list[float]:
        return [lr_schedule(step, 20, 0.2, schedule, floor) for step in range(21)]

    assert rates(0.25) == pytest.approx([r if step < 4 else 0.25 + 0.75 * r for step, r in enumerate(rates(0.0))])
    assert rates(0.0) == [lr_schedule(step, 20, 0.2, schedule) for step in range(21)]


# -- the command --


@pytest.fixture
def asked(monkeypatch):
    """The calls of `headstart.training.pretrain` by the command; the function does nothing."""
    calls: list[tuple[PretrainConfig, bool]] = []

    def pretrain(config: PretrainConfig, *, resume: bool = False, finish: bool = False) -> dict:
        assert not finish
        calls.append((config, resume))
        return {"steps": 3}

    monkeypatch.setattr("headstart.training.pretrain.pretrain", pretrain)
    return calls


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["pretrain", *map(str, arguments)])


OPTIONS = ("--model", "c.json", "--data", "a.jsonl", "--data", "b.npy", "--out", "o", "--steps", 3)


def test_options_become_a_configuration(asked):
    result = run(
        *OPTIONS, "--heads", "mtp", "--heads", "mtp-parallel={num_heads: 2}", "--weight-end", 0.1, "--times", "b.npy=2", "--floor",
        0.1, "--optimizer", "muon", "--held-out", "c.txt", "--json",
    )  # fmt: skip
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"steps": 3})
    config, resume = asked[0]
    assert config.heads == {"mtp": {}, "mtp-parallel": {"num_heads": 2}}
    assert (config.data, config.times) == ((Path("a.jsonl"), Path("b.npy")), {"b.npy": 2})
    assert (config.weight, config.weight_end, config.floor, config.optimizer) == (0.3, 0.1, 0.1, "muon")
    assert (config.held_out, resume) == (Path("c.txt"), False)


def test_omitted_options_have_their_defaults(asked):
    assert run(*OPTIONS).stdout == ""
    assert asked[0][0] == PretrainConfig(model="c.json", data=("a.jsonl", "b.npy"), out="o", steps=3)


def test_a_run_resumes_from_its_config_file(asked, tmp_path):
    pretraining(heads={"mtp": {}}).write(tmp_path)
    assert run("--config", tmp_path / "config.yaml", "--resume", "--log-every", 5).exit_code == 0
    config, resume = asked[0]
    assert (config.heads, config.log_every, resume) == ({"mtp": {}}, 5, True)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--start", "talk"), "model or start is given 2 times (model=c.json, start=talk)"),
        (("--tokens", 5), "the budget is given 2 times (tokens=5, steps=3)"),
        (("--heads", "mtp=3"), "heads.mtp is 3"),
        (("--heads", "mtp={"), "--heads mtp is '{', which cannot be read"),
        (("--times", "b.npy"), "--times is 'b.npy'; write NAME=VALUE"),
        (("--weight", "0.1"), "weight is about heads that are trained with the trunk, and there are none"),
    ],
)
def test_a_bad_option_is_one_sentence(asked, more, words):
    result = run(*OPTIONS, *more)
    assert (result.exit_code, result.stdout, asked) == (2, "", [])
    assert words in result.stderr.splitlines()[-1]


def test_a_model_and_its_heads_are_made_from_a_configuration_and_texts(tmp_path):
    write_tokenizer(tmp_path / "model")
    LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT * 4))
    options = ("--model", tmp_path / "model", "--data", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--steps", 2)
    try:
        result = run(*options, "--heads", "mtp={depth: 2}", "--length", 16, "--device", "cpu", "--threads", 1, "--json")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config.vocab_size == 320
    assert (tmp_path / "out" / "mtp" / "config.json").is_file()
