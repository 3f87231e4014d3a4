"""Broken folders and files: one sentence and exit code 2, or the right answer; nothing run, nothing lost."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from broken_folders import MARKER, Case, cases, whole
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from headstart.cli import app


def digests(place: Path) -> dict[str, str]:
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(arguments: tuple[object, ...]) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input="y\n")


def fault(case: Case, result: Result) -> str | None:
    """What is wrong with how a command ended, or nothing."""
    if result.exit_code == 2:
        *before, last = result.stderr.splitlines()
        if not last.startswith("headstart: ") or "Traceback" in result.stderr or (before and case.arguments[0] != "train"):
            return f"no one sentence: {result.stderr}"
        return None
    if result.exit_code != 0:
        return f"exit code {result.exit_code}: {result.exception!r}"
    if case.folder is not None and case.arguments[0] == "generate":
        wanted, found = plainly(case.folder), json.loads(result.stdout)["token_ids"]
        return None if found == wanted else f"answers {found}, and transformers {wanted}"
    return None


def plainly(folder: Path) -> list[int]:
    """What transformers answers to the same prompt, up to the end of text."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat and the sea"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    found: list[int] = []
    stops = model.generation_config.eos_token_id
    with torch.no_grad():
        while len(found) < 4:
            found.append(int(model(torch.cat([ids, torch.tensor([found], dtype=ids.dtype)], 1)).logits[0, -1].argmax()))
            if found[-1] in ([stops] if isinstance(stops, int) else stops or []) or found[-1] == tokenizer.eos_token_id:
                break
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers, about values that it takes all the same
def test_500_broken_folders_and_files_end_in_one_sentence_or_in_the_right_answer(tmp_path, monkeypatch):
    monkeypatch.setattr("headstart.text.tokenizer.LONGEST_RENDERING", 0.2)
    start = whole(tmp_path)
    (tmp_path / "cases").mkdir()
    faults, endings, of_start = [], [], digests(start.model) | digests(start.heads) | digests(start.adapter)
    for number, case in enumerate(cases(start, tmp_path / "cases")):
        before = digests(case.inputs)
        result = run(case.arguments)
        wrong = [fault(case, result)]
        wrong += ["code was run"] if (start.scratch / MARKER).exists() else []
        wrong += ["inputs changed"] if digests(case.inputs) != before else []
        faults += [f"case {number} ({case.what}, {case.arguments[0]}): {what}" for what in wrong if what]
        endings.append(result.exit_code)
        shutil.rmtree(tmp_path / "cases" / f"case-{number}")
    assert faults == []
    assert digests(start.model) | digests(start.heads) | digests(start.adapter) == of_start
    assert 300 < endings.count(2) < 450  # most are refused, and some changes are harmless
