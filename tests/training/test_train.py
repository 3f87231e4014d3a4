"""Training of heads: batching does not change a run, a killed run resumes to the same bits, and errors are one sentence."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from training_runs import assert_same_bits, check_resumed, dataset_of, killed, log
from typer.testing import CliRunner

from headstart import formats
from headstart.cli import app
from headstart.drafters.parts.losses import Objective
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model
from headstart.training.features import Online
from headstart.training.frozen_target import FrozenTarget
from headstart.training.loop import Loop
from headstart.training.run_state import Checkpoints
from headstart.training.train import resolve, train

# -- training --


def test_training_lowers_the_loss_and_the_folder_records_the_result(asked, tmp_path, data):
    record = train(resolve(None, asked(steps=60, learning_rate=0.02, eval_every=20, held_out=data, loss={"hard": 1})))
    assert record["held_out_tau"] > 1.2 > log(tmp_path / "heads", "tau")[0]
    assert log(tmp_path / "heads")[-1] < log(tmp_path / "heads")[0] / 2
    assert formats.describe(tmp_path / "heads").training["held_out_top1"] == record["held_out_top1"]
    assert len(log(tmp_path / "heads", "held_out_loss")) == 3
    assert not (tmp_path / "heads" / "checkpoint").exists()


def test_a_step_does_not_depend_on_how_it_is_cut_into_batches(asked, tmp_path):
    """A step of all sixteen texts, in batches of sixteen, of four and of three."""
    curves = []
    for rows, accumulate in ((16, 1), (4, 4), (3, 6)):
        out = tmp_path / f"rows-{rows}"
        train(resolve(None, asked(out=out, rows=rows, accumulate=accumulate, steps=None, epochs=4)))
        curves.append(log(out))
    torch.testing.assert_close(torch.tensor(curves[1:]), torch.tensor([curves[0]] * 2), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batches(asked, tmp_path):
    common = {
        "rows": 3,
        "steps": None,
        "epochs": 3,
        "held_out": 0.2,
        "eval_every": 3,
    }  # the last step has 1 batch
    train(resolve(None, asked(**common, out=tmp_path / "one", accumulate=2)))
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(json.loads(json.dumps(asked(**common, out=tmp_path / "two"), default=str))))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # as accelerate does on GPUs
    subprocess.run([*launch, "-m", "headstart", "train", "--config", str(config)], check=True)
    for key in ("loss", "held_out_loss", "gradient"):
        assert log(tmp_path / "two", key) == pytest.approx(log(tmp_path / "one", key), rel=2e-6)


def test_the_held_out_loss_is_that_of_each_text_alone(asked, tmp_path, model_folder, data):
    record = train(resolve(None, asked(held_out=data, rows=5)))
    heads, model = formats.load(tmp_path / "heads"), load_model(model_folder, device="cpu")
    dataset = dataset_of(model_folder, data)
    loss_module = FrozenTarget(heads.bind(EmbedHead(model)), Objective(), Online(model, heads.taps))
    with torch.no_grad():
        results = [loss_module(dataset.pad([index])) for index in range(16)]
    loss, count = sum(float(loss) for loss, _ in results), sum(float(metrics.counts[0]) for _, metrics in results)
    assert record["held_out_loss"] == pytest.approx(loss / count, rel=1e-5)


def test_a_real_decode_is_measured_and_changes_no_weight(asked, tmp_path):
    num_prompts = []

    def decode(model, heads, prompts):
        torch.nn.utils.vector_to_parameters(torch.zeros(22_592), heads.parameters())  # the heads are a copy to be thrown away
        num_prompts.append(len(prompts))
        return 1.5

    train(resolve(None, asked(out=tmp_path / "decoded", decode_every=4, decode_prompts=3)), decode=decode)
    train(resolve(None, asked()))
    assert num_prompts == [3, 3]
    assert log(tmp_path / "decoded", "decoded_tau") == [1.5, 1.5]
    assert_same_bits(tmp_path / "decoded", tmp_path / "heads")


# -- interruptions --

RANDOM = {"method": "hydra", "settings": {"num_heads": 2, "dropout": 0.2}}  # every step draws random numbers


@pytest.mark.parametrize("at", ["step:0", "step:4", "step:8", "written:3", "written:6", "renamed:6", "renamed:9"])
def test_a_killed_run_resumes_to_the_same_bits(asked, tmp_path, at):
    check_resumed(asked, tmp_path, RANDOM, at)
    assert log(tmp_path / "heads", "step") == list(range(1, 10))


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_three_times_ends_with_the_same_bits(asked, tmp_path, seed):
    steps = sorted(random.Random(seed).sample(range(9), 3))
    train(resolve(None, asked(**RANDOM, out=tmp_path / "uninterrupted")))
    for attempt, step in enumerate(steps):
        killed(resolve(None, asked(**RANDOM, save_every=2)), f"step:{step}", resume=attempt > 0)
    train(resolve(None, asked(**RANDOM, save_every=5)), resume=True)
    assert_same_bits(tmp_path / "uninterrupted", tmp_path / "heads", f"killed in the steps {steps}")


@pytest.mark.slow
def test_a_process_killed_at_any_moment_resumes_to_the_same_bits(asked, tmp_path):
    common = RANDOM | {"steps": 150, "save_every": 5}
    train(resolve(None, asked(**common, out=tmp_path / "uninterrupted")))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(json.loads(json.dumps(asked(**common), default=str))))
    program = [sys.executable, "-c", "from headstart.cli import main; main()", "train", "--config", str(config)]
    process = subprocess.Popen(program)
    while not (tmp_path / "heads" / "checkpoint").exists():
        time.sleep(0.01)
    delay = random.Random(0).random()
    time.sleep(delay)
    process.kill()
    process.wait()
    subprocess.run([*program, "--resume"], check=True)
    assert_same_bits(tmp_path / "uninterrupted", tmp_path / "heads", f"killed {delay:.3f} s after its first checkpoint")


def test_ctrl_c_saves_a_checkpoint_and_prints_how_to_resume(asked, tmp_path, monkeypatch, capsys):
    train(resolve(None, asked(**RANDOM, out=tmp_path / "uninterrupted")))
    set_learning_rate = Loop._set_learning_rate

    def interrupted(self):
        set_learning_rate(self)
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of the fifth step

    monkeypatch.setattr(Loop, "_set_learning_rate", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(resolve(None, asked(**RANDOM)))
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped after step 5; go on with: headstart train --config" in capsys.readouterr().err
    monkeypatch.undo()
    train(resolve(tmp_path / "heads" / "config.yaml", {}), resume=True)
    assert_same_bits(tmp_path / "uninterrupted", tmp_path / "heads")


def test_a_full_disk_keeps_the_last_complete_checkpoint(asked, tmp_path, monkeypatch):
    save_state = Accelerator.save_state

    def full(self, folder):
        save_state(self, folder)
        if (tmp_path / "heads" / "checkpoint" / "step-00000003").exists():
            (Path(folder) / "optimizer.bin").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(ValueError, match=r"step 6 cannot be written .*No space left.* the one of step 3 is complete, so make room"):
        train(resolve(None, asked()))
    monkeypatch.undo()
    train(resolve(None, asked()), resume=True)
    train(resolve(None, asked(out=tmp_path / "uninterrupted")))
    assert_same_bits(tmp_path / "uninterrupted", tmp_path / "heads")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(asked, tmp_path, monkeypatch):
    gradients = Loop._gradients

    def broken(self, batches, count):
        loss, metrics = gradients(self, batches, count)
        return (loss * float("nan") if self.state.step == 4 else loss), metrics

    monkeypatch.setattr(Loop, "_gradients", broken)
    with pytest.raises(ValueError, match=r"the loss of step 5 is nan, with texts \d+.*; the checkpoint of step 3 is kept; lower"):
        train(resolve(None, asked()))
    assert [path.name for path in (tmp_path / "heads" / "checkpoint").iterdir()] == ["step-00000003"]


def test_a_learning_rate_that_diverges_stops_the_run(asked):
    with pytest.raises(
        ValueError, match=r"of step \d is (nan|inf), .*no checkpoint was written yet; lower learning_rate \(now 1e\+30"
    ):
        train(resolve(None, asked(learning_rate=1e30, warmup=0, save_every=99)))


# -- errors --


def refused(*arguments: object) -> str:
    """The one sentence on standard error, and exit code 2."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


