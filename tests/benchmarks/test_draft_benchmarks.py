"""benchmarks/shared_noise.py and benchmarks/draft_cost.py: their numbers, and that they run on a tiny model."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
from heads import heads_for

from headstart.bench import runner
from headstart.drafters.parts import grow
from headstart.engine.stats import Stats
from headstart.formats import describe_target, save
from headstart.speculation.params import SamplingParams
from headstart.speculation.rows import Rows
from headstart.target.kernels.library import library
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import draft_cost
import shared_noise


def result_of(main: Callable[[], None], monkeypatch, capsys, *arguments: str) -> dict:
    """The JSON that a script prints last."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def answers(rounds: int, tokens: int) -> Stats:
    return Stats(row_rounds=rounds, tokens=tokens)


# -- shared_noise.py --


def test_the_jackknife_of_equal_prompts_is_the_standard_error_of_their_mean():
    parts = tuple(answers(10, tokens) for tokens in (20, 31, 24, 25))
    cell = shared_noise.Cell("mtp", 1.0, "chain:4", "coupled", parts, 0)
    assert cell.tau(range(4)) == 2.5
    assert shared_noise.standard_error(cell.tau, 4) == pytest.approx(stdev([2.0, 3.1, 2.4, 2.5]) / 2)
    assert math.isnan(shared_noise.standard_error(cell.tau, 1))


def test_a_ratio_that_is_the_same_for_every_prompt_has_no_error():
    one, other = (
        shared_noise.Cell("mtp", 1.0, "chain:4", "coupled", tuple(answers(10, times * tokens) for tokens in (11, 19)), 0)
        for times in (3, 2)
    )
    assert shared_noise.with_error(shared_noise.ratio(one, other), 2) == pytest.approx((1.5, 0.0))


def test_a_drafter_that_is_the_target_is_always_right_with_its_noise_and_not_without(model_folder, monkeypatch, capsys):
    drafter = f"model:{model_folder}"
    arguments = ["--model", model_folder, "--drafter", drafter, "--shape", "chain:3", "--shape", "best:nodes=4,depth=3"]
    arguments += ["--temperatures", "0,1", "--limit", "2", "--answers", "2", "--max-tokens", "17", "--dtype", "float32"]
    cells = result_of(shared_noise.main, monkeypatch, capsys, *arguments)["cells"]
    tau = {(cell["temperature"], cell["shape"], cell["way"]): cell["tau"] for cell in cells}
    assert len(cells) == 2 * (3 + 2)  # a growing tree has no rejection
    assert all(tau[0, "chain:3", way] == 4 for way in shared_noise.RULE_OF)
    assert tau[1, "chain:3", "coupled"] == tau[1, "chain:3", "rejection"] == 4
    assert tau[1, "chain:3", "picked"] < 3
    assert all(cell["parts"][1]["tokens"] == 2 * 16 for cell in cells)  # the first token comes with the prompt


def test_the_default_shapes_leave_out_a_tree_of_an_uncalibrated_drafter():
    assert shared_noise.shapes_of("lookup", None, 1.0, None) == ["chain:4", "best"]
    assert shared_noise.shapes_of("mtp", None, 1.0, None) == list(shared_noise.DEFAULT_SHAPES)
    with pytest.raises(ValueError, match="tree:8"):
        shared_noise.shapes_of("lookup", ["tree:8"], 1.0, None)


def test_a_text_that_differs_from_plain_decoding_stops_the_comparison(model_folder):
    target = Target.load(model_folder, dtype="float32", exact=True)
    setup = runner.Setup(target, (runner.Task((5, 6, 7)),), SamplingParams(max_tokens=8, seed=1, ignore_eos=True))
    plain = [runner.answer(setup, *runner.prepare(setup, []), 0)]
    assert shared_noise.near_ties(setup, plain, plain) == 0
    wrong = replace(plain[0], tokens=(*plain[0].tokens[:-1], 9 + plain[0].tokens[-1] % 9))
    with pytest.raises(AssertionError, match="token 7"):
        shared_noise.near_ties(setup, plain, [wrong])


