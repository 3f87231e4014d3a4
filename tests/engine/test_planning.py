"""The planner without a choice: measured once per machine, the same text, refused where the text would depend on clocks."""

import json
from pathlib import Path

import pytest
import torch
from heads import heads_for
from tiny import ARCHITECTURES, random_model, tiny

import headstart
from headstart.drafters.fused import Fused
from headstart.drafters.lookup import Lookup
from headstart.engine import choosing, planning
from headstart.engine.choosing import choose_drafter, expected_speed
from headstart.engine.cost_measure import measure_cost
from headstart.engine.engine import Engine
from headstart.engine.machine import machine_key
from headstart.formats import describe_target, save
from headstart.speculation.adaptive import Adaptive
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Auto, Chain
from headstart.speculation.rules import parse_rule
from headstart.target.target import Target

EMBEDDED = Path(headstart.__file__).parent / "embedded"


@pytest.fixture
def measured(monkeypatch):
    """How often the cost of rounds was measured."""
    calls = []

    def measure(target, drafter, seconds, base):
        calls.append(drafter.name if drafter else "none")
        return measure_cost(target, drafter, 0.01, base)

    monkeypatch.setattr(planning, "measure_cost", measure)
    return calls


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "headstart" / "costs"


def test_the_cost_grows_with_the_nodes_and_has_a_part_for_every_phase():
    target = tiny("llama")
    cost = measure_cost(target, heads_for(target, "eagle"), 0.05)
    assert len(cost.nodes) >= 3
    assert cost.nodes[0] == 1
    assert list(cost.seconds) == sorted(cost.seconds)
    assert 0 < cost.seconds[0] < 1
    assert cost.draft.first > 0
    assert cost.host_seconds > 0
    assert (cost.draft.widths, cost.draft.seconds) == ((1, 4, 8), tuple(sorted(cost.draft.seconds)))


def test_measuring_leaves_a_drafter_that_an_engine_can_use():
    target = tiny("llama")
    heads = heads_for(target, "eagle3")
    measure_cost(target, heads, 0.01)
    outputs = []
    for drafter in (heads, None):
        engine = Engine(target, drafter, max_rows=1)
        request = engine.add([5, 17, 3], SamplingParams(max_tokens=12, ignore_eos=True))
        for _ in engine.run():
            pass
        outputs.append(request.output)
    assert outputs[0] == outputs[1]


def test_a_cost_is_measured_once_for_a_target_and_a_drafter(measured, cache):
    target = tiny("llama")
    first, again = planning.cost_of(target, Lookup()), planning.cost_of(target, Lookup())
    assert first == again
    assert measured == ["none", "lookup"]
    planning.cost_of(target, heads_for(target, "medusa"))
    assert measured == ["none", "lookup", "medusa"]  # the forwards are those of the target
    assert len(list(cache.iterdir())) == 3


def test_attaching_a_drafter_changes_nothing_about_which_cost_is_its_own(measured):
    target = Target(random_model(ARCHITECTURES["llama"](), torch.float32))
    target.choose_kernels()
    heads = heads_for(target, "eagle3").float()
    before = machine_key(target, heads)
    planning.cost_of(target, heads)
    Engine(target, heads, max_rows=1)
    assert machine_key(target, heads) == before
    keys = [machine_key(target, Fused([Lookup(), heads_for(target, kind)]))["drafter"] for kind in ("mtp", "mtp, 3 modules")]
    assert keys[0] != keys[1]
    assert keys[0].startswith("lookup+mtp ")


def test_a_cost_of_other_threads_is_measured_anew(measured):
    target, threads = tiny("llama"), torch.get_num_threads()
    planning.cost_of(target, Lookup())
    torch.set_num_threads(threads + 1)
    planning.cost_of(target, Lookup())
    torch.set_num_threads(threads)
    assert measured == ["none", "lookup"] * 2


