"""The command line: its output, its error messages, and that an interruption loses nothing."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from folders import write_model, write_tokenizer
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner, Result

from headstart import cli
from headstart.cli import app
from headstart.engine.engine import Engine

MODEL = {"--model", "--dtype", "--weights", "--device", "--exact", "--no-exact", "--accept", "--threads", "--trust-remote-code"}
DRAFTING = {"--drafter", "--planner", "--memory"}
SAMPLING = {
    "--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--presence-penalty",
    "--frequency-penalty", "--seed", "--stop", "--ignore-eos",
}  # fmt: skip
ANSWER = {"--system", "--show-drafts", "--json"}
RUN = {
    "--data", "--held-out", "--rows", "--length", "--accumulate", "--tokens", "--epochs", "--steps", "--learning-rate", "--warmup",
    "--schedule", "--floor", "--weight-decay", "--clip", "--seed", "--dtype", "--precision", "--device", "--threads", "--log-every",
    "--eval-every", "--save-every", "--tracker", "--out", "--config", "--resume", "--finish", "--json", "--trust-remote-code",
}  # fmt: skip
HEADS = {"--heads", "--weight", "--weight-end", "--weight-until", "--decay"}
DISTILL = {
    "--out", "--mode", "--beginning", "--limit", "--rows", "--drop-cut", "--max-tokens", "--temperature", "--top-k", "--top-p",
    "--seed", "--endpoint", "--endpoint-model", "--api-key-env",
}  # fmt: skip

# A new command or option edits this list on purpose.
FROZEN = {
    "demo": MODEL | {"--max-tokens", "--temperature", "--seed", "--drafter", "--json"},
    "generate": MODEL | DRAFTING | SAMPLING | ANSWER | {"--n", "--logprobs", "--raw"},
    "chat": MODEL | DRAFTING | SAMPLING | ANSWER,
    "train": RUN
    | {"--start", "--target", "--any-target", "--features", "--set", "--loss", "--joint", "--decode-every", "--decode-prompts"},
    "features": {"--target", "--out", "--method", "--taps", "--held-out", "--length", "--any-target", "--dtype"}
    | {"--device", "--threads", "--trust-remote-code", "--json"},
    "pretrain": RUN | HEADS | {"--model", "--start", "--tokenizer", "--times", "--optimizer"},
    "inspect": {"--device", "--model", "--probe", "--trust-remote-code", "--json"},
    "distill": MODEL | DRAFTING | DISTILL | {"--json"},
    "export": {"--to", "--out", "--model", "--dtype", "--trust-remote-code", "--json"},
    "verify-export": {"--model", "--python", "--prompts", "--limit", "--max-tokens", "--chain", "--trust-remote-code", "--json"},
    "import": {"--target", "--out", "--taps", "--trust-remote-code", "--json"},
    "tune": MODEL
    | {"--prompts", "--limit", "--max-tokens", "--temperature", "--rows", "--decode", "--no-decode", "--hardware", "--seed"}
    | {"--raw", "--chat", "--json"},
    "bench": MODEL
    | SAMPLING
    | {
        "--run",
        "--prompts",
        "--by-kind",
        "--limit",
        "--temperatures",
        "--repeat",
        "--raw",
        "--chat",
        "--replay",
        "--out",
        "--json",
        "--rows",
        "--concurrency",
        "--format",
        "--save",
        "--html",
        "--endpoint",
        "--endpoint-model",
        "--against",
        "--against-model",
        "--api-key-env",
    },
    "serve": MODEL
    | {"--drafter", "--memory", "--speculation", "--max-rows", "--chunk", "--prefixes", "--max-tokens", "--p99-ms"}
    | {"--host", "--port", "--served-model-name", "--api-keys", "--allow-host", "--allow-origin"}
    | {"--max-queue", "--max-connections", "--timeout", "--grace", "--request-metrics", "--vllm-metrics"}
    | {"--heads", "--engine", "--out", "--start", "--json"},
}


def run(*arguments: object, stdin: str | bytes | None = "") -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def answer(*arguments: object, stdin: str | bytes | None = "") -> dict:
    result = run(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def options(command: object) -> set[str]:
    names = {name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("--")}
    return names - {"--help"}


# -- what there is --


def test_commands_and_options_are_frozen():
    group = typer.main.get_command(app)
    assert {name: options(command) for name, command in group.commands.items()} == FROZEN


@pytest.mark.parametrize("command", FROZEN)
def test_every_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: headstart {command}" in " ".join(result.stdout.split())


def test_help_imports_neither_torch_nor_transformers():
    program = "import sys; from headstart.cli import app\ntry: app(['generate', '--help'])\nexcept SystemExit: print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"torch", "transformers"} & set(loaded.stdout.split()) == set()


def test_version_is_printed():
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version").stdout)


# -- answers --


def test_the_tokens_are_the_same_with_any_drafter_and_planner(model_folder, draft_folder):
    base = ("generate", "the cat and the sea", "--model", model_folder, "--max-tokens", 24, "--temperature", 0.7, "--seed", 5)
    plain = answer(*base, "--drafter", "none")
    for more in (
        ("--drafter", "lookup"),
        ("--drafter", f"model:{draft_folder}"),
        ("--drafter", f"model:{draft_folder}", "--planner", "chain:3"),
        ("--drafter", f"model:{draft_folder}", "--planner", "full:2,2"),
        ("--drafter", f"model:{draft_folder}", "--planner", "best:nodes=4,depth=2"),
    ):
        assert answer(*base, *more)["token_ids"] == plain["token_ids"]


def test_json_has_everything_needed_to_repeat_the_answer(model_folder):
    first = answer("generate", "the cat", "--model", model_folder, "--max-tokens", 12, "--temperature", 1, "--logprobs", 2)
    again = answer("generate", "the cat", "--model", model_folder, "--max-tokens", 12, "--temperature", 1, "--seed", first["seed"])
    assert again["token_ids"] == first["token_ids"]
    assert first["finish_reason"] in ("stop", "length")
    assert {"rounds", "tau", "seconds"} <= first["stats"].keys()
    assert len(first["logprobs"]) == len(first["token_ids"])
    assert len(first["logprobs"][0][1]) == 2


def test_several_answers_are_printed_on_several_lines(model_folder):
    result = run("generate", "the cat", "--model", model_folder, "--max-tokens", 6, "--temperature", 1, "--n", 3, "--json")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len({one["seed"] for one in answers}) == 3
    assert run("generate", "the cat", "--model", model_folder, "--max-tokens", 6, "--n", 2).stdout.startswith("[1] ")


def test_the_streamed_text_is_the_text_of_the_answer(model_folder):
    base = ("generate", "the cat", "--model", model_folder, "--max-tokens", 20, "--ignore-eos", "--seed", 1, "--temperature", 1)
    assert run(*base).stdout == answer(*base)["text"] + "\n"


def test_accepted_drafts_are_underlined_and_nothing_else_changes(model_folder):
    base = ("generate", "--raw", "sea sea sea sea", "--model", model_folder, "--max-tokens", 40, "--ignore-eos", "--drafter")
    plain = answer(*base, "none")
    marked = run(*base, f"model:{model_folder}", "--show-drafts", "--planner", "chain:4")  # a drafter that is always right
    assert marked.stdout.replace("\x1b[4m", "").replace("\x1b[24m", "") == plain["text"] + "\n"
    assert "\x1b[4m" in marked.stdout
    assert re.search(r"40 tokens in \d+ rounds: tau [2-9]", marked.stderr)


def test_a_stop_string_ends_the_text_before_it(model_folder):
    base = ("generate", "the cat", "--model", model_folder, "--max-tokens", 30, "--ignore-eos")
    text = answer(*base)["text"]
    stop = text[10:12]
    assert answer(*base, "--stop", stop, "--stop", "never generated")["text"] == text[: text.index(stop)]


def test_raw_leaves_the_chat_template_out(model_folder):
    base = ("generate", "the cat", "--model", model_folder, "--max-tokens", 8, "--ignore-eos")
    as_chat, raw, system = answer(*base), answer(*base, "--raw"), answer(*base, "--system", "You are the sea.")
    assert len({tuple(one["token_ids"]) for one in (as_chat, raw, system)}) == 3


def test_a_prompt_is_read_from_standard_input(model_folder):
    base = ("--model", model_folder, "--max-tokens", 8, "--ignore-eos")
    expected = answer("generate", "猫は魚", *base)["text"]
    assert answer("generate", *base, stdin="猫は魚")["text"] == expected
    assert answer("generate", "-", *base, stdin="猫は魚")["text"] == expected


def test_with_no_max_tokens_an_answer_fits_the_context(model_folder):
    short = answer("generate", "the cat " * 60, "--model", model_folder, "--ignore-eos")
    assert short["finish_reason"] == "length"
    assert 0 < len(short["token_ids"]) < 256


def test_chat_keeps_the_conversation(model_folder):
    base = ("chat", "--model", model_folder, "--max-tokens", 6, "--ignore-eos", "--json")
    lines = run(*base, stdin="the cat\n\nthe sea\n").stdout.splitlines()
    alone = run(*base, stdin="the sea\n").stdout.splitlines()
    assert [len(json.loads(line)["token_ids"]) for line in lines] == [6, 6]
    assert json.loads(lines[1])["token_ids"] != json.loads(alone[0])["token_ids"]


def test_the_sampling_options_change_the_answer(model_folder):
    base = ("generate", "the cat", "--model", model_folder, "--max-tokens", 12, "--ignore-eos", "--temperature", 1, "--seed", 2)
    plain = answer(*base)["token_ids"]
    for change in (
        ("--top-k", 1), ("--top-p", 0.1), ("--min-p", 0.9), ("--repetition-penalty", 0.01), ("--presence-penalty", -50),
        ("--frequency-penalty", -50), ("--seed", 3),
    ):  # fmt: skip
        assert answer(*base, *change)["token_ids"] != plain, change
    same = ("--dtype", "float32", "--device", "cpu", "--memory", "1M", "--accept", "coupled", "--no-exact", "--threads", 1)
    threads = torch.get_num_threads()
    try:
        assert answer(*base, *same)["token_ids"] == plain
    finally:
        torch.set_num_threads(threads)


# -- inspect --


def test_inspect_reports_what_a_folder_holds(model_folder):
    report = answer("inspect", model_folder)
    assert (report["layers"], report["hidden"], report["vocab"], report["context"]) == (2, 32, 320, 256)
    assert report["cache_bytes_per_token"] == 2 * 2 * 16 * 4  # layers x (keys and values) x head width x float32
    assert report["parameters"] * 4 == report["bytes"]
    assert report["reach"] == ["everything", "everything"]
    assert report["chat_template"] is True
    assert report["stop_tokens"] == {"<|end|>": 0}
    assert report["problems"] == []
    assert re.fullmatch("[0-9a-f]{16}", report["digest"])
    assert "2 layers see everything" in run("inspect", model_folder).stdout


def test_inspect_names_the_problems(tmp_path, model_folder):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        sliding_window=700, max_position_embeddings=2048,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    report = answer("inspect", tmp_path)
    assert report["reach"] == ["window of 700"]
    assert report["tokenizer"] is None
    assert len(report["problems"]) == 2
    assert any("window of 700" in problem for problem in report["problems"])
    assert any("no tokenizer" in problem for problem in report["problems"])


# -- what is refused --


@pytest.fixture(scope="session")
def broken(tmp_path_factory):
    """Folders with one fault each."""
    home = tmp_path_factory.mktemp("broken")
    (home / "empty").mkdir()
    for name in ("corrupt", "truncated", "no-tokenizer", "no-template", "bad-config"):
        write_model(home / name, template=None if name == "no-template" else "{{ messages }}")
    weights = home / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (home / "corrupt" / "model.safetensors").write_bytes(b"\xff" * 3000)
    for file in (home / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    (home / "bad-config" / "config.json").write_text("{")
    bert = BertConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(bert).save_pretrained(home / "not-causal")
    write_tokenizer(home / "not-causal")
    write_model(home / "other-vocabulary", vocab=300)
    return home


def refused(*arguments: object, stdin: str | bytes | None = "") -> str:
    """The one sentence on standard error."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("missing", "missing does not exist"),
        ("empty", "has no config.json"),
        ("bad-config", "config.json is not JSON"),
        ("not-causal", "BertForMaskedLM, which is not a causal"),
        ("corrupt", "damaged or cut short"),
        ("truncated", "damaged or cut short"),
        ("no-tokenizer", "no tokenizer in the folder"),
    ],
)
def test_a_bad_folder_is_refused_in_one_sentence(broken, folder, words):
    assert words in refused("generate", "the cat", "--model", broken / folder)


