"""An export against its manifest, and against an engine: here a program that says what vLLM would."""

import json
import stat
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file

from headstart.bench.conformance import ours, vllm_process, vllm_worker
from headstart.bench.conformance.rounds import Decoded, acceptance, compare
from headstart.bench.conformance.verify import speculation, verify
from headstart.drafters.medusa import Medusa, MedusaConfig
from headstart.formats import describe_target, save
from headstart.formats.exporting import export_heads
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model
from headstart.target.tokenizer_loading import load_tokenizer

DRAFTS = 2


@pytest.fixture(scope="module")
def heads(model_folder, tmp_path_factory):
    """A folder of Medusa heads that are sometimes right."""
    model = load_model(str(model_folder), "auto", "cpu", False)
    torch.manual_seed(0)
    made = Medusa(MedusaConfig(num_heads=DRAFTS), 32, 320).bind(EmbedHead(model)).init_from_target()
    folder = tmp_path_factory.mktemp("heads") / "medusa"
    save(folder, made, describe_target(model, load_tokenizer(str(model_folder))), {})
    return folder


@pytest.fixture
def export(heads, model_folder, tmp_path):
    export_heads(heads, str(model_folder), "vllm", tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def plan(model_folder):
    return ours.Plan(str(model_folder), ("stories",), 2, 12, DRAFTS)


@pytest.fixture
def engine(tmp_path):
    """Makes a program that stands for a Python with vLLM and gives these answers."""

    def made(answers):
        lines = {"answers": json.dumps({"version": "0.32.0", "answers": answers}), "null": '{"version": "0.32.0", "answers": null}'}
        for name, line in lines.items():
            (tmp_path / name).write_text(line + "\n")
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\njob=$(cat)\n[ "$job" = null ] && cat {tmp_path}/null || cat {tmp_path}/answers\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return made


def as_vllm(answers):
    return [{"tokens": one.tokens, "rounds": one.rounds, "seconds": [1.0]} for one in answers]


# -- rounds --


def test_a_round_without_room_for_a_whole_chain_does_not_count_for_acceptance():
    answer = Decoded((9,) * 9, (1, 3, 1, 2, 2))  # 8, 5, 4 and 2 tokens are left before the rounds
    assert answer.kept(3) == [2, 0, 1]
    assert answer.kept(5) == [2]
    assert acceptance([answer], 3) == pytest.approx((2 / 3, 1 / 3, 0))


def test_rounds_and_texts_are_compared_one_by_one():
    one, other = Decoded((1, 2, 3, 4, 5), (1, 2, 2)), Decoded((1, 2, 3, 4, 5), (1, 1, 1, 2))
    assert compare([one, one], [one, one], 2).is_equal
    found = compare([one, one], [one, other], 2)
    assert (found.rounds, found.equal_rounds, found.texts, found.equal_texts) == (7, 4, 2, 2)
    assert not found.is_equal
    assert not compare([one], [Decoded((1, 2, 3, 4, 6), (1, 2, 2))], 2).is_equal


def test_rounds_that_do_not_make_up_the_answer_are_refused():
    with pytest.raises(ValueError, match=r"rounds of \[1, 2\] tokens do not make up an answer of 4 tokens"):
        Decoded((1, 2, 3, 4), (1, 2))


# -- the worker --


def test_the_worker_reports_the_tokens_of_every_step(monkeypatch):
    class Engine:
        def __init__(self):
            self.left = []

        def add_request(self, name, prompt, params):
            self.left = [[prompt["prompt_token_ids"][0]], [], [7, 8, 9], [5]]

        def has_unfinished_requests(self):
            return bool(self.left)

        def step(self):
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.left.pop(0))])]

    made = []

    def llm(model, **settings):
        made.append(settings)
        return SimpleNamespace(llm_engine=Engine())

    vllm, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.LLM, vllm.SamplingParams, params.RequestOutputKind = llm, SimpleNamespace, SimpleNamespace(DELTA="delta")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    job = vllm_process.Job("folder", [[3, 1], [4]], 5, {"num_speculative_tokens": 4}, repeat=2, settings={"tokenizer": "x"})
    answers = vllm_worker.measure(vars(job))
    assert [one["tokens"] for one in answers] == [[3, 7, 8, 9, 5], [4, 7, 8, 9, 5]]
    assert [one["rounds"] for one in answers] == [[1, 3, 1]] * 2
    assert {len(one["seconds"]) for one in answers} == {2}
    assert made[0]["tokenizer"] == "x"
    assert made[0]["max_model_len"] >= 2 + 5 + 4  # room for a whole chain until the end


