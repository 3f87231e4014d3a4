"""benchmarks/plain_pass.py: the parts of a pass add up, and passes beside a busy process are told from those alone."""

import os
import sys
import time
from pathlib import Path

import pytest

from headstart.target.kernels.library import library
from headstart.target.target import Target

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import plain_pass

needs_library = pytest.mark.skipif(library() is None, reason="there are no compiled kernels for this processor, or no compiler")


@needs_library
def test_the_parts_of_a_pass_add_up_and_attention_layers_are_seen_as_what_they_are(model_folder):
    target, lib = Target.load(model_folder, dtype="float32"), library()
    functions = {name: getattr(lib, name) for name in plain_pass.PART_OF}
    cache, seat = plain_pass.filled(target, 20, 3)
    passes = {
        name: plain_pass.one_pass(lib, lambda: target.score(plain_pass.forest_of(target, 3, 20), cache, [seat]), variant)
        for name, variant in plain_pass.variants(lib).items()
    }
    for times in passes.values():
        assert sum(time for part, time in times.items() if part != "whole") == pytest.approx(times["whole"])
        assert min(times.values()) > 0
    kinds = {name: {*times} - {"products", "norms", "rest", "whole"} for name, times in passes.items()}
    assert kinds == {
        "as it is": {"attention layers"},
        "products alone": set(),
        "attention layers as modules": {"attention"},
        "torch with threads of its own": {"attention layers"},
    }
    assert functions == {name: getattr(lib, name) for name in plain_pass.PART_OF}


def test_what_attention_layers_take_beyond_their_products_is_attention():
    times = {"products": 10.0, "norms": 1.0, "attention": 0.0, "attention layers": 8.0, "rest": 2.0, "whole": 21.0}
    found = plain_pass.split(times, products=15.0)
    assert found == {"products": 15.0, "norms": 1.0, "attention": 3.0, "attention layers": 0.0, "rest": 2.0, "whole": 21.0}


def test_a_busy_process_uses_a_processor_until_the_end_of_the_context():
    before = os.times()
    with plain_pass.busy_process():
        time.sleep(0.1)
    assert os.times().children_user > before.children_user


def test_both_kernels_are_measured_one_in_a_process_of_its_own(model_folder, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(plain_pass, "repeat", started.append)
    arguments = ["plain_pass.py", str(model_folder), "--passes", "4", "--nodes", "1", "3", "--context", "8", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    plain_pass.main()
    lines = capsys.readouterr().out.splitlines()
    assert started == (["torch"] if library() else [])
    assert sum(line.startswith("| as it is |") for line in lines) == (2 if library() else 0)
    row = next(line for line in lines if line.startswith("| 3 | "))
    alone, beside, ratios = ([float(number) for number in cell.split(", ")] for cell in row.strip("| ").split(" | ")[1:])
    assert alone[1] <= alone[2]
    assert ratios[2] == pytest.approx(beside[2] / alone[1], rel=0.5)