@pytest.fixture
def options(asked, tmp_path):
    """A correct command line."""
    keys = asked()
    base = ["medusa", "--target", keys["target"], "--data", keys["data"][0], "--out", keys["out"], "--device", "cpu"]
    return [*base, "--threads", 1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "the budget is missing; give exactly one of tokens, epochs, steps"),
        (("--steps", 3, "--tokens", 50), "the budget is given 2 times (tokens=50, steps=3)"),
        (("--steps", 0), "steps is 0: Input should be greater than or equal to 1"),
        (("--steps", 3, "--length", 300), "length is 300, and the target takes 256 tokens at most"),
        (("--steps", 3, "--set", "num_heads=0"), "method medusa: num_heads is 0"),
        (("--steps", 3, "--set", "heads=4"), "method medusa has no key heads; there are num_heads"),
        (("--steps", 3, "--set", "num_heads"), "--set is 'num_heads'; write NAME=VALUE"),
        (("--steps", 3, "--loss", "hard=0"), "every loss has weight 0"),
        (("--steps", 3, "--loss", "kl=1"), "loss has no key kl; there are hard, soft"),
        (("--steps", 3, "--tracker", "diary"), "tracker is 'diary'"),
        (("--steps", 3, "--held-out", "1.5"), "held_out"),
        (("--steps", 3, "--held-out", "0.99"), "none is left to train on; hold out less"),
        (("--steps", 3, "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--steps", 3, "--out", "/proc/heads"), "out folder /proc/heads cannot be written"),
        (("--steps", 3, "--target", "./nowhere"), "nowhere does not exist"),
    ],
)
def test_a_bad_option_is_one_sentence(options, more, words):
    assert words in refused(*options, *more)