def test_a_python_without_vllm_has_no_version(tmp_path):
    assert vllm_process.version(sys.executable) is None
    with pytest.raises(ValueError, match="has no vLLM; install it there"):
        vllm_process.answers(sys.executable, vllm_process.Job("x", [[1]], 1))
    with pytest.raises(ValueError, match=r"vLLM cannot be run: .*nowhere: No such file"):
        vllm_process.version(str(tmp_path / "nowhere"))


def test_what_vllm_dies_of_is_named(tmp_path):
    path = tmp_path / "python"
    path.write_text(
        "#!/bin/sh\ncat > /dev/null\necho 'x.OddError: no such layer' >&2\necho 'RuntimeError: engine died' >&2\nexit 3\n"
    )
    path.chmod(0o700)
    with pytest.raises(ValueError, match=r"^vLLM ended with exit status 3: x.OddError: no such layer; "):
        vllm_process.answers(str(path), vllm_process.Job("x", [[1]], 1), log=tmp_path / "log")
    assert "engine died" in (tmp_path / "log").read_text()


# -- exports --


def test_an_engine_that_keeps_the_same_drafts_passes(export, heads, plan, engine):
    _, mine = ours.decode(plan, heads)
    found = verify(export, plan, engine(as_vllm(mine)))
    assert found.is_right
    assert found.version == "0.32.0"
    assert found.comparison.equal_rounds == found.comparison.rounds == sum(len(one.rounds) for one in mine)
    assert any(max(one.rounds) > 1 for one in mine)


def test_an_engine_that_keeps_fewer_drafts_fails_with_exit_code_1(export, heads, plan, engine, model_folder):
    _, mine = ours.decode(plan, heads)
    others = [Decoded(one.tokens, (1,) * len(one.tokens)) for one in mine]
    python = engine(as_vllm(others))
    options = ("--prompts", "stories", "--limit", 2, "--max-tokens", 12, "--chain", DRAFTS)
    result = run("verify-export", export, "--model", model_folder, "--python", python, *options)
    assert result.exit_code == 1, result.stderr
    assert "equal texts   2/2" in result.stdout
    assert ["vLLM", "0.32.0", "0.000", "0.000"] in [line.split() for line in result.stdout.splitlines()]


def test_a_changed_export_is_found_before_any_engine_runs(export, model_folder):
    tensors = load_file(export / "model.safetensors")
    name = next(name for name in tensors if "bias" in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors | {"more": torch.zeros(1)}, export / "model.safetensors", metadata={"format": "pt"})
    result = run("verify-export", export, "--model", model_folder, "--python", "/nowhere")
    assert result.exit_code == 1, result.stderr
    said = " ".join(result.stdout.split())
    assert f"model.safetensors has other numbers in {name} than were written" in said
    assert "has 1 tensors that the manifest does not name, first more" in said


def test_without_the_engine_the_files_are_checked_and_a_note_says_so(export, plan):
    found = verify(export, plan)
    assert found.is_right
    assert found.comparison is None
    assert found.notes == (f"vLLM was not run: {sys.executable} has none; name the Python that has it with --python",)


def test_of_other_engines_only_the_files_are_checked(heads, model_folder, plan, tmp_path):
    export_heads(heads, str(model_folder), "tgi", tmp_path / "tgi")
    found = verify(tmp_path / "tgi", plan, "/nowhere")
    assert found.is_right
    assert "tgi was not run: only vLLM can be, so the files alone were checked" in found.notes[0]


def test_a_folder_that_is_no_export_is_refused(heads, tmp_path):
    for folder in (heads, tmp_path / "nowhere"):
        result = run("verify-export", folder)
        assert result.exit_code == 2
        assert "is no export of headstart: it has no conformance.json" in result.stderr


def test_vllm_gets_the_configuration_of_the_launch_command(export):
    manifest = json.loads((export / "conformance.json").read_text())
    config = speculation(manifest | {"chain_by_batch": [[1, 2, 5]]}, export, 2)
    assert config == {"method": "medusa", "model": str(export), "num_speculative_tokens": 2}
