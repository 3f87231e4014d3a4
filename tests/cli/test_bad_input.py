"""Mistakes of users and errors of the system: one sentence and exit code 2, and none is ignored."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import write_model
from heads import heads_for
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import headstart
from headstart.cli import app
from headstart.formats import describe_target, save
from headstart.speculation.params import SamplingParams
from headstart.target.loading import load_model
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.chat_template import render
from headstart.text.jsonl import read_records
from headstart.text.tokenizer import encode_prompt

QUICK = ("--max-tokens", 3, "--no-exact")


def run(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def refused(*arguments: object) -> str:
    """The one sentence on standard error."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


def changed(folder: Path, file: str = "config.json", **values: object) -> Path:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))
    return folder


@pytest.fixture
def own_model(model_folder, tmp_path):
    """A model that a test may break."""
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def own_heads(model_folder, tmp_path):
    """Heads that a test may break."""
    target = Target(load_model(model_folder))
    save(
        tmp_path / "heads",
        heads_for(target, "medusa", num_heads=2),
        describe_target(target.model, load_tokenizer(model_folder)),
        {},
    )
    return tmp_path / "heads"


# -- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "mps", "xla", "cuda:x", ""])
def test_an_unsupported_device_is_refused_with_the_supported_ones(model_folder, device):
    assert "write auto, cpu, cuda or cuda:NUMBER" in refused("generate", "a", "--model", model_folder, "--device", device)
    with pytest.raises(ValueError, match="write auto, cpu, cuda or cuda:NUMBER"):
        headstart.load(model_folder, device=device)


def test_more_answers_than_can_be_queued_are_refused_before_anything_is_loaded(tmp_path):
    assert "n is 10000000; it must be between 1 and 16384" in refused("generate", "a", "--model", tmp_path, "--n", 10_000_000)
    assert SamplingParams(n=16384).n == 16384


@pytest.mark.parametrize("command", [("generate", "a"), ("chat",), ("inspect",), ("bench",)])
def test_a_name_of_5000_letters_is_refused_in_one_short_sentence(command):
    name = "a" * 5000
    message = refused(*command, *(("--model", name) if command != ("inspect",) else (name,)))
    assert len(message) < 400


@pytest.mark.parametrize("setting", [("--temperature", "hot"), ("--max-tokens", "many"), ("--seed", 2**80), ("--threads", 0)])
def test_a_setting_of_the_wrong_type_is_refused_in_one_sentence(model_folder, setting):
    refused("generate", "a", "--model", model_folder, *setting)


@pytest.mark.parametrize("option", [("--system", "\udcff"), ("--stop", "\udcff"), ()])
def test_bytes_that_are_not_utf8_are_refused_in_one_sentence(model_folder, option):
    prompt = "a" if option else "\udcff"
    message = refused("generate", prompt, "--model", model_folder, *option, *QUICK)
    assert "UTF-8" in message or "surrogate" in message


def test_half_of_a_surrogate_pair_is_refused_by_name(model_folder):
    tokenizer = load_tokenizer(model_folder)
    with pytest.raises(ValueError, match=r"the prompt holds half of a surrogate pair \(U\+D800 at 2\)"):
        encode_prompt(tokenizer, "a \ud800")
    with pytest.raises(ValueError, match="the 'content' of message 0 holds half of a surrogate pair"):
        encode_prompt(tokenizer, [{"role": "user", "content": "\udfff"}])


# -- models -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"max_position_embeddings": None}, {"max_position_embeddings": "abc"}, {"rms_norm_eps": "x"}, {"num_attention_heads": 7},
        {"dtype": "float7"}, {"rope_parameters": [1]}, {"architectures": 3}, {"num_hidden_layers": 10**30}, {"vocab_size": -1},
        {"hidden_size": 10**18}, {"max_position_embeddings": 0}, {"eos_token_id": "abc"},
    ],
)  # fmt: skip
def test_a_configuration_of_the_wrong_type_is_refused_in_one_sentence(own_model, values):
    changed(own_model, **values)
    (own_model / "generation_config.json").unlink()
    assert str(own_model) in refused("inspect", own_model) or "eos_token_id" in values


@pytest.mark.parametrize(
    ("kind", "context"), [("llama", 1), ("llama", 8), ("gpt2", 1), ("gpt2", 2), ("gpt2", 8), ("gpt2", 15), ("gpt2", 17)]
)
def test_a_context_below_16_gives_the_tokens_of_the_model_itself(tmp_path, context, kind):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = write_model(tmp_path, context=context, template=None)
    if kind == "gpt2":  # positions are learned, so that one beyond the context would be an error
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=context, bos_token_id=None, eos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    if context == 1:
        with pytest.raises(ValueError, match="takes texts of 1 tokens"):
            headstart.load(folder)
        return
    llm = headstart.load(folder, drafter="lookup")
    tokens = llm.generate([[5]], max_tokens=context - 1, ignore_eos=True)[0].token_ids
    model, text = AutoModelForCausalLM.from_pretrained(folder), [5]
    with torch.no_grad():
        for _ in range(context - 1):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    assert list(tokens) == text[1:]


