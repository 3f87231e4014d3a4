"""The bench: the prompts it reads, the numbers it reports, and replays."""

import json
from dataclasses import replace

import pytest
import torch
from folders import write_model
from heads import heads_for
from typer.testing import CliRunner, Result

from headstart.bench import report, runner, suites, trained_heads
from headstart.bench.identity import find_split
from headstart.bench.loops import loop_share
from headstart.bench.replay import Replay
from headstart.bench.samples import CLEAN, by_task
from headstart.cli import app
from headstart.engine.engine import Engine
from headstart.engine.stats import Stats
from headstart.formats import describe_target, save
from headstart.speculation.calibration import UNFITTED
from headstart.speculation.heads_plan import HeadsPlan, Tree, save_plan
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, CalibratedTree, Chain, StaticTree
from headstart.speculation.rules import RULES
from headstart.target.target import Target


@pytest.fixture(scope="module")
def target(model_folder):
    return Target.load(model_folder)


@pytest.fixture(scope="module")
def setup(target):
    tasks = tuple(runner.Task(tuple(range(first, first + 12))) for first in (10, 40, 70))
    return runner.Setup(target, tasks, SamplingParams(max_tokens=20, seed=3, ignore_eos=True))


@pytest.fixture(scope="module")
def heads_folder(target, tmp_path_factory):
    """A folder of heads with the records of a training and a calibration."""
    folder = tmp_path_factory.mktemp("heads") / "medusa"
    training = {"tokens": 1234, "seconds": 90.0, "held_out_top1": [0.5, 0.25], "held_out_tau": 1.75}
    save(folder, heads_for(target, "medusa, shared", num_heads=2), describe_target(target.model), training)
    trees = {0.0: {2: Tree(((0,), (1,)), 1.5)}, 1.0: {2: Tree(((0,), (0, 0)), 1.25)}}
    save_plan(folder, HeadsPlan(UNFITTED, trees))
    return folder


# -- prompts --


@pytest.mark.parametrize(
    ("line", "case"),
    [
        ({"turns": ["one", "two"], "reference": ["yes", "no"]}, suites.Case("one", "yes", following=(suites.Case("two", "no"),))),
        ({"turns": ["one", "two"], "category": "maths"}, suites.Case("one", category="maths", following=(suites.Case("two"),))),
        ({"turns": ["one"], "category": ""}, suites.Case("one")),
        ({"prompt": "def f():", "canonical_solution": " return 1"}, suites.Case("def f():", " return 1")),
        ({"instruction": "Sort", "input": "3 1 2", "output": "1 2 3"}, suites.Case("Sort\n\n3 1 2", "1 2 3")),
        ({"instruction": "Sort", "instances": [{"input": "3 1", "output": "1 3"}]}, suites.Case("Sort\n\n3 1")),
        ({"Instruction": "Why?"}, suites.Case("Why?")),
        ({"question": "6 * 7?", "answer": "42"}, suites.Case("6 * 7?", "42")),
    ],
)
def test_every_published_format_of_prompts_is_read(tmp_path, line, case):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(line) + "\n\n")
    assert suites.load_cases(str(path)) == [case]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", 'holds no prompt; write one JSON object per line, such as {"prompt": "Hello"}'),
        (b'{"prompt": "a"}\nnot json\n', "line 2 of .* is not JSON"),
        (b'{"text": "a"}\n', "line 1 of .* has no prompt"),
        (b'["a"]\n', "line 1 of .* each line must be a JSON object"),
        (b"\xff\n", "not valid UTF-8"),
    ],
)
def test_a_bad_file_is_refused_with_the_line_number(tmp_path, content, words):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        suites.load_cases(str(path))


def test_an_unknown_suite_is_refused_with_the_names_of_the_built_in_ones():
    with pytest.raises(ValueError, match="stories, questions, edits"):
        suites.load_cases("no-such-suite")
    with pytest.raises(ValueError, match="limit is 0"):
        suites.load_cases("stories", 0)


def test_references_of_edits_repeat_the_prompt_with_small_changes():
    cases = suites.load_cases("edits")
    assert len(cases) == 12
    for case in cases:
        code = case.prompt.partition("\n\n")[2]
        assert case.reference != code
        before, after = code.splitlines(), case.reference.splitlines()
        assert len(before) == len(after)
        assert sum(a == b for a, b in zip(before, after, strict=True)) >= len(before) // 3


# -- counting --


