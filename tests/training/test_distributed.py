"""Two processes against one, over gloo: plain data parallelism, and FSDP2 with a target whose layers are divided between them."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from training_runs import assert_same_bits, log, weights

from headstart.training import sharding
from headstart.training.train import resolve, train

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
    "--config_file",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FSDP2 = [*ACCELERATE, str(RECIPES / "fsdp2.yaml")]
# The last step has one batch for two processes, and held-out texts are three.
TWO = {"rows": 3, "steps": None, "epochs": 3, "held_out": 0.2, "eval_every": 3, "dtype": "float32", "precision": "no"}
EAGLE3 = {"method": "eagle3", "settings": {"draft_vocab": 64}, "learning_rate": 0.01}


@pytest.fixture
def command(asked, tmp_path):
    """The command that trains with these keys, as a launcher starts it."""

    def build(launch, *options, **keys):
        config = tmp_path / f"{keys['out'].name}.yaml"
        config.write_text(yaml.safe_dump(json.loads(json.dumps(asked(**keys), default=str))))
        return [*launch, "-m", "headstart", "train", "--config", str(config), *options]

    return build


def run(command):
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def assert_close(one: Path, two: Path) -> None:
    """Losses, gradients, accuracies and weights of two runs, to 1e-5."""
    for key in ("loss", "held_out_loss", "gradient"):
        assert log(two, key) == pytest.approx(log(one, key), rel=1e-5), key
    for key in ("tokens", "top1", "held_out_top1", "learning_rate"):
        assert log(two, key) == log(one, key), key
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [TORCHRUN, FSDP2], ids=["torchrun", "fsdp2"])
def test_two_processes_train_like_one_with_twice_the_batches(asked, command, tmp_path, launch):
    train(resolve(None, asked(**TWO, **EAGLE3, out=tmp_path / "one", accumulate=4)))
    printed = run(command(launch, **TWO, **EAGLE3, out=tmp_path / "two", accumulate=2)).stderr
    assert_close(tmp_path / "one", tmp_path / "two")
    assert printed.count("heads are in") == printed.count("parameters are trained on") == 1, "only the main process logs"
    assert log(tmp_path / "one", "tokens")[-1] > 3 * 400


@pytest.mark.slow
def test_each_process_keeps_its_share_of_the_target_and_gives_the_same_bits(tmp_path):
    """Layers are divided; embedding, norm and LM head are not, because heads use them outside the forward."""
    program = tmp_path / "share.py"
    program.write_text(SHARE.format(tests=str(Path(__file__).parents[1])))
    shares = [json.loads(line) for line in run([*TORCHRUN, str(program)]).stdout.splitlines()]
    assert len(shares) == 2
    for share in shares:
        assert share["is_equal"]
        assert share["inside"] == share["whole_inside"] / 2
        assert share["outside"] == share["whole_outside"]


SHARE = """
import copy, json, sys
sys.path.insert(0, {tests!r})
import torch
from accelerate import Accelerator
from tiny import ARCHITECTURES, random_model
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import digest
from headstart.training.features import Online
from headstart.training.dataset import TextBatch
from headstart.training.sharding import blocks, load_sharded

accelerator = Accelerator(cpu=True)
whole = random_model(ARCHITECTURES["llama"](), torch.float32)
model = load_sharded(lambda device: copy.deepcopy(whole), accelerator)
count = lambda weights: sum(w.to_local().numel() if hasattr(w, "to_local") else w.numel() for w in weights)
inside = lambda model: count(w for block in blocks(model) for w in block.parameters())
tokens = torch.randint(97, (2, 9 + accelerator.process_index))
texts = TextBatch(tokens, tokens > 0, (0, 1))
one, other = Online(whole, (0, -1))(texts), Online(model, (0, -1))(texts)
logits = EmbedHead(whole).logits(one.last_hidden), EmbedHead(model).logits(other.last_hidden)
is_equal = torch.equal(one.features, other.features) and torch.equal(*logits) and digest(model) == digest(whole)
share = dict(is_equal=is_equal, inside=inside(model), whole_inside=inside(whole))
share |= dict(outside=count(model.parameters()) - inside(model), whole_outside=count(whole.parameters()) - inside(whole))
for turn in range(2):
    if turn == accelerator.process_index:
        print(json.dumps(share), flush=True)
    accelerator.wait_for_everyone()