def test_an_unknown_method_is_refused_with_the_list_of_methods(options):
    assert "method 'oracle' is unknown; there are eagle, eagle3, hydra" in refused("oracle", *options[1:], "--steps", 3)


def test_missing_data_is_one_sentence(options):
    assert "data is missing" in refused("medusa", "--out", options[6], "--steps", 3)


def test_data_without_an_answer_is_one_sentence(options, tmp_path):
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "the cat"}]}))
    assert "without assistant turns" in refused(*options[:4], tmp_path / "asked.jsonl", *options[5:], "--steps", 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows: 4\nlearning_rat: 1", "has no key learning_rat; there are method, settings, start, target"),
        ("rows: [", "is not YAML"),
        ("- rows", "holds a list"),
        ("settings: 4", "settings is 4"),
    ],
)
def test_a_bad_config_is_one_sentence(options, tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    assert words in refused(*options, "--config", tmp_path / "run.yaml")


def test_options_are_merged_into_the_config_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "method: medusa\ntarget: t\ndata: [a]\nout: o\nepochs: 2\nrows: 3\nsettings: {num_heads: 3}\n"
    )
    config = resolve(tmp_path / "run.yaml", {"tokens": 50, "rows": 5, "settings": {"num_layers": 2}})
    assert (config.epochs, config.tokens, config.rows, config.settings) == (None, 50, 5, {"num_heads": 3, "num_layers": 2})


def test_an_unfinished_run_is_not_overwritten(asked, tmp_path):
    killed(resolve(None, asked()), "step:4")
    with pytest.raises(
        ValueError, match="a run that has not ended; go on with --resume, end it there with --finish, or name another folder"
    ):
        train(resolve(None, asked()))
    with pytest.raises(ValueError, match=r"started with learning_rate=0.001, so it cannot go on with learning_rate=0.5"):
        train(resolve(None, asked(learning_rate=0.5)), resume=True)
    with pytest.raises(ValueError, match="other batches per step"):
        train(resolve(None, asked(accumulate=2)), resume=True)
    newest = Checkpoints(tmp_path / "heads", None).newest()
    (newest / "optimizer.bin").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        train(resolve(None, asked()), resume=True)


def test_existing_heads_are_not_overwritten(asked):
    train(resolve(None, asked(steps=1)))
    with pytest.raises(ValueError, match="holds heads or a model already; name another folder"):
        train(resolve(None, asked(steps=1)))
    with pytest.raises(ValueError, match="the run in it has ended"):
        train(resolve(None, asked(steps=1)), resume=True)