@pytest.mark.parametrize("folder", ["missing", "empty", "not-causal", "corrupt"])
def test_inspect_refuses_a_folder_without_a_model(broken, folder):
    refused("inspect", broken / folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--max-tokens", 0), "max_tokens is 0; it must be at least 1"),
        (("--max-tokens", -3), "max_tokens is -3"),
        (("--temperature", -1), "temperature is -1.0"),
        (("--top-p", 1.5), "top_p is 1.5"),
        (("--top-k", 0), "top_k is 0"),
        (("--min-p", 2), "min_p is 2.0"),
        (("--repetition-penalty", 0), "repetition_penalty is 0.0"),
        (("--n", 0), "n is 0"),
        (("--stop", ""), "stop is"),
        (("--seed", 2**65), "seed is"),
        (("--max-tokens", "many"), "'--max-tokens'"),
        (("--max-tokens", 1000), "exceeds the context of 256 tokens"),
        (("--memory", "20K"), "exceeds the cache"),
        (("--memory", "10"), "holds no token"),
        (("--memory", "lots"), "such as 512M or 2G"),
        (("--memory", "900000G"), "does not have; give less memory"),
        (("--drafter", "crystal-ball"), "drafter 'crystal-ball' is unknown; there are eagle, eagle3, hydra, hydra++, lookup"),
        (("--drafter", "model"), "model:PATH"),
        (("--drafter", "lookup+"), "drafter 'lookup+' has nothing on one side of a plus"),
        (("--drafter", "auto:"), "drafter 'auto:' lacks a name"),
        (("--drafter", "auto+lookup"), "write auto, or auto:NAME,NAME"),
        (("--drafter", "lookup:3"), "takes no argument"),
        (("--drafter", "model:nowhere/at/all"), "does not exist"),
        (("--drafter", "none", "--planner", "chain:3"), "drafts nothing"),
        (("--planner", "random:3"), "is unknown"),
        (("--planner", "chain:x"), "cannot be read"),
        (("--planner", "chain:0"), "depth is 0; it must be at least 1"),
        (("--planner", "best:leaves=3"), "none of nodes, depth"),
        (("--planner", "tree:8"), "measure a folder of heads with `headstart tune"),
        (("--drafter", "lookup", "--planner", "tree:8"), "drafter 'lookup' has none"),
        (("--planner", "tree:0"), "nodes is 0; it must be at least 1"),
        (("--device", "abacus"), "device 'abacus' is not supported"),
        (("--threads", 0), "threads is 0"),
        (("--accept", "everything"), "everything"),
        (("--dtype", "float7"), "float7"),
        (("--bogus",), "--bogus"),
        (("--logprobs", 2), "--json"),
        (("--json", "--logprobs", -1), "logprobs is -1"),
        (("--json", "--show-drafts"), "drop one of them"),
        (("--raw", "--system", "x"), "drop one of them"),
    ],
)
def test_a_bad_setting_is_refused_in_one_sentence(model_folder, settings, words):
    assert words in refused("generate", "the cat", "--model", model_folder, *settings)