"""


@pytest.mark.slow
def test_two_processes_killed_at_any_moment_resume_to_the_same_bits(command, tmp_path):
    """All processes of the launcher, at once."""
    common = TWO | EAGLE3 | {"epochs": 12, "save_every": 2, "held_out": 0.0, "eval_every": None}
    run(command(FSDP2, **common, out=tmp_path / "uninterrupted"))
    killed = command(FSDP2, **common, out=tmp_path / "heads")
    process = psutil.Popen(killed, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "heads" / "checkpoint").glob("step-*")):
        time.sleep(0.01)
        assert process.poll() is None, "the run ended by itself"
    delay = random.Random(0).random()
    time.sleep(delay)
    workers = process.children(recursive=True)
    for victim in (*workers, process):
        victim.kill()
    psutil.wait_procs([*workers, process])
    how = f"killed {delay:.3f} s after the first checkpoint"
    assert not (tmp_path / "heads" / "model.safetensors").exists(), f"{how}, when the run had ended"
    run([*killed, "--resume"])
    assert_same_bits(tmp_path / "uninterrupted", tmp_path / "heads", how)
    assert log(tmp_path / "heads") == log(tmp_path / "uninterrupted"), how


@pytest.mark.slow
def test_features_are_written_by_two_processes_with_a_divided_target_and_read_by_two(asked, command, tmp_path, model_folder, data):
    train(resolve(None, asked(**TWO, **EAGLE3, out=tmp_path / "one", accumulate=2)))
    options = ["--target", str(model_folder), "--dtype", "float32", "--method", "eagle3", "--device", "cpu", "--threads", "1"]
    run([*FSDP2, "-m", "headstart", "features", str(data), *options, "--out", str(tmp_path / "features")])
    run(command(FSDP2, **TWO, **EAGLE3, out=tmp_path / "two", features=tmp_path / "features"))
    assert_close(tmp_path / "one", tmp_path / "two")


# -- recipes and refusals, in this process --


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", DistributedType.MULTI_GPU), ("fsdp2", DistributedType.FSDP), ("deepspeed", DistributedType.DEEPSPEED)],
)
def test_accelerate_reads_every_recipe(name, kind):
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"ddp", "fsdp2", "deepspeed"}
    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.mixed_precision == "no"
    assert config.fsdp_config.get("fsdp_version") == (2 if name == "fsdp2" else None)
    assert config.deepspeed_config.get("zero_stage") == (2 if name == "deepspeed" else None)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"joint": {"mode": "full"}}, "joint trains the target on each; leave joint out, or start without"),
        ({"decode_every": 2}, "decode_every decodes with it on each; leave decode_every out"),
    ],
)
def test_what_needs_a_whole_target_is_refused_where_it_is_divided(asked, monkeypatch, keys, words):
    monkeypatch.setattr("headstart.training.train.is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match=words):
        train(resolve(None, asked(**keys)), decode=lambda *_: 1.0)


def test_fsdp1_is_refused():
    state = type("State", (), {"distributed_type": DistributedType.FSDP, "is_fsdp2": False})()
    with pytest.raises(ValueError, match="this is FSDP1, and heads are trained with FSDP2; write fsdp_version: 2"):
        sharding.switch_on_fsdp(type("Processes", (), {"state": state})())


class DeepSpeed:
    """What accelerate says of a run that its launcher started with DeepSpeed."""

    distributed_type = DistributedType.DEEPSPEED

    def __init__(self, stage):
        plugin = type("Plugin", (), {"zero_stage": stage, "deepspeed_config": {"gradient_clipping": "auto"}})()
        self.state = type("State", (), {"deepspeed_plugin": plugin})()


def test_deepspeed_clips_as_the_run_says_and_refuses_what_it_cannot_do():
    accelerator = DeepSpeed(2)
    sharding.switch_on_deepspeed(accelerator, 0.5, "no")
    assert accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] == 0.5
    with pytest.raises(ValueError, match="cannot be trained at DeepSpeed's zero_stage 3; set it to 2"):
        sharding.switch_on_deepspeed(DeepSpeed(3), 0.5, "no")
    with pytest.raises(ValueError, match="not with precision=bf16; leave it out, or use FSDP2"):
        sharding.switch_on_deepspeed(DeepSpeed(2), 0.5, "bf16")