def test_weights_with_more_layers_than_the_configuration_are_refused(own_model):
    changed(own_model, num_hidden_layers=1)
    assert "its weights have a layer 1, counted from 0, and its config.json says that it has 1 layers" in refused(
        "generate", "a", "--model", own_model
    )


def test_experts_that_are_stored_one_by_one_do_not_count_as_layers(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(tmp_path).config.num_hidden_layers == 2
    changed(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match="its weights have a layer 1"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"eos_token_id": "abc"}', '{"eos_token_id": [[]]}'])
def test_a_broken_generation_config_is_refused(own_model, text):
    (own_model / "generation_config.json").write_text(text)
    refused("generate", "a", "--model", own_model, *QUICK)


def test_a_model_with_nan_logits_is_refused(own_model):
    tensors = load_file(own_model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0] = float("nan")
    save_file(tensors, own_model / "model.safetensors", metadata={"format": "pt"})
    result = run("inspect", own_model)
    assert (result.exit_code, "it answers with nan" in result.stderr) == (2, True)


def test_a_tensor_of_another_shape_is_named_with_both(own_model):
    tensors = load_file(own_model / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, own_model / "model.safetensors", metadata={"format": "pt"})
    assert "first model.norm.weight: [31], not [32]" in refused("generate", "a", "--model", own_model)


def test_inspect_of_a_refused_model_exits_with_2_and_reports_everything_else(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    result = run("inspect", tmp_path, "--json")
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert report["architecture"] == "BloomForCausalLM"
    assert report["problems"][0] in " ".join(result.stderr.split())


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, '{"a":' * 90 + "1" + "}" * 90, "[1, 2]"])
def test_files_of_a_model_that_are_lists_or_nested_deeply_are_named(own_model, file, content):
    (own_model / file).write_text(content)
    assert file in refused("generate", "a", "--model", own_model)


def test_an_adapter_of_itself_is_refused_in_one_sentence(tmp_path):
    for one, other in (("a", "b"), ("b", "a"), ("self", "self")):
        (tmp_path / one).mkdir()
        (tmp_path / one / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / other)}))
    for one in ("a", "self"):
        assert "adapts itself" in refused("generate", "a", "--model", tmp_path / one)


# -- chat templates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 // 0 }}", "division"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "has not ended after 0.1 seconds"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
    ],
)
def test_a_chat_template_that_fails_or_never_ends_is_one_sentence(model_folder, monkeypatch, template, words):
    monkeypatch.setattr("headstart.text.chat_template.LONGEST_RENDERING", 0.1)
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = template
    before = sys.gettrace()
    with pytest.raises(ValueError, match=f"the chat template of .* fails on these messages: .*{words}"):
        render(tokenizer, [{"role": "user", "content": "a"}], return_dict=False)
    assert sys.gettrace() is before


# -- heads ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["tune", "probe", "generate"])
def test_heads_of_nan_are_refused_wherever_they_are_used(model_folder, own_heads, command):
    tensors = load_file(own_heads / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, own_heads / "model.safetensors")
    arguments = {
        "tune": ("tune", own_heads, "--model", model_folder, "--limit", 1, "--max-tokens", 3),
        "probe": ("inspect", own_heads, "--model", model_folder, "--probe"),
        "generate": ("generate", "a", "--model", model_folder, "--drafter", own_heads),
    }
    assert f"values in {name} that are not finite (nan or inf)" in refused(*arguments[command])


def test_the_progress_bar_of_tuning_counts_every_answer_and_turn(model_folder, own_heads, monkeypatch, quick_costs):
    from contextlib import contextmanager

    progress_calls: list[int] = []

    @contextmanager
    def progress(total):
        progress_calls.append(total)
        yield lambda: progress_calls.append(1)

    monkeypatch.setattr("headstart.cli.tune.progress", progress)
    monkeypatch.setattr("headstart.bench.calibrate.acceptance", lambda ranks, width: ((0.5,) * width, (0.25,) * width))
    arguments = ("tune", own_heads, "--model", model_folder, "--limit", 3, "--max-tokens", 4, "--temperature", 0.7)
    result = run(*arguments, "--prompts", "questions", "--rows", 1, "--rows", 2)
    assert result.exit_code == 0, result.output
    total, *steps = progress_calls
    assert total == len(steps) == 2 + 2 + 2  # one prompt is held out: two turns for each number of rows