def test_the_loop_share_counts_tokens_inside_repeated_ngrams():
    text = [*range(10), *range(100, 110)]
    assert loop_share(text) == 0
    assert loop_share([*text, *range(8)]) == 8 / 28  # eight tokens that occurred before
    assert loop_share([*text, *range(7)]) == 0  # seven are no n-gram of eight
    assert loop_share([5] * 100) == 99 / 100  # all but the very first
    assert loop_share([]) == 0


def test_a_run_is_a_drafter_and_optionally_a_planner():
    assert runner.split_spec("lookup") == ("lookup", None)
    assert runner.split_spec("lookup@best:nodes=8") == ("lookup", Best(nodes=8))
    assert runner.split_spec("model:a@b/c@chain:4") == ("model:a@b/c", Chain(4))
    assert runner.split_spec("model:a@b/c") == ("model:a@b/c", None)
    assert runner.split_spec("heads/medusa@tree:8") == ("heads/medusa", CalibratedTree(8))


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("plain", "plain"),
        ("lookup@best:nodes=8", "lookup@best:nodes=8"),
        ("model:a@b/c@chain:4", "model:c@chain:4"),
        ("heads/medusa@chain:4", "medusa@chain:4"),
        ("/a/b/medusa/", "medusa"),
        ("mine:heads/@full:3,2", "mine:heads@full:3,2"),
        ("transformers:model:/a/draft", "transformers:model:draft"),
        ("lookup+/a/b/mtp@chain:4", "lookup+mtp@chain:4"),
        ("hydra++", "hydra++"),
    ],
)
def test_the_short_name_of_a_run_has_only_the_last_part_of_its_folder(run, name):
    assert report.short(run) == name


@pytest.mark.parametrize(("temperature", "paths"), [(0.3, ((0,), (1,))), (0.7, ((0,), (0, 0)))])
def test_a_calibrated_tree_is_the_one_of_the_nearest_temperature(heads_folder, temperature, paths):
    assert runner.read_spec(f"{heads_folder}@tree:2", temperature, None) == (str(heads_folder), StaticTree(paths))


def test_the_time_waited_for_a_processor_never_decreases():
    first = runner.waiting_seconds()
    torch.randn(300, 300) @ torch.randn(300, 300)
    second = runner.waiting_seconds()
    assert first is None or second >= first >= 0


def test_a_target_widened_with_zeros_is_labelled_padded(target, tmp_path):
    assert not report.is_padded(target)
    padded = Target.load(write_model(tmp_path))
    with torch.no_grad():
        padded.model.get_input_embeddings().weight[:, -4:] = 0
    assert report.is_padded(padded)


def test_statistics_add_up():
    one = Stats(rounds=2, row_rounds=2, tokens=5, tried=[2], held=[1])
    two = Stats(rounds=1, row_rounds=1, tokens=1, tried=[1, 1], held=[1, 0])
    total = Stats.total([one, two])
    assert (total.rounds, total.tokens, total.tried, total.held) == (3, 6, [3, 1], [2, 0])
    assert total.tau == 2


# -- runs --

KIND_FIELDS = {
    "speed_up", "interval", "tau", "tau_interval", "tokens_per_second", "acceptance", "lengths", "token_ms", "time_to_first_token",
    "num_prompts",
}  # fmt: skip


def test_runs_alternate_prompt_by_prompt_and_give_identical_answers(setup, draft_folder):
    runs = runner.prepare(setup, ["lookup", f"model:{draft_folder}@chain:3"])
    samples = runner.measure(setup, runs, repeat=2)
    assert [(sample.task, sample.run) for sample in samples[:6]] == [(task, run.name) for task in (0, 1) for run in runs]
    assert len(samples) == 2 * 3 * 3
    rows = report.rows(setup, samples)
    assert [row.run for row in rows] == [run.name for run in runs]
    for row in rows:
        assert row.identical == "yes"
        assert (row.tokens, row.splits) == (60, [])
        assert row.tokens_per_second > 0 < row.forward
        assert abs(sum(row.shares.values()) - 1) < 1e-6
    plain, _, chain = rows
    assert (plain.speed_up, plain.tau, plain.nodes, plain.acceptance) == (1, 1, setup.target.min_nodes, [])
    assert chain.tau >= 1
    assert len(chain.acceptance) == 3
    own = [[sample for sample in samples if (sample.run, sample.task) == (chain.run, task)] for task in range(3)]
    counted = [[sample for sample in task if sample.delay is not None and sample.delay <= CLEAN] or task for task in own]
    assert sum(chain.lengths) == sum(sample.stats.row_rounds for task in counted for sample in task)
    assert sum(n * count for n, count in enumerate(chain.lengths, 1)) == pytest.approx(chain.tau * sum(chain.lengths))
    assert 0 < chain.token_ms["p50"] <= chain.token_ms["p90"] <= chain.token_ms["p99"]
    assert chain.interval[0] <= chain.speed_up <= chain.interval[1]
    assert chain.tau_interval[0] <= chain.tau <= chain.tau_interval[1]


