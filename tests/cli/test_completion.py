"""Shell completion: names of drafters, planners and folders, without importing torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headstart.cli import completion as complete
from headstart.drafters.registry import METHODS
from headstart.engine.drafter_loading import names
from headstart.speculation.planner import parse

ASK = "import sys; from headstart.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"


def headstart(folder, *arguments, **environment):
    """A process as a shell starts it, with `folder` as its home."""
    package = str(Path(complete.__file__).parents[2])
    base = {"PYTHONPATH": package, "PATH": os.environ["PATH"], "HOME": str(folder)}
    script = folder / "headstart"
    script.write_text(ASK)
    return subprocess.run(
        [sys.executable, str(script), *arguments], env=base | environment, cwd=folder, capture_output=True, text=True, timeout=120
    )


def completed(folder, line):
    words = line.split(" ")
    environment = {"_HEADSTART_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    result = headstart(folder, **environment)
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("headstart tu", ["tune"]),
        ("headstart generate --drafter hyd", ["hydra", "hydra++"]),
        ("headstart generate --drafter ours", ["ours"]),
        ("headstart generate --model own", ["owner/"]),
        ("headstart generate --model owner/", ["owner/model"]),
        ("headstart generate --planner tree:3", ["tree:32"]),
        ("headstart train med", ["medusa"]),
    ],
)
def test_the_shell_gets_the_possible_completions(tmp_path, line, expected):
    for folder in ("ours", "owner/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    assert completed(tmp_path, line) == expected


def test_the_shell_is_set_up_by_one_option(tmp_path):
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = headstart(tmp_path, "--install-completion", "bash", **environment)
    assert done.returncode == 0, done.stderr
    assert "bash completion installed" in done.stdout
    assert any("_HEADSTART_COMPLETE" in file.read_text() for file in tmp_path.rglob("*.sh"))


def test_every_drafter_is_completed_and_every_planner_can_be_read():
    assert set(complete.METHODS) == METHODS.keys()
    assert {name.rstrip(":") for name in (*complete.DRAFTERS, *complete.METHODS)} == {*names(), "auto", "none"}
    for planner in complete.PLANNERS:
        assert parse(planner) is not None


def test_folders_are_completed_and_missing_ones_complete_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "afile").touch()
    assert complete.folders("") == ["a/"]
    assert complete.folders(".h") == [".hidden/"]
    assert complete.folders("nowhere/x") == []
    assert complete.drafters("model:a") == ["model:a/"]