def test_a_calibrated_tree_may_be_that_of_the_default_drafter():
    text = [
        answer("generate", "the cat", "--max-tokens", 6, *planner, "--json")["text"] for planner in ((), ("--planner", "tree:8"))
    ]
    assert text[0] == text[1]


def test_a_drafter_of_another_vocabulary_is_refused_with_both_sizes(model_folder, broken):
    sentence = refused("generate", "the cat", "--model", model_folder, "--drafter", f"model:{broken / 'other-vocabulary'}")
    assert "300 tokens" in sentence
    assert "320" in sentence


def test_a_prompt_longer_than_the_context_is_refused(model_folder):
    assert "exceeds the context" in refused("generate", "the cat and the sea " * 100, "--model", model_folder)


def test_an_empty_prompt_is_refused(model_folder):
    assert "empty" in refused("generate", "--model", model_folder, stdin="")
    assert "empty" in refused("generate", "--model", model_folder, "--raw", "")


def test_invalid_utf8_on_standard_input_is_refused_in_one_sentence(model_folder):
    assert "not valid UTF-8 (byte 0xff at offset 3)" in refused("generate", "--model", model_folder, stdin=b"cat\xff\xfe")
    assert "not valid UTF-8" in refused("chat", "--model", model_folder, stdin=b"\xc3(\n")