# -- draft_cost.py --


def clocked(*events: str) -> draft_cost.Round:
    """A round in which event `i` comes after `i` seconds; `<` leaves the operation that was entered last."""
    ticks = iter(sum(range(1 + index)) for index in range(99))
    clock = draft_cost.Clock(lambda: next(ticks))
    for event in events:
        clock.leave() if event == "<" else clock.enter(event)
    (measured,) = clock.rounds
    assert sum(measured.spent.values()) == measured.sum() == sum(range(len(events)))
    return measured


def test_a_level_includes_everything_up_to_its_choice():
    level = ("layers", "<", "project", "<", "tree", "choose", "<", "<")
    found = clocked("host", "propose", *level, *level, "<", "score", "project", "<", "<", "<")
    assert [found.sum("propose", level, "layers") for level in (1, 2)] == [3, 11]
    assert [found.sum("propose", level, "project") for level in (1, 2)] == [5, 13]
    assert [found.sum("propose", level, "choose") for level in (1, 2)] == [8, 16]
    assert [found.sum("propose", level, "tree") for level in (1, 2, 3)] == [7, 9 + 15, 17]
    assert (found.sum("score", what="project"), found.sum("score")) == (21, 20 + 21 + 22)


def test_parallel_heads_are_projected_level_by_level_before_any_choice():
    head, choice = ("layers", "<", "project", "<"), ("choose", "<")
    found = clocked("host", "propose", *head, *head, *choice, *choice, "<", "<")
    assert [found.sum("propose", level, "layers") for level in (1, 2, 3)] == [3, 7, 0]
    assert [found.sum("propose", level, "project") for level in (1, 2, 3)] == [5, 9, 0]
    assert [found.sum("propose", level, "choose") for level in (1, 2, 3)] == [11, 13, 0]


@pytest.mark.parametrize(("kind", "parents"), [("mtp", [1, 2, 2]), ("hydra", [1, 2, 2]), ("medusa", [1, 1, 1])])
def test_every_level_of_a_drafter_is_measured(kind, parents, model_folder, tmp_path, monkeypatch, capsys):
    target = Target.load(model_folder)
    save(tmp_path / kind, heads_for(target, kind), describe_target(target.model, load_tokenizer(model_folder)), {})
    before = Rows.choose, grow._TreeBuilder.select_beam
    arguments = ["--model", model_folder, "--drafter", tmp_path / kind, "--planner", "full:2,1,1", "--temperature", "1"]
    found = result_of(draft_cost.main, monkeypatch, capsys, *arguments, "--limit", "2", "--max-tokens", "24", "--threads", "1")[
        "ms"
    ]
    assert list(found["lines"].values()) == parents
    assert (found["nodes"], list(found["levels"])) == (7, ["1", "2", "3", "4"])  # the last is the end
    assert all(found["levels"][level][what] > 0 for level in "123" for what in ("noise", "choose", "tree"))
    in_one_call = library() is not None and kind == "mtp"  # its layers include the LM head
    assert all((found["levels"][level]["project"] > 0) == (not in_one_call or level == "1") for level in "123")
    assert (found["bytes"]["2"] is not None) == in_one_call
    assert all((found["levels"][level]["layers"] > 0) == (kind != "mtp" or level != "1") for level in "123")
    assert found["sum of these"] == pytest.approx(found["whole round"], rel=0.3)
    assert (Rows.choose, grow._TreeBuilder.select_beam) == before


def test_a_drafter_without_logits_is_refused(model_folder, monkeypatch, capsys):
    arguments = ["--model", model_folder, "--drafter", "lookup", "--limit", "1", "--max-tokens", "8", "--threads", "1"]
    with pytest.raises(SystemExit):
        result_of(draft_cost.main, monkeypatch, capsys, *arguments)
    assert "nothing to measure" in capsys.readouterr().err
