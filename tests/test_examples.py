"""Every example runs on a tiny model and stays short."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
LINES = {"generate": 15, "compare_drafters": 40, "custom_drafter": 40, "inside_transformers": 40, "train_medusa": 40}
LAST_WORDS = {
    "generate": "per round",
    "custom_drafter": "were drafts",
    "inside_transformers": "the same tokens",
    "train_medusa": "per round",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, model_folder, draft_folder, monkeypatch, capsys):
    arguments = [model_folder, draft_folder] if path.stem == "compare_drafters" else [model_folder]
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out.strip()
    if path.stem in LAST_WORDS:
        assert printed.endswith(LAST_WORDS[path.stem])
    else:
        assert [line.split()[-2] for line in printed.splitlines() if "│" in line] == ["yes"] * 5


def test_no_example_is_too_long():
    assert {path.stem for path in EXAMPLES} == set(LINES)
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= LINES[path.stem], f"{path.name} is too long: is it one idea?"