def test_each_prompt_set_has_its_own_speed_up_and_tau(setup, draft_folder):
    tasks = tuple(replace(task, kind=kind) for task, kind in zip(setup.tasks, ("a", "a", "b"), strict=True))
    mixed = replace(setup, tasks=tasks)
    samples = runner.measure(mixed, runner.prepare(mixed, [f"model:{draft_folder}@chain:3"]))
    plain, own = report.rows(mixed, samples)
    assert [(one["speed_up"], one["interval"], one["tau"]) for one in plain.kinds.values()] == [(1, [1, 1], 1)] * 2
    alone = report.rows(setup, [sample for sample in samples if sample.task == 2])[1]
    assert own.kinds["b"] == {"num_prompts": 1} | {name: getattr(alone, name) for name in KIND_FIELDS - {"num_prompts"}}
    assert own.kinds["a"]["num_prompts"] == 2
    assert alone.kinds == {}


def test_a_drafter_that_is_the_target_has_an_acceptance_rate_of_one(setup, model_folder):
    runs = runner.prepare(setup, [f"model:{model_folder}@chain:4"])
    own = report.rows(setup, runner.measure(setup, runs))[1]
    assert own.acceptance == [1, 1, 1, 1]
    assert own.tau > 4


def test_every_prompt_has_its_own_seed(setup):
    warm = replace(setup, params=replace(setup.params, temperature=1.0))
    assert len({warm.params_of(task).seed for task in range(3)}) == 3
    first = runner.measure(warm, runner.prepare(warm, ["lookup"]))
    again = runner.measure(warm, runner.prepare(warm, ["lookup"]))
    assert [sample.tokens for sample in first] == [sample.tokens for sample in again]


def test_a_different_answer_is_counted_and_reported(setup):
    runs = runner.prepare(setup, ["lookup"])
    samples = runner.measure(setup, runs)
    wrong = [replace(s, tokens=(*s.tokens[:5], (s.tokens[5] + 1) % 320, *s.tokens[6:])) for s in samples if s.run == "lookup"]
    row = report.rows(setup, [*(s for s in samples if s.run == "plain"), *wrong])[1]
    assert (row.differing, row.near_ties) == (3, 0)
    assert row.identical == "3 differ, 0 near-ties"
    assert row.splits[0].startswith("token 5: ")


def test_the_tolerance_of_a_near_tie_depends_on_the_precision(target, model_folder):
    coarse = Target.load(model_folder, dtype="bfloat16")
    params = SamplingParams(max_tokens=1, seed=0)
    splits = [find_split(one, [5, 6], params, [7], [8]) for one in (target, coarse)]
    assert [split.tolerance for split in splits] == [1e-4, 0.125]


def test_a_rule_that_keeps_only_the_distribution_does_not_promise_the_text(setup, draft_folder):
    drawn = replace(setup, params=replace(setup.params, temperature=1.0), accept="rejection")
    samples = runner.measure(drawn, runner.prepare(drawn, [f"model:{draft_folder}@full:2,1"]))
    assert report.rows(drawn, samples)[1].identical == "in distribution"


def test_clean_samples_are_preferred():
    stats = Stats(rounds=1, row_rounds=1, tokens=1)
    spoiled, clean = (runner.Sample("plain", 0, (1,), seconds, 0.0, stats, delay) for seconds, delay in ((9.0, 0.5), (1.0, 0.0)))
    assert by_task([spoiled, clean]) == [[clean]]
    assert by_task([spoiled]) == [[spoiled]]
    assert report.clean_share([spoiled, clean]) == 0.5


# -- replay --


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("spec", ["lookup", "model:{}@best:nodes=6"])
def test_a_replay_emits_the_reference(target, draft_folder, spec, temperature):
    reference = (*range(20, 30), *range(10, 22), *range(20, 28))
    task = runner.Task(tuple(range(10, 40)), reference)
    params = SamplingParams(max_tokens=100, temperature=temperature, top_p=0.9)
    setup = runner.Setup(target, (task,), params, is_replay=True)
    samples = runner.measure(setup, runner.prepare(setup, [spec.format(draft_folder)]))
    assert [sample.tokens for sample in samples] == [reference] * 2
    assert "replay" in report.labels(setup)


