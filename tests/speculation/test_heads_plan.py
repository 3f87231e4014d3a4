"""plan.json: what is written is read again, version 1 too, and anything else is refused by name."""

import json

import pytest

from headstart.speculation.calibration import Calibration
from headstart.speculation.cost import CostModel, DraftCost
from headstart.speculation.heads_plan import HeadsPlan, MachineCost, Tree, load_plan, save_plan
from headstart.speculation.planner import StaticTree

CALIBRATION = Calibration((0.0, 1.0), ((0.5, 0.8), (1.0, 2.0)), (((0.6, 0.2), (0.4, 0.1)), ((0.4, 0.2), (0.2, 0.1))))
MACHINE = {"model": "0123456789abcdef", "dtype": "bfloat16", "device": "a processor", "threads": 2, "kernels": "amx"}
COST = CostModel((1, 8), (0.01, 0.02), 1e-6, 1e-4, DraftCost(0.001, (1, 4), (0.001, 0.002)), 5e-4)


def test_a_saved_plan_loads_as_it_was(tmp_path):
    without_drafter = MachineCost({**MACHINE, "threads": 4}, CostModel((1,), (0.5,)))
    costs = (MachineCost(MACHINE, COST), without_drafter)
    plan = HeadsPlan(CALIBRATION, {0.0: {2: Tree(((0,), (1,)), 1.5)}, 0.7: {1: Tree(((0,),), 1.25)}}, costs)
    save_plan(tmp_path, plan)
    assert load_plan(tmp_path) == plan
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 2


def test_a_plan_of_version_1_has_no_costs(tmp_path):
    plan = HeadsPlan(CALIBRATION, {0.0: {2: Tree(((0,), (1,)), 1.5)}})
    save_plan(tmp_path, plan)
    content = json.loads((tmp_path / "plan.json").read_text())
    del content["costs"]
    (tmp_path / "plan.json").write_text(json.dumps({**content, "version": 1}))
    assert load_plan(tmp_path) == plan


def test_a_cost_is_that_of_its_machine_only():
    plan = HeadsPlan(CALIBRATION, {}).with_cost(MachineCost(MACHINE, COST))
    assert plan.cost_on({**MACHINE}) == COST
    assert plan.cost_on({**MACHINE, "threads": 4}) is None


def test_a_machine_that_is_measured_again_has_its_new_cost_and_the_others_keep_theirs():
    other, new = {**MACHINE, "threads": 4}, CostModel((1,), (0.5,))
    plan = HeadsPlan(CALIBRATION, {}, (MachineCost(MACHINE, COST), MachineCost(other, COST))).with_cost(MachineCost(MACHINE, new))
    assert (plan.cost_on(MACHINE), plan.cost_on(other), len(plan.costs)) == (new, COST, 2)


def test_the_error_of_a_size_that_was_not_measured_lists_the_measured_sizes():
    plan = HeadsPlan(CALIBRATION, {0.0: {2: Tree(((0,), (1,)), 1.5)}, 0.7: {1: Tree(((0,),), 1.25), 4: Tree(((0,),), 1.25)}})
    assert plan.static_tree(2, 0.3) == StaticTree(((0,), (1,)))
    with pytest.raises(ValueError, match="no tree of 2 drafts was measured; there are tree:1, tree:4"):
        plan.static_tree(2, 0.4)
    with pytest.raises(ValueError, match="there are none"):
        HeadsPlan(CALIBRATION, {}).static_tree(2, 0.4)


def test_a_plan_that_cannot_be_written_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"plan\.json cannot be written: No such file"):
        save_plan(tmp_path / "nowhere", HeadsPlan(CALIBRATION, {}))


def test_a_folder_without_plan_json_has_no_plan(tmp_path):
    assert load_plan(tmp_path) is None


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("version",), 1),
        (("version",), 3),
        (("version",), "2"),
        (("version",), []),
        (("costs",), {}),
        (("costs", 0), {}),
        (("costs", 0, "machine"), []),
        (("costs", 0, "machine", "model"), None),
        (("costs", 0, "cost"), []),
        (("costs", 0, "cost", "nodes"), []),
        (("costs", 0, "cost", "seconds"), [1, -2]),
        (("costs", 0, "cost", "draft"), []),
        (("costs", 0, "cost", "draft", "first"), "soon"),
        (("costs", 0, "cost", "speed"), 1),
        (("format",), "other"),
        (("unknown",), 1),
        (("calibration",), None),
        (("calibration", "warmth"), [["warm"]]),
        (("calibration", "ranks"), 3),
        (("trees",), []),
        (("trees", "0", "2", "paths"), "abc"),
        (("trees", "0", "2", "paths"), [[0, 0]]),
        (("trees", "cold"), {}),
    ],
)
def test_a_file_that_is_no_plan_is_refused_by_its_name(tmp_path, keys, value):
    save_plan(tmp_path, HeadsPlan(CALIBRATION, {0.0: {2: Tree(((0,), (1,)), 1.5)}}, (MachineCost(MACHINE, COST),)))
    content = json.loads((tmp_path / "plan.json").read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"plan\.json cannot be used"):
        load_plan(tmp_path)
