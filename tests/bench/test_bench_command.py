"""The options of `headstart bench` that came with intervals, loads, peers and files."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from headstart.bench import report
from headstart.bench.advice import advice, advice_on_loads
from headstart.bench.concurrency import Load
from headstart.bench.results import Row
from headstart.cli import app

TWO_KINDS = [{"turns": ["the cat", "and the sea"], "category": "talk"}, {"prompt": "the sea", "category": "text"}]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "two.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in TWO_KINDS))
    return path


@pytest.fixture(scope="module")
def base(model_folder, prompts):
    return (
        "bench",
        "--model",
        model_folder,
        "--prompts",
        prompts,
        "--max-tokens",
        6,
        "--repeat",
        1,
        "--run",
        "lookup",
        "--ignore-eos",
    )


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """Everything at once: the folder with all files, and what was printed."""
    folder = tmp_path_factory.mktemp("written")
    files = ("--out", folder / "out.json", "--save", folder / "samples.jsonl", "--html", folder / "report.html")
    page = SimpleNamespace(
        check_html=lambda path: None, write_html=lambda path, result: path.write_text(f"{len(result['runs'])} runs")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "headstart.bench.html_report", page)
        result = run(*base, "--run", "transformers", "--concurrency", "1,2", "--by-kind", "--seed", 4, *files)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_all_files_are_written_and_all_tables_printed(written):
    folder, printed = written
    result = json.loads((folder / "out.json").read_text())
    assert (folder / "report.html").read_text() == "3 runs"
    assert [(load["run"], load["rows"]) for load in result["concurrency"]] == [
        (name, rows) for rows in (1, 2) for name in ("plain", "lookup")
    ]
    assert (result["settings"]["rows"], result["settings"]["concurrency"]) == (1, [1, 2])
    for words in (
        "95 % over",
        "P50 / P90 / P99",
        "throughput by the number of requests",
        "by prompt set",
        "copy of the target's weights",
    ):
        assert words in printed
    assert "seed 4: " in printed


def test_every_answer_is_saved_with_its_prompt_and_kind(written):
    folder, _ = written
    result = json.loads((folder / "out.json").read_text())
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == result["num_samples"] == 3 * 3
    assert {(line["prompt"], line["category"]) for line in lines} == {
        ("the cat", "talk"),
        ("and the sea", "talk"),
        ("the sea", "text"),
    }
    assert {line["run"] for line in lines} == {"plain", "lookup", "transformers"}
    assert all(len(line["tokens"]) == 6 and line["time_to_first_token"] <= line["seconds"] and line["text"] for line in lines)
    assert {(line["repeat"], line["temperature"], line["rows"]) for line in lines} == {(0, 0, 1)}


def test_csv_has_a_line_per_run_and_prompt_set_with_the_machine(base):
    result = run(*base, "--format", "csv", "--seed", 3)
    assert result.exit_code == 0, result.output
    lines = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(line["run"], line["prompts"], line["num_prompts"]) for line in lines] == [
        (name, kind, size) for name in ("plain", "lookup") for kind, size in (("all", "3"), ("talk", "2"), ("text", "1"))
    ]
    assert {line["seed"] for line in lines} == {"3"}
    assert {line["cpu"] for line in lines} == {report.cpu_name()}
    numbers = [[float(line[name]) for name in ("speed_up_low", "speed_up", "speed_up_high")] for line in lines]
    assert all(low - 1e-9 <= speed_up <= high + 1e-9 for low, speed_up, high in numbers)


def test_markdown_has_tables_of_runs_and_of_loads(base):
    result = run(*base, "--format", "markdown", "--rows", 2, "--concurrency", 2)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * 3 + 2 + 2
    assert len({line.count("|") for line in lines[:8]}) == 1
    assert "| lookup | 0 | all (3) |" in result.stdout


def test_prompts_that_are_left_out_are_said(model_folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the cat"}\n' + json.dumps({"prompt": "the cat and the sea " * 100}) + "\n")
    result = run("bench", "--model", model_folder, "--prompts", path, "--max-tokens", 4, "--repeat", 1, "--raw", "--run", "lookup")
    assert "1 prompts are left out: with max_tokens=4 they exceed the context" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rows", 0), "rows is 0; it must be from 1 to 32"),
        (("--rows", 33), "rows is 33"),
        (("--concurrency", "1,64"), "each number must be from 1 to 32"),
        (("--concurrency", "many"), "whole numbers"),
        (("--concurrency", "2", "--replay"), "leave out --rows and --concurrency"),
        (("--run", "transformers", "--rows", 2), "leave it out, or leave out those runs"),
        (("--run", "transformers", "--weights", "int8"), "leave it out, or leave out those runs"),
        (("--run", "transformers:crystal"), "of transformers there are"),
        (("--prompts", "spec-bench"), "is not shipped; get its JSONL file from"),
        (("--save", "nowhere/samples.jsonl"), "is in nowhere, which is no folder"),
        (("--html", "."), "is a folder"),
        (("--save", "same", "--html", "same"), "named for two outputs"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence_before_a_model_is_loaded(arguments, words):
    result = run("bench", "--model", "no-such-model", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


# -- slow runs --


def row(**numbers: object) -> Row:
    fields = dict.fromkeys(Row.__dataclass_fields__, 0.0) | {
        "run": "heads@chain:4", "speed_up": 0.8, "interval": [0.7, 0.9], "acceptance": [0.6], "tau": 1.6, "forward": 1.2,
        "shares": {"draft": 0.1}, "is_peer": False, "kinds": {},
    }  # fmt: skip
    return Row(**(fields | numbers))


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"acceptance": [0.1]}, "only 10% of the first drafts are kept"),
        ({"shares": {"draft": 0.5}}, "drafting takes 50% of the time"),
        ({"forward": 2.0}, "costs 2.00 times that of one token and gives 1.60 tokens"),
        ({}, "do not pay for drafting and verification on this machine"),
        ({"interval": [0.7, 1.1]}, "but not beyond doubt"),
    ],
)
def test_a_run_slower_than_plain_decoding_is_said_with_what_would_help(numbers, words):
    (sentence,) = advice([row(**numbers)])
    assert sentence.startswith("heads@chain:4 at temperature 0 is slower than plain decoding")
    assert words in sentence


def test_a_run_that_is_slow_at_some_number_of_rows_is_said():
    rates = {("plain", 1): 10.0, ("heads", 1): 12.0, ("plain", 4): 30.0, ("heads", 4): 27.0}
    loads = [Load(name, 0.7, rows, rate, {}) for (name, rows), rate in rates.items()]
    (sentence,) = advice_on_loads(loads)
    assert sentence.startswith("heads at temperature 0.7 is slower than plain decoding at 4 rows (0.90x): ")


def test_no_advice_is_given_for_faster_runs_and_for_peers():
    assert list(advice([row(speed_up=1.2), row(is_peer=True)])) == []
    assert "8 rows fill the processor" in next(iter(advice([row()], 8)))
