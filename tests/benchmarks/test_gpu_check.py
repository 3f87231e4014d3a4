"""benchmarks/gpu_check.py runs without a GPU, all checks pass, and it gives no verdict on a bandwidth that no GPU has."""

import json
import sys
from pathlib import Path

import pytest
from tiny import ARCHITECTURES, random_model

from headstart.target.target import Target

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_check
import gpu_speed


def result_of(monkeypatch, capsys, *arguments):
    """The exit code, and the JSON that the script prints last."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--tokens", "3", *arguments])
    code = gpu_check.main()
    printed = capsys.readouterr().out
    assert code == 0, printed
    return json.loads(printed.splitlines()[-1])


@pytest.mark.slow
def test_the_check_of_a_device_runs_on_a_cpu(model_folder, draft_folder, monkeypatch, capsys):
    models = ["--model", str(model_folder), "--draft", str(draft_folder)]
    result = result_of(monkeypatch, capsys, *models, "--only", "correctness")
    assert len(result["float32"]["identity"]) == len(result["bfloat16"]["identity"]) == 57
    assert set(result["bfloat16"]) == {"identity", "together", "waits", "memory"}
    assert set(result["float32"]["together"]) == {"padded"}


def test_the_speed_of_a_cpu_is_measured_without_a_verdict(monkeypatch, capsys):
    monkeypatch.setattr(gpu_speed, "NODES", (1, 3))
    monkeypatch.setattr(gpu_speed, "CONTEXTS", (8,))
    monkeypatch.setattr(gpu_speed, "measured_bandwidth", lambda device: 10.0)
    speed = result_of(monkeypatch, capsys, "--random", "2x64", "--only", "speed")["speed"]
    assert set(speed["forward_ms"]) == set(speed["answers"]) == {"row by row", "padded"}
    assert set(speed["forward_ms"]["padded"]) == {"1@8", "3@8"}
    assert set(speed["answers"]["padded"]) == {"plain", "lookup", "draft model"}
    assert speed["generate"]["eager"] > 0
    assert "verdict" not in speed
    assert speed["falls_short"] == []


def test_the_bytes_of_a_forward_leave_out_an_embedding_that_is_not_the_head():
    model = random_model(ARCHITECTURES["llama"]())
    weights = sum(weight.nbytes for weight in model.parameters())
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert gpu_speed.read_bytes(Target(model)) == weights - model.get_input_embeddings().weight.nbytes


@pytest.mark.parametrize(("one", "most", "is_short"), [(1.1, 1.12, []), (1.3, 1.31, ["T(1)"]), (1.1, 1.3, ["T(64) / T(1)"])])
def test_the_verdict_names_the_best_way_and_what_falls_short(one, most, is_short):
    report = gpu_speed.Report()
    gpu_speed.verdict(report, {"padded": {"1@8": 9.0, "64@8": 9.0}, "flex, graphs": {"1@8": one, "64@8": most}}, floor=1.0)
    assert [line.partition(":")[2].partition(":")[0].strip() for line in report.short] == is_short
    assert report.numbers["verdict"]["way"] == "flex, graphs"
    assert report.numbers["verdict"]["reached"] == (not is_short)
