"""benchmarks/gpu_check.py runs without a GPU, and all checks pass."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.mark.slow
def test_the_check_of_a_device_runs_on_a_cpu(model_folder, draft_folder, monkeypatch, capsys):
    arguments = ["--model", str(model_folder), "--draft", str(draft_folder), "--device", "cpu", "--tokens", "3"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code == 0, printed
    result = json.loads(printed.splitlines()[-1])
    assert len(result["float32"]["identity"]) == len(result["bfloat16"]["identity"]) == 57
    assert set(result["bfloat16"]) == {"identity", "together", "pass_ms", "generate", "waits", "memory"}
