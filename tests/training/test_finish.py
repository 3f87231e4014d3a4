"""`--finish`: the last checkpoint of a stopped run becomes heads, without further training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_runs import killed, weights
from typer.testing import CliRunner

from headstart.cli import app
from headstart.formats import describe, detect
from headstart.training.run_state import HOME
from headstart.training.train import resolve, train


def stored(out):
    """The weights of the drafter in the newest checkpoint, as accelerate stores them."""
    (step,) = (out / HOME).glob("step-*")
    tensors = load_file(step / "model.safetensors")
    return {name.removeprefix("drafter."): tensor for name, tensor in tensors.items() if name.startswith("drafter.")}


def test_the_last_checkpoint_of_a_killed_run_becomes_heads(asked, tmp_path):
    out = tmp_path / "heads"
    killed(resolve(None, asked()), "step:8")
    expected = stored(out)
    result = CliRunner().invoke(app, ["train", "--finish", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert {"steps": 6, "steps_planned": 9}.items() <= json.loads(result.stdout).items()
    assert detect(out).kind == "native"
    actual = weights(out)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor.to(actual[name].dtype)) for name, tensor in expected.items())
    assert not (out / HOME).exists()


def test_held_out_texts_are_evaluated_when_a_run_is_finished(asked, tmp_path):
    config = resolve(None, asked(held_out=0.2))
    killed(config, "step:5")
    record = train(config, finish=True)
    assert record["held_out_tau"] >= 1
    assert describe(tmp_path / "heads").training["steps"] == 3


def test_a_run_that_ends_as_planned_records_no_planned_steps(asked):
    assert "steps_planned" not in train(resolve(None, asked(steps=2)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"finish": True}, "holds no checkpoint, so there is no run to finish"),
        ({"finish": True, "resume": True}, "leave one of them out"),
    ],
)
def test_a_run_that_cannot_be_finished_is_one_sentence(asked, settings, words):
    with pytest.raises(ValueError, match=words):
        train(resolve(None, asked()), **settings)


@pytest.mark.parametrize("command", ["train", "pretrain"])
@pytest.mark.parametrize(
    ("options", "words"), [((), "but no folder is named"), (("--out", "nowhere"), "nowhere holds no config.yaml of one")]
)
def test_a_run_that_was_never_started_cannot_be_finished(tmp_path, monkeypatch, command, options, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [command, "--finish", *options])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []
