"""`headstart serve`: the command of another engine, its checks, and starting it."""

import json
import os
import shlex
import stat
import subprocess
import sys

import pytest
from command_line import answer, run

from headstart.formats.exports.record import CONFORMANCE
from headstart.serve import engines


def write_export(folder, engine="vllm", method="eagle3", hidden=192, **more):
    """An export as far as `serve` reads it."""
    folder.mkdir()
    record = {
        "format": "headstart-export", "version": 1, "engine": engine, "method": method, "target": "headstart-embedded",
        "chain": 3, "chain_by_batch": [[1, 4, 3], [5, 32, 0]], "chain_source": "measured on a toaster",
    }  # fmt: skip
    (folder / CONFORMANCE).write_text(json.dumps(record | more))
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden, "vocab_size": 4096}))
    return folder


def refused(*arguments):
    result = run("serve", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--heads", "folder"), "--heads is for another engine, with --engine vllm or sglang; name the heads as --drafter"),
        (("--start",), "--start is for another engine"),
        (("--json",), "--json is for another engine"),
        (("--speculation", "off", "--drafter", "lookup"), "--speculation off drafts nothing; leave --drafter out"),
        (("--accept", "sometimes"), "accept is 'sometimes'; the rules are"),
        (("--port", 99999), "port is 99999"),
        (("--max-queue", 0), "max_queue is 0; it must be positive"),
        (("--max-rows", 0), "max_rows is 0"),
        (("--memory", "much"), "memory is 'much'"),
        (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1 port 8000"),
        (("--api-keys", "/dev/null"), "holds no API key"),
    ],
)
def test_a_wrong_option_of_this_packages_server_is_one_sentence_before_anything_is_loaded(arguments, words):
    assert words in refused(*arguments)


def test_options_of_this_packages_server_are_refused_with_another_engine(tmp_path):
    folder = write_export(tmp_path / "heads")
    assert "do nothing with --engine vllm" in refused("--engine", "vllm", "--heads", folder, "--port", 8001)


def test_the_command_of_vllm_has_the_heads_and_the_chain_of_each_batch_size(tmp_path):
    folder = write_export(tmp_path / "heads")
    result = run("serve", "--engine", "vllm", "--heads", folder, "--", "--port", 8001, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    program, command, model, option, config, *more = shlex.split(result.stdout)
    assert (program, command, option, more) == ("vllm", "serve", "--speculative-config", ["--port", "8001", "--dtype", "float32"])
    assert model.endswith("embedded/target")
    assert json.loads(config) == {
        "method": "eagle3",
        "model": str(folder),
        "num_speculative_tokens": 3,
        "num_speculative_tokens_per_batch_size": [[1, 4, 3], [5, 32, 0]],
    }
    assert "chains of 3 drafts: measured on a toaster" in result.stderr


def test_the_command_of_sglang_publishes_its_figures(tmp_path):
    folder = write_export(tmp_path / "heads", "sglang")
    command = answer("serve", "--engine", "sglang", "--heads", folder)["command"]
    assert command[:3] == ["python", "-m", "sglang.launch_server"]
    assert command[command.index("--speculative-num-steps") + 1] == "3"
    assert command[-1] == "--enable-metrics"


def test_a_folder_of_speculators_is_for_vllm(tmp_path):
    folder = write_export(tmp_path / "heads", "speculators")
    assert answer("serve", "--engine", "vllm", "--heads", folder)["command"][0] == "vllm"


def test_other_code_of_the_model_is_trusted_by_the_engine_too(tmp_path):
    folder = write_export(tmp_path / "heads")
    assert "--trust-remote-code" in answer("serve", "--engine", "vllm", "--heads", folder, "--trust-remote-code")["command"]


@pytest.mark.parametrize(
    ("export", "more", "words"),
    [
        ({"engine": "sglang"}, (), "was exported for sglang, which vllm cannot read; export the heads again with"),
        ({"hidden": 64}, (), "was exported for headstart-embedded with hidden_size 64, but"),
        ({"version": 2}, (), "is of version 2, and this headstart reads version 1"),
        ({}, ("--out", "elsewhere"), "is an export already, and is used as it is; leave out --out elsewhere"),
        ({}, ("--start", "--json"), "--json prints the command and --start runs it"),
        ({}, ("--model", "./no-such-model"), "'./no-such-model' is neither a folder nor the id of a model"),
    ],
)
def test_an_export_that_does_not_fit_is_one_sentence(tmp_path, export, more, words):
    folder = write_export(tmp_path / "heads", **export)
    assert words in refused("--engine", "vllm", "--heads", folder, *more)


def test_heads_are_needed_and_must_exist(tmp_path):
    assert "--engine vllm needs --heads" in refused("--engine", "vllm")
    assert "is no folder of heads; name a folder" in refused("--engine", "vllm", "--heads", tmp_path / "none")


def test_a_model_of_another_name_is_said(tmp_path, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    folder = write_export(tmp_path / "heads", hidden=config["hidden_size"])
    (folder / "config.json").write_text(json.dumps({"hidden_size": config["hidden_size"]}))
    notes = answer("serve", "--engine", "vllm", "--heads", folder, "--model", model_folder)["notes"]
    assert any("exported for headstart-embedded; if" in note for note in notes)


@pytest.mark.parametrize(("engine", "package"), [("vllm", "pip install vllm"), ("sglang", "pip install 'sglang[all]'")])
def test_an_engine_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch, engine, package):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    monkeypatch.setattr(engines.sys, "executable", str(tmp_path / "python"))
    folder = write_export(tmp_path / "heads", engine)
    assert f"{engine} is not installed here; install it with: {package}" in refused(
        "--engine", engine, "--heads", folder, "--start"
    )


def test_start_becomes_the_engine(tmp_path):
    """A stand-in for vLLM prints its arguments."""
    folder, program = write_export(tmp_path / "heads"), tmp_path / "vllm"
    program.write_text(f'#!{sys.executable}\nimport sys\nprint(*sys.argv[1:], sep="|")\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    arguments = ("serve", "--engine", "vllm", "--heads", str(folder), "--start", "--", "--seed", "1")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "headstart", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    verb, _, _, config, *more = done.stdout.strip().split("|")
    assert (verb, more) == ("serve", ["--seed", "1"])
    assert json.loads(config)["model"] == str(folder)


# -- native heads --


def test_native_heads_need_a_folder_to_be_exported_to(tmp_path):
    words = refused("--engine", "vllm", "--heads", "eagle3")
    assert "is no export, and vllm cannot read native heads; --out FOLDER exports them to there first" in words


def test_native_heads_are_exported_and_then_served(tmp_path):
    out = tmp_path / "out"
    result = run("serve", "--engine", "vllm", "--heads", "eagle3", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert f"the heads were exported to {out}" in " ".join(result.stderr.split())
    again = run("serve", "--engine", "vllm", "--heads", out)
    assert again.stdout == result.stdout
    assert f'"model": "{out}"' in result.stdout


def test_heads_that_an_engine_cannot_read_are_refused_before_anything_is_written(tmp_path):
    assert "hydra" in refused("--engine", "sglang", "--heads", "hydra", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