def test_chat_without_a_template_is_refused(broken):
    assert "no chat template" in refused("chat", "--model", broken / "no-template", stdin="the cat\n")
    assert "no chat template" in refused("generate", "the cat", "--system", "x", "--model", broken / "no-template")


def test_an_unknown_command_is_refused_in_one_sentence():
    assert "fly" in refused("fly")


# -- real processes --


def start(*arguments: object) -> subprocess.Popen[str]:
    """A process that can be interrupted even where the tests run in the background and ignore Ctrl-C."""
    command = [sys.executable, "-c", "from headstart.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **pipes)


@pytest.fixture(scope="session")
def endless_folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "endless", context=200_000)


@pytest.mark.slow
def test_interrupting_keeps_the_partial_text(endless_folder):
    process = start("generate", "the cat", "--model", endless_folder, "--max-tokens", 100_000, "--ignore-eos", "--drafter", "none")
    first = process.stdout.read(40)  # the answer is being streamed
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first) == 40
    assert rest.endswith("\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("several", [1, 2])
def test_interrupting_keeps_the_partial_json(model_folder, monkeypatch, several):
    rounds = iter(range(8))
    original_advance = Engine.advance

    def advance(engine: Engine, is_done: Callable[[], bool]) -> None:
        if next(rounds, None) is None:
            raise KeyboardInterrupt
        original_advance(engine, is_done)

    monkeypatch.setattr(Engine, "advance", advance)
    result = run("generate", "the cat", "--model", model_folder, "--ignore-eos", "--drafter", "none", "--n", several, "--json")
    assert result.exit_code == 130
    for line in result.stdout.splitlines():
        partial = json.loads(line)
        assert partial["finish_reason"] == "abort"
        assert len(partial["token_ids"]) >= 6
        assert partial["text"]


@pytest.mark.slow
def test_only_the_text_is_printed(model_folder):
    process = start("generate", "the cat", "--model", model_folder, "--max-tokens", "5", "--ignore-eos")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert err == ""
    assert out == run("generate", "the cat", "--model", model_folder, "--max-tokens", 5, "--ignore-eos").stdout


@pytest.mark.slow
def test_measuring_costs_for_the_first_time_is_told_in_one_line_to_a_terminal(model_folder, tmp_path):
    arguments = ("generate", "the cat", "--model", model_folder, "--max-tokens", 4, "--raw", "--json")
    command = [sys.executable, "-m", "headstart", *map(str, arguments)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    terminal, end = pty.openpty()
    first = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=end, text=True, check=True)
    os.close(end)
    told = os.read(terminal, 4096).decode()
    os.close(terminal)
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert told.count("measuring what rounds cost on this machine") == 1
    assert second.stderr == ""
    assert json.loads(first.stdout)["stats"]["tokens"] == json.loads(second.stdout)["stats"]["tokens"] == 4


def test_a_warning_at_the_command_line_is_one_line_without_a_place_in_the_code(capsys, monkeypatch):
    monkeypatch.setattr(cli.warnings, "showwarning", cli._show_warning)
    cli.warnings.showwarning(UserWarning("two\n lines"), UserWarning, "file.py", 7)
    assert capsys.readouterr().err == "headstart: warning: two lines\n"