@pytest.mark.parametrize("content", ["", "{", '{"key": {}, "cost": {}}', "[]"])
def test_a_damaged_measurement_is_replaced(measured, cache, content):
    target = tiny("llama")
    planning.cost_of(target, Lookup())
    for path in cache.iterdir():
        path.write_text(content)
    planning.cost_of(target, Lookup())
    assert measured == ["none", "lookup"] * 2
    assert all(json.loads(path.read_text())["cost"]["nodes"] for path in cache.iterdir())


def test_a_folder_that_cannot_be_written_is_no_error(measured, cache):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    planning.cost_of(tiny("llama"), Lookup())
    planning.cost_of(tiny("llama"), Lookup())
    assert measured == ["none", "lookup"] * 2


def test_the_default_planner_is_adaptive_only_where_no_text_depends_on_it(measured):
    target, drafter = tiny("llama"), Lookup()
    assert isinstance(planning.planner_for(target, drafter, None, parse_rule("coupled")), Adaptive)
    assert isinstance(planning.planner_for(target, drafter, Auto(), parse_rule("coupled")), Adaptive)
    for rule in ("rejection", "typical"):
        assert planning.planner_for(target, drafter, None, parse_rule(rule)) is None
        with pytest.raises(ValueError, match=r"planner auto depends on measured times, .* leave the rule at coupled"):
            planning.planner_for(target, drafter, Auto(), parse_rule(rule))
    assert planning.planner_for(target, drafter, Chain(2), parse_rule("coupled")) == Chain(2)
    assert planning.planner_for(target, None, None, parse_rule("coupled")) is None


@pytest.mark.parametrize("kind", ["medusa", "hydra++", "eagle3", "mtp"])
def test_the_adaptive_planner_changes_no_token(measured, kind):
    target = tiny("llama")
    prompts = [[5, 17, 3, 44], [8, 61, 7, 30, 8, 61, 7], [1, 2]]
    outputs = []
    for drafter in (heads_for(target, kind), None):
        planner = planning.planner_for(target, drafter, None, parse_rule("coupled"))
        engine = Engine(target, drafter, planner, max_rows=2)
        requests = [
            engine.add(prompt, SamplingParams(max_tokens=24, temperature=0.5 * row, seed=row, ignore_eos=True))
            for row, prompt in enumerate(prompts)
        ]
        for _ in engine.run():
            pass
        outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]


def test_of_the_heads_in_a_models_folder_the_fastest_by_expectation_are_taken(measured, model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    target = Target.load(folder)
    for kind in ("medusa", "eagle"):
        save(folder / "heads" / kind, heads_for(target, kind), describe_target(target.model), {})
    speeds = {"medusa": 2.0, "eagle": 3.0}
    monkeypatch.setattr(choosing, "expected_speed", lambda target, drafter: speeds[drafter.name])
    monkeypatch.setattr(choosing, "_LIGHT", 10.0)
    assert choose_drafter(folder, target, parse_rule("coupled")).name == "lookup+eagle"
    assert choose_drafter(folder, target, parse_rule("rejection")).name == "eagle"
    monkeypatch.setattr(choosing, "_LIGHT", -10.0)
    assert choose_drafter(folder, target, parse_rule("coupled")).name == "eagle"


def test_lookup_is_what_is_left(measured):
    target = tiny("llama")
    assert choose_drafter(target.model, target, parse_rule("coupled"), ["lookup"]).name == "lookup"
    assert choose_drafter(target.model, target, parse_rule("coupled")).name == "lookup"


def test_a_drafter_that_is_right_more_often_is_expected_to_be_faster(measured, monkeypatch):
    target = tiny("llama")
    cost = measure_cost(target, Lookup(), 0.01)
    monkeypatch.setattr("headstart.engine.choosing.cost_of", lambda target, drafter: cost)
    good, poor = Lookup(), Lookup()
    good.calibration = planning.Calibration((0.0,), ((1.0,),), (((0.9,), (0.9,)),))
    assert expected_speed(target, good) > expected_speed(target, poor)
