"""`headstart tune`: expected speeds against decoding and by hand, achieved speeds, other engines' words, and whose plan it is."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from scripted import Scripted, right
from tiny import tiny
from typer.testing import CliRunner

from headstart.bench import tuning_report
from headstart.bench.achieved import Speed, measure_speeds, num_turns, split
from headstart.bench.calibrate import DecodeTrial, calibrate
from headstart.bench.expected import Observed
from headstart.bench.tuning import Choice, Tuning
from headstart.cli import app
from headstart.drafters.medusa import Medusa, MedusaConfig
from headstart.engine import planning
from headstart.engine.drafter_loading import heads_in
from headstart.engine.engine import Engine
from headstart.engine.machine import differences, machine_key
from headstart.formats import describe_target, save
from headstart.formats.exports.engine_options import ranges, sglang_adaptive, sglang_options, vllm_option
from headstart.speculation.chains import chain
from headstart.speculation.cost import CostModel, DraftCost
from headstart.speculation.heads_plan import MachineCost, load_plan, save_plan
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Chain, StaticTree
from headstart.target.target import Target

PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9))
TABLE = ((0.7, 0.15, 0.05), (0.6, 0.2, 0.1))
TEXTS = (torch.tensor([[0, 0], [0, 1], [1, 0], [0, 9]]), torch.tensor([[0, 2], [2, 0], [0, 0], [5, 9]]))
OBSERVED = Observed(0.7, TABLE, TEXTS, 100.0)
FREE_DRAFTS = DraftCost(0.0, (1,), (0.0,))


# -- expected --


def heads_of(target):
    """Heads with random weights, whose first candidates are sometimes right."""
    torch.manual_seed(0)
    heads = Medusa(MedusaConfig(num_heads=3, projection="shared"), target.hidden, target.vocab).bind(target.embed_head).double()
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return heads


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_expected_tau_is_that_of_the_rounds_behind_the_first_token(temperature):
    target = tiny()
    trial, heads = DecodeTrial(target, PROMPTS, max_tokens=24, seed=7), heads_of(target)
    _, (result,) = calibrate(trial, heads, [temperature], sizes=(12,))
    observed = Observed(temperature, result.table, result.texts, 10.0)
    for paths in (chain(3), result.trees[12].paths):
        stats = trial.decode(heads, StaticTree(paths), temperature)
        expected = (stats.tokens - len(PROMPTS)) / (stats.row_rounds - len(PROMPTS))
        assert observed.tau(paths) == pytest.approx(expected)


def test_the_expected_speed_up_is_tau_over_the_ratio_of_the_rounds():
    cost = CostModel((1, 3, 9), (1.0, 1.5, 3.0), 0.001, 0.0, DraftCost(0.2, (1,), (0.1,)), 0.05)
    expected = OBSERVED.expected(cost, 1, chain(2))
    assert expected.tau == 8 / 4  # rounds of roots 0 and 3 of one answer, and 0 and 2 of the other
    assert expected.seconds == pytest.approx(1.5 + 0.1 + 0.05 + 0.3)
    assert expected.speed_up == pytest.approx(2 * 1.15 / 1.95)
    assert expected.tokens_per_second == pytest.approx(2 / 1.95)


def test_nothing_pays_where_every_node_costs_a_pass_and_the_whole_tree_where_nodes_are_free():
    dear, free = CostModel((1, 2), (1.0, 2.0), draft=FREE_DRAFTS), CostModel((1, 512), (1.0, 1.0), draft=FREE_DRAFTS)
    assert OBSERVED.fastest(dear, 1).paths == ()
    assert OBSERVED.fastest(dear, 1).speed_up == 1
    fastest = OBSERVED.fastest(free, 1)
    assert fastest.tau == max(OBSERVED.tau(paths) for paths in (chain(1), chain(2), OBSERVED.programme.tree(12, 2)))


def test_trees_and_chains_shrink_as_requests_are_added():
    cost = CostModel((1, 16, 512), (1.0, 1.05, 12.0), draft=DraftCost(0.02, (1, 64), (0.02, 0.1)))
    choice = Choice.of(cost, [OBSERVED], [1, 4, 16, 64])
    sizes = [len(choice.fastest[0.7][rows].paths) for rows in (1, 4, 16, 64)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0 == sizes[-1]
    lengths = choice.chains[0.7]
    assert len(lengths) == 64
    assert list(lengths) == sorted(lengths, reverse=True)


# -- achieved --


def test_a_drafter_that_is_always_right_decodes_depth_plus_one_tokens_per_round_of_every_row():
    target = tiny()
    trial = DecodeTrial(target, PROMPTS, max_tokens=9, seed=7)
    engine = Engine(target)
    requests = [engine.add(prompt, SamplingParams(max_tokens=9)) for prompt in PROMPTS]
    assert list(engine.run())
    drafter = Scripted(right(3), [[*request.prompt, *request.output] for request in requests])
    settings = {"plain": (None, None), "chain": (drafter, Chain(3))}
    for rows in (1, 3):
        turns = []
        speeds = measure_speeds(trial, settings, 0.0, rows, lambda turns=turns: turns.append(1))
        assert (speeds["plain"].tau, speeds["chain"].tau) == (1, 4)  # after the first token, two rounds of four
        assert len(turns) == num_turns(len(PROMPTS), rows)
        assert speeds["chain"].tokens_per_second > 0


def test_disturbed_rounds_are_left_out_unless_all_are():
    speed = Speed(2, [(4, 1.0, True), (4, 9.0, False), (2, 1.0, True)])
    assert (speed.tokens_per_second, speed.tau) == (pytest.approx(10 / 3), pytest.approx(10 / 6))
    assert Speed(2, [(4, 8.0, False)]).tokens_per_second == 0.5
    assert Speed(2).tokens_per_second == 0


def test_every_fourth_prompt_is_held_out_and_a_single_one_is_used_twice():
    prompts = [(index,) for index in range(9)]
    measuring, held_out = split(prompts)
    assert held_out == ((3,), (7,))
    assert sorted((*measuring, *held_out)) == prompts
    assert split(prompts[:2]) == (((0,),), ((1,),))
    assert split(prompts[:1]) == (((0,),), ((0,),))


@pytest.mark.parametrize(("seconds", "told"), [(1.0, []), (1.05, []), (1.25, ["0.80 times"]), (0.5, ["2.00 times"])])
def test_a_machine_whose_speed_moved_since_its_cost_was_measured_is_told(seconds, told):
    choice = Choice.of(CostModel((1, 16), (0.9, 1.0), host_seconds=0.1, draft=FREE_DRAFTS), [OBSERVED], [1])
    speeds = {1: {"plain": Speed(1, [(1, seconds, True)] * 9)}}
    machine = MachineCost({"threads": 2}, choice.cost)
    tuning = Tuning("medusa", DecodeTrial(None, ()), (), machine, choice, 0.7, speeds, None, None)
    printed = [line for line in tuning_report.lines(tuning, Path("heads")) if "machine's speed moved" in line]
    assert [words in line for words, line in zip(told, printed, strict=True)] == [True] * len(told)


# -- other engines --


def test_neighbouring_batch_sizes_with_one_length_are_one_range():
    assert ranges((3, 3, 2, 0, 0)) == [(1, 2, 3), (3, 3, 2), (4, 5, 0)]


def test_vllms_option_is_json_whose_ranges_begin_at_one_and_do_not_overlap():
    option = vllm_option("eagle3", (5, 5, 2, 0), "HEADS")
    config = json.loads(option.removeprefix("--speculative-config '").removesuffix("'"))
    assert config == {
        "method": "eagle3",
        "model": "HEADS",
        "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": [[1, 2, 5], [3, 3, 2], [4, 4, 0]],
    }
    assert "per_batch_size" not in vllm_option("medusa", (3, 3), "HEADS")
    assert '"model"' not in vllm_option("mtp", (3, 3), "HEADS")
    assert vllm_option("hydra", (3, 3), "HEADS") is None
    assert vllm_option("eagle", (0, 0), "HEADS") is None


def test_sglangs_options_verify_one_token_more_than_they_draft():
    options = sglang_options("eagle", 3, "HEADS")
    assert "--speculative-algorithm EAGLE --speculative-draft-model-path HEADS --speculative-num-steps 3" in options
    assert "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4" in options
    assert sglang_options("medusa", 3, "HEADS") is None
    assert sglang_options("eagle", 0, "HEADS") is None
    assert json.loads(sglang_adaptive((5, 5, 2, 0))) == {"candidate_steps": [2, 5]}
    assert sglang_adaptive((3, 3)) is None


# -- the command, and whose plan it is --


@pytest.fixture
def folder(model_folder, tmp_path):
    """Heads that begin as the target's LM head: sometimes right."""
    target = Target.load(model_folder)
    torch.manual_seed(0)
    heads = Medusa(MedusaConfig(num_heads=2), target.hidden, target.vocab).bind(target.embed_head).init_from_target()
    save(tmp_path / "heads", heads, describe_target(target.model), {})
    return tmp_path / "heads"