# -- files ------------------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_of_a_jsonl_file_is_skipped(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert [fields["text"] for _, fields in read_records(file)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[" * 100_000, "line 2 of .* is nested more than 64 deep"),
        ('{"a": ' * 70 + "1" + "}" * 70, "line 2 of .* is nested more than 64 deep"),
        (r'{"text": "\ud800"}', "line 2 of .* holds half of a surrogate pair"),
        ('{"a": ' + "9" * 5000 + "}", "line 2 of .* is not JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, words):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "\\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(ValueError, match=words):
        list(read_records(file))


@pytest.mark.parametrize("name", ["folder", "folder/missing/../../file/below"])
def test_an_output_that_cannot_be_written_is_refused(model_folder, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    out = tmp_path / name
    refused("distill", tmp_path / "prompts.jsonl", "--model", model_folder, "--out", out, *QUICK)
    refused("bench", "--model", model_folder, "--out", out)
    assert (tmp_path / "file").read_text() == "kept"


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
def test_output_to_a_full_disk_is_refused_in_one_sentence(model_folder):
    command = [sys.executable, "-m", "headstart", "--version"]
    with FULL.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no space left" in done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
def test_a_device_is_refused_as_the_file_of_answers(model_folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    message = refused("distill", tmp_path / "prompts.jsonl", "--model", model_folder, "--out", FULL, *QUICK[:2])
    assert "no ordinary file" in message


def test_distill_on_a_full_disk_keeps_complete_lines_and_can_be_continued(model_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "the cat {number}"}}\n' for number in range(4)))
    command = ("distill", tmp_path / "prompts.jsonl", "--model", model_folder, "--max-tokens", 3, "--rows", 1, "--out")
    assert run(*command, tmp_path / "whole").exit_code == 0
    complete = (tmp_path / "whole").read_bytes()
    capacity = len(complete) // 2  # a disk that fills up in the middle of a line
    import headstart.distill.distill as module

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def fileno(self):
            return self.file.fileno()

        def write(self, content):
            left = capacity - os.fstat(self.file.fileno()).st_size
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content[:left])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    opened = module._opened
    monkeypatch.setattr(module, "_opened", lambda path: FullDisk(opened(path)))
    message = refused(*command, tmp_path / "part")
    part = (tmp_path / "part").read_bytes()
    assert "No space left on device" in message
    assert f"the {part.count(bytes([10]))} conversations that are in it are whole" in message
    assert part.endswith(b"\n")
    assert set(part.splitlines()) < set(complete.splitlines())
    monkeypatch.setattr(module, "_opened", opened)
    assert run(*command, tmp_path / "part").exit_code == 0
    assert sorted((tmp_path / "part").read_bytes().splitlines()) == sorted(complete.splitlines())


@pytest.mark.parametrize("part", ["config", "log", "checkpoint"])
def test_train_on_a_full_disk_fails_in_one_sentence(model_folder, tmp_path, monkeypatch, part):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "data.jsonl").write_text('{"text": "the cat and the sea"}\n' * 3)
    if part == "config":
        write = Path.write_text
        monkeypatch.setattr(
            Path, "write_text", lambda path, *rest, **more: (full if path.name == "config.yaml" else write)(path, *rest, **more)
        )
    elif part == "log":
        monkeypatch.setattr("headstart.training.run_log.json.dumps", full)
    else:
        monkeypatch.setattr("accelerate.Accelerator.save_state", full)
    data = ("--data", tmp_path / "data.jsonl", "--steps", 1, "--held-out", 0, "--length", 8, "--log-every", 1)
    result = run("train", "medusa", "--target", model_folder, "--set", "num_heads=1", "--out", tmp_path / "out", *data)
    assert result.exit_code == 2, result.exception
    assert "Traceback" not in result.stderr
    assert "No space left on device" in " ".join(result.stderr.split("headstart: ")[-1].split())


def test_errors_of_the_system_and_of_memory_are_reported_in_one_sentence(model_folder, monkeypatch):
    for error, words in (
        (PermissionError(errno.EACCES, "Permission denied", "/a/file"), "/a/file: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "/a: Is a directory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), "there is not enough memory"),
    ):

        def fail(*arguments, error=error, **settings):
            raise error

        monkeypatch.setattr("headstart.load", fail)
        assert words in refused("generate", "a", "--model", model_folder)


def test_a_bug_still_has_its_traceback(model_folder, monkeypatch):
    def fail(*arguments, **settings):
        raise AssertionError("what we did")

    monkeypatch.setattr("headstart.load", fail)
    assert isinstance(run("generate", "a", "--model", model_folder).exception, AssertionError)
