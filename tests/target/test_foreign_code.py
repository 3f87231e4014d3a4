"""Python files in model folders: they run only with `trust_remote_code`, and the user is never asked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import write_model
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import headstart
from headstart.cli import app
from headstart.target.loading import load_model

PROGRAM = """
open({mark!r}, "a").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own-{name}"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(model: Path, folder: Path, *, model_too: bool = True, tokenizer_too: bool = False) -> Path:
    """A copy of a model whose configuration (and tokenizer) are classes of its own, in a file that leaves `mark` when it runs."""
    shutil.copytree(model, folder)
    name = folder.name.replace("-", "_")
    (folder / f"code_{name}.py").write_text(PROGRAM.format(mark=str(mark_of(folder)), name=name))
    if model_too:
        config = json.loads((folder / "config.json").read_text())
        own = {"AutoConfig": f"code_{name}.OwnConfig", "AutoModelForCausalLM": f"code_{name}.OwnForCausalLM"}
        config |= {"model_type": f"own-{name}", "architectures": ["OwnForCausalLM"], "auto_map": own}
        (folder / "config.json").write_text(json.dumps(config))
    if tokenizer_too:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        own = {"AutoTokenizer": [None, f"code_{name}.OwnTokenizer"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "OwnTokenizer", "auto_map": own}))
    return folder


def mark_of(folder: Path) -> Path:
    """The file that the code in a folder leaves when it runs."""
    return folder.parent / f"{folder.name}.ran"


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """A folder of this test for the files that transformers copies before running them."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input="y\n")
    return result.exit_code, result.stdout, result.stderr


def refused(folder: Path, *arguments: object) -> None:
    code, _, stderr = run(*arguments)
    assert code == 2, stderr
    assert "--trust-remote-code" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert not mark_of(folder).exists()


ANSWER = ("--max-tokens", 4, "--drafter", "none", "--json")


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_of_a_folder_runs_only_when_allowed(model_folder, tmp_path, part):
    folder = with_code(model_folder, tmp_path / f"own-{part}", model_too=part == "model", tokenizer_too=part == "tokenizer")
    refused(folder, "generate", "the cat", "--model", folder, *ANSWER)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        headstart.load(folder)
    code, stdout, stderr = run("generate", "the cat", "--model", folder, *ANSWER, "--trust-remote-code")
    assert code == 0, stderr
    assert mark_of(folder).exists()
    plain = json.loads(run("generate", "the cat", "--model", model_folder, *ANSWER)[1])
    assert json.loads(stdout)["token_ids"] == plain["token_ids"]
    assert headstart.load(folder, trust_remote_code=True, drafter=None).generate("the cat", max_tokens=4)[0].token_ids


@pytest.mark.slow
def test_the_user_is_not_asked_on_a_terminal(model_folder, tmp_path):
    """In a process whose standard input answers yes to every question."""
    folder = with_code(model_folder, tmp_path / "asking", tokenizer_too=True)
    command = [sys.executable, "-m", "headstart", "generate", "the cat", "--model", str(folder), "--max-tokens", "2"]
    done = subprocess.run(command, input="y\ny\ny\n", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "--trust-remote-code" in done.stderr
    assert not mark_of(folder).exists()


@pytest.mark.parametrize("command", ["inspect", "train", "pretrain", "distill", "bench", "tune", "import"])
def test_no_command_runs_code_of_a_folder_by_default(model_folder, tmp_path, command):
    folder = with_code(model_folder, tmp_path / "own", tokenizer_too=True)
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"text": "the cat and the sea"}\n')
    arguments = {
        "inspect": (folder,),
        "train": ("medusa", "--target", folder, "--data", data, "--steps", 1, "--out", out),
        "pretrain": ("--model", folder, "--tokenizer", model_folder, "--data", data, "--steps", 1, "--out", out),
        "distill": (data, "--model", folder, "--out", out),
        "bench": ("--model", folder),
        "tune": (model_folder, "--model", folder),
        "import": (published_heads(tmp_path), "--target", folder, "--out", out),
    }
    refused(folder, command, *arguments[command])


def published_heads(tmp_path: Path) -> Path:
    """Medusa heads in the published format."""
    from safetensors.torch import save_file

    folder = tmp_path / "theirs"
    folder.mkdir()
    tensors = {
        f"{head}.0.linear.{part}": torch.zeros(*shape) for head in (0, 1) for part, shape in (("weight", (32, 32)), ("bias", (32,)))
    }
    tensors |= {f"{head}.1.weight": torch.zeros(320, 32) for head in (0, 1)}
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    (folder / "config.json").write_text('{"medusa_num_heads": 2, "medusa_num_layers": 1}')
    return folder


@pytest.mark.parametrize("command", ["inspect", "train", "pretrain"])
def test_every_command_that_loads_a_model_takes_trust_remote_code(model_folder, tmp_path, command):
    folder = with_code(model_folder, tmp_path / f"allowed-{command}")
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"text": "the cat and the sea and the cat"}\n' * 3)
    short = ("--data", data, "--steps", 1, "--out", out, "--held-out", 0, "--length", 8)
    arguments = {
        "inspect": (folder,),
        "train": ("medusa", "--target", folder, "--set", "num_heads=1", *short),
        "pretrain": ("--model", folder, "--tokenizer", model_folder, *short),
    }
    code, _, stderr = run(command, *arguments[command], "--trust-remote-code")
    assert code == 0, stderr
    assert mark_of(folder).exists()


def test_code_of_a_draft_model_runs_only_when_allowed(model_folder, draft_folder, tmp_path):
    folder = with_code(draft_folder, tmp_path / "own-draft")
    base = ("generate", "the cat", "--model", model_folder, "--max-tokens", 4, "--drafter", f"model:{folder}")
    refused(folder, *base)
    code, _, stderr = run(*base, "--trust-remote-code")
    assert code == 0, stderr
    assert mark_of(folder).exists()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft reads an attribute by an old name
def test_code_of_the_base_model_of_an_adapter_runs_only_when_allowed(model_folder, tmp_path):
    folder = with_code(model_folder, tmp_path / "own-base")
    lora = get_peft_model(load_model(model_folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder)}))
    refused(folder, "generate", "the cat", "--model", tmp_path / "lora", *ANSWER)
    code, _, stderr = run("generate", "the cat", "--model", tmp_path / "lora", *ANSWER, "--trust-remote-code")
    assert code == 0, stderr
    assert mark_of(folder).exists()


def test_a_kernel_that_a_configuration_names_is_not_fetched(tmp_path):
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "somebody/kernel"}))
    with pytest.raises(ValueError, match="asks for attention by somebody/kernel; remove attn_implementation"):
        load_model(folder)


def test_an_adapter_cannot_name_a_module_to_import(model_folder, tmp_path):
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(model_folder),
        "megatron_config": {"a": 1},
        "megatron_core": "own",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="megatron_config"):
        load_model(tmp_path)