def test_a_replay_is_faster_where_the_reference_repeats_the_prompt(target):
    task = runner.Task(tuple(range(10, 60)), tuple(range(20, 55)))
    setup = runner.Setup(target, (task,), SamplingParams(), is_replay=True)
    plain, lookup = report.rows(setup, runner.measure(setup, runner.prepare(setup, ["lookup"])))
    assert plain.tau == 1
    assert lookup.tau > 2


def test_a_replay_also_ends_at_max_tokens(target):
    replay = Replay(RULES["coupled"])
    replay.follow((5, 6, 7), (8, 9, 10, 11))
    engine = Engine(target, accept=replay.rule, max_rows=1)
    request = engine.add((5, 6, 7), SamplingParams(max_tokens=2))
    list(engine.run())
    assert request.output == [8, 9]


# -- the commands --


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


RUN_FIELDS = {
    "run", "tokens", "seconds", "tokens_per_second", "speed_up", "median_speed_up", "decode_speed_up", "tau", "acceptance",
    "forward", "nodes", "shares", "loops", "differing", "near_ties", "splits", "identical", "is_lossy", "temperature", "kinds",
    "interval", "tau_interval", "lengths", "time_to_first_token", "token_ms", "is_peer", "memory",
}  # fmt: skip
RESULT_FIELDS = {
    "model", "machine", "settings", "labels", "num_samples", "clean_share", "runs", "heads", "concurrency", "cost",
    "reliability",
}  # fmt: skip
MACHINE_FIELDS = {"cpu", "cores", "threads", "device", "kernels", "python", "torch", "transformers", "headstart", "command"}


def test_bench_prints_a_table_and_writes_json_to_out(model_folder, draft_folder, tmp_path):
    base = ("bench", "--model", model_folder, "--limit", 2, "--max-tokens", 8, "--repeat", 1, "--run", "lookup")
    result = run(*base, "--run", f"model:{draft_folder}@chain:2", "--seed", 4, "--temperature", 0.5, "--out", tmp_path / "measured")
    assert result.exit_code == 0, result.output
    table = result.stdout.splitlines()
    assert any("speed-up" in line for line in table)
    assert any("clean samples" in line for line in table)
    assert "{" not in result.stdout  # JSON goes to the file only
    output = json.loads((tmp_path / "measured").read_text())
    assert output.keys() == RESULT_FIELDS
    assert output["cost"]["nodes"][0] == 1
    assert [point["run"] for point in output["cost"]["operating_points"]] == [one["run"] for one in output["runs"]]
    assert output["machine"].keys() == MACHINE_FIELDS
    assert [one["run"] for one in output["runs"]] == ["plain", "lookup", f"model:{draft_folder}@chain:2"]
    assert all(one.keys() == RUN_FIELDS for one in output["runs"])
    assert (output["settings"]["seed"], output["settings"]["temperatures"], output["settings"]["num_prompts"]) == (4, [0.5], 2)
    assert {one["temperature"] for one in output["runs"]} == {0.5}
    assert output["heads"] == []


def test_temperatures_and_prompt_sets_share_one_table(model_folder, heads_folder, tmp_path):
    base = ("bench", "--model", model_folder, "--limit", 1, "--max-tokens", 4, "--repeat", 1, "--run", f"{heads_folder}@tree:2")
    result = run(
        *base, "--temperatures", "0,0.7", "--prompts", "stories", "--prompts", "questions", "--by-kind", "--out", tmp_path / "m"
    )
    assert result.exit_code == 0, result.output
    tables = result.stdout.splitlines()
    assert [" T " in line for line in tables if "speed-up" in line] == [True, True]
    lines = [line for line in tables if "medusa@tree:2" in line and "┃" not in line and "│" in line]
    assert len(lines) == 2 * 2 + 2 * 2  # two tables with a line per temperature, and prompt sets at each
    output = json.loads((tmp_path / "m").read_text())
    assert [(one["run"], one["temperature"]) for one in output["runs"]] == [
        (name, temperature) for temperature in (0, 0.7) for name in ("plain", f"{heads_folder}@tree:2")
    ]
    assert all(one["kinds"].keys() == {"stories", "questions"} for one in output["runs"])
    assert output["settings"]["num_prompts"] == 2


