"""The command `headstart export`."""

import json

import pytest
from typer.testing import CliRunner

from headstart.cli import app
from headstart.cli import completion as complete
from headstart.formats.exports import EXPORTERS


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_embedded_models_heads_are_named_by_their_method(tmp_path):
    result = run("medusa", "--to", "tgi", "--out", tmp_path / "export", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["launch"] == f"text-generation-launcher --model-id {tmp_path / 'export'} --speculate 3"
    assert {*summary["files"]} == {path.name for path in (tmp_path / "export").iterdir()}


def test_the_commands_are_printed_on_lines_of_their_own(tmp_path):
    result = run("eagle3", "--to", "vllm", "--out", tmp_path / "export", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "export" / "conformance.json").read_text())
    assert f"  {report['launch']}\n" in result.stdout
    assert f"  {report['check']}\n" in result.stdout
    assert "d2t (each id minus its index)" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("heads", "more", "message"),
    [
        ("nothing-here", (), "nothing-here is no folder of heads; name a folder"),
        ("hydra", ("--to", "vllm"), "vllm does not run hydra heads"),
        ("mtp", ("--to", "vllm"), "write one with --to hf"),
        ("medusa", ("--to", "triton"), "heads can be exported to vllm, speculators, sglang, tgi"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(tmp_path, heads, more, message):
    result = run(heads, "--to", "tgi", *more, "--out", tmp_path / "export")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "export").exists()


def test_the_shell_completes_every_engine():
    assert complete.engines("") == [*EXPORTERS]
    assert complete.engines("s") == ["speculators", "sglang"]