def tune(model_folder, folder, *arguments):
    base = (
        "tune",
        folder,
        "--model",
        model_folder,
        "--prompts",
        "questions",
        "--limit",
        3,
        "--max-tokens",
        12,
        "--temperature",
        0,
        "--rows",
        1,
        "--rows",
        2,
    )
    result = CliRunner().invoke(app, [str(argument) for argument in (*base, *arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_tuning_prints_costs_trees_speeds_chains_and_a_labelled_forecast(model_folder, folder, quick_costs):
    printed = tune(model_folder, folder, "--hardware", "l40")
    for words in ("cost of rounds on this machine", "fastest tree for each number", "achieved", "best chain by batch size"):
        assert words in printed
    assert printed.count("forecast for NVIDIA L40") == 3


def test_tuning_as_json_has_the_same(model_folder, folder, quick_costs):
    result = json.loads(tune(model_folder, folder, "--json", "--hardware", "l40"))
    plan = load_plan(folder)
    assert plan.costs[0].machine == result["machine"]
    assert plan.costs[0].cost == CostModel.from_dict(result["cost"])
    assert [one["rows"] for one in result["expected"]] == [1, 2]
    assert all(one["plain"]["tau"] == 1 for one in result["achieved"])
    assert result["forecast"]["hardware"]["name"] == "NVIDIA L40"
    assert all(one["speed_up"] >= 1 for one in (*result["expected"], *result["forecast"]["expected"]))


def test_without_decoding_no_prompt_is_held_out(model_folder, folder, quick_costs):
    result = json.loads(tune(model_folder, folder, "--json", "--no-decode"))
    assert result["achieved"] == []
    assert result["settings"]["num_prompts"] == 3


def test_the_cost_in_the_plan_is_used_on_its_machine(model_folder, folder, quick_costs, monkeypatch):
    tune(model_folder, folder, "--no-decode")
    target = Target.load(model_folder)
    heads = heads_in(folder, target)
    monkeypatch.setattr(planning, "measure_cost", lambda *arguments: pytest.fail("it is known"))
    assert planning.cost_of(target, heads) == load_plan(folder).cost_on(machine_key(target, heads))


def test_a_plan_of_another_machine_is_named_and_measured_anew(model_folder, folder, quick_costs, monkeypatch):
    tune(model_folder, folder, "--no-decode")
    plan = load_plan(folder)
    (measured,) = plan.costs
    other = type(measured)({**measured.machine, "device": "an abacus", "threads": 99}, measured.cost)
    save_plan(folder, type(plan)(plan.calibration, plan.trees, (other,)))
    target, anew = Target.load(model_folder), CostModel((1,), (0.5,))
    monkeypatch.setattr(planning, "measure_cost", lambda *arguments: anew)
    threads, device = measured.machine["threads"], measured.machine["device"]
    with pytest.warns(UserWarning, match="device an abacus, threads 99, and this is device") as caught:
        assert planning.cost_of(target, heads_in(folder, target)) == anew
    assert f"this is device {device}, threads {threads}" in str(caught[0].message)
    tune(model_folder, folder, "--no-decode")
    assert [one.machine["threads"] for one in load_plan(folder).costs] == [99, threads]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert planning.cost_of(target, heads_in(folder, target)) != anew


def test_what_differs_between_two_machines_is_named_on_both_sides():
    assert list(differences({"threads": 2, "dtype": "bfloat16"}, {"threads": 4, "dtype": "bfloat16"})) == [("threads", 2, 4)]
    assert list(differences({"threads": 2}, {})) == [("threads", 2, "unknown")]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--rows", 0), "--rows is 0; it must be at least 1"),
        (("--hardware", "abacus"), "neither a JSON file nor a preset"),
    ],
)
def test_what_a_user_did_wrong_is_one_sentence(model_folder, folder, arguments, word):
    result = CliRunner().invoke(app, ["tune", str(folder), "--model", str(model_folder), *map(str, arguments)])
    assert (result.exit_code, word in result.stderr) == (2, True)