def test_the_table_of_heads_has_what_their_training_recorded(model_folder, heads_folder, tmp_path):
    base = ("bench", "--model", model_folder, "--limit", 1, "--max-tokens", 4, "--repeat", 1, "--dtype", "bfloat16")
    result = run(*base, "--run", heads_folder, "--run", f"{heads_folder}@chain:2", "--out", tmp_path / "m")
    (made,) = json.loads((tmp_path / "m").read_text())["heads"]
    parameters = 2 * (32 * 32 + 32)  # two heads of one block each
    assert made == {
        "folder": str(heads_folder), "method": "medusa", "parameters": parameters, "megabytes": parameters * 2 / 1e6,
        "tokens": 1234, "minutes": 1.5, "top1": [0.5, 0.25], "tau": 1.75, "curve": [],
    }  # fmt: skip
    assert "held-out tau" in result.stdout


def test_what_the_training_of_heads_did_not_record_is_left_blank(target, tmp_path):
    save(tmp_path, heads_for(target, "medusa, shared"), describe_target(target.model), {"held_out_top1": "good", "seconds": None})
    (made,) = trained_heads.trained([str(tmp_path), "lookup", "mtp"], target)
    assert (made.tokens, made.minutes, made.top1, made.tau) == (None, None, [], None)
    assert trained_heads.table([made]).row_count == 1


def test_bench_replays_references_from_a_file(model_folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["the cat and the sea"], "reference": ["the cat and the sea"]}\n')
    result = run("bench", "--model", model_folder, "--prompts", path, "--replay", "--repeat", 1, "--json")
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    assert "replay" in output["labels"]
    assert all(one["identical"] == "yes" for one in output["runs"])


def test_prompts_that_exceed_the_context_are_left_out_and_counted(model_folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the cat"}\n' + json.dumps({"prompt": "the cat and the sea " * 100}) + "\n")
    result = run("bench", "--model", model_folder, "--prompts", path, "--max-tokens", 4, "--repeat", 1, "--raw", "--json")
    assert json.loads(result.stdout)["settings"]["num_skipped"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompts", "nowhere.jsonl"), "neither a JSONL file nor"),
        (("--replay",), "needs reference answers"),
        (("--max-tokens", 5000), "plus max_tokens=5000 exceeds the context of 256 tokens; give shorter prompts, or lower"),
        (("--run", "crystal-ball"), "is unknown"),
        (("--run", "lookup", "--run", "lookup"), "named twice"),
        (("--run", "plain"), "named twice"),
        (("--run", "lookup@chain:0"), "depth is 0"),
        (("--repeat", 0), "repeat is 0"),
        (("--limit", 0), "limit is 0"),
        (("--temperature", 0, "--temperatures", "0,1"), "leave one of the two out"),
        (("--temperatures", "0,warm"), "write numbers with commas"),
        (("--temperatures", ""), "write numbers with commas"),
        (("--temperatures", "0,0.0"), "given once"),
        (("--temperatures", "1,-1"), "0 or positive"),
        (("--temperatures", "nan"), "0 or positive"),
        (("--by-kind",), "give --prompts again"),
        (("--prompts", "stories", "--prompts", "stories"), "two prompt sets are called 'stories'"),
        (("--run", "lookup@tree:8"), "headstart tune"),
        (("--run", "lookup@tree:"), "tree:32 (calibrated)"),
    ],
)
def test_a_bad_setting_of_bench_is_one_sentence(model_folder, arguments, words):
    result = run("bench", "--model", model_folder, *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_generate_with_a_calibrated_tree_gives_the_same_tokens(model_folder, heads_folder):
    base = ("generate", "the cat", "--model", model_folder, "--max-tokens", 12, "--temperature", 0.9, "--seed", 5, "--json")
    plain, tree = (
        json.loads(run(*base, *more).stdout) for more in (("--drafter", "none"), ("--drafter", heads_folder, "--planner", "tree:2"))
    )
    assert tree["token_ids"] == plain["token_ids"]
    assert max(tree["stats"]["tried"]) > 0
    assert len(tree["stats"]["tried"]) == 2  # the tree of temperature 1 is two deep, that of 0 one
    assert tree["stats"]["drafts"] <= 2 * tree["stats"]["rounds"]


def test_the_demo_prints_each_text_once_and_a_table(model_folder):
    result = run("demo", "--model", model_folder, "--max-tokens", 6)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("little fox who could not sleep") == 1
    table = result.stdout[result.stdout.index("tokens/s") :]
    assert "plain" in table
    assert "lookup" in table
    assert "yes" in table
