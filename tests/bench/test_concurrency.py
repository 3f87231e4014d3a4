"""Several requests at once: the same texts, times that add up, and throughput by their number."""

from dataclasses import replace

import pytest

from headstart.bench import concurrency, results, runner
from headstart.speculation.params import SamplingParams
from headstart.target.target import Target


@pytest.fixture(scope="module")
def setup(model_folder):
    tasks = tuple(runner.Task(tuple(range(first, first + 8 + 5 * (first % 4)))) for first in range(10, 17))
    return runner.Setup(Target.load(model_folder), tasks, SamplingParams(max_tokens=15, temperature=0.8, seed=3, ignore_eos=True))


@pytest.fixture(scope="module")
def samples(setup, draft_folder):
    """By the number of rows."""
    specs = ["lookup", f"model:{draft_folder}@chain:3"]
    setups = {rows: replace(setup, rows=rows) for rows in (1, 3)}
    return {rows: runner.measure(one, runner.prepare(one, specs)) for rows, one in setups.items()}


def test_three_rows_give_the_texts_of_one(setup, samples):
    texts = [{(sample.run, sample.task): sample.tokens for sample in samples[rows]} for rows in (1, 3)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3 * 7
    rows = results.rows(replace(setup, rows=3), samples[3])
    assert {row.identical for row in rows} == {"yes"}
    assert {row.tokens for row in rows} == {7 * 15}


def test_shares_of_time_sum_to_the_time_that_passed(setup):
    (run,) = runner.prepare(replace(setup, rows=3), ())
    watch = runner.time.perf_counter()
    answers = run.answers(replace(setup, rows=3), range(7))
    passed = runner.time.perf_counter() - watch
    total = sum(sample.seconds for sample in answers)
    assert 0.8 * passed < total <= passed
    assert total < sum(sample.first_token_seconds + sum(gap for _, gap in sample.bursts) for sample in answers)
    assert all(sample.prompt_seconds < sample.seconds for sample in answers)


def test_lengths_and_tau_are_of_single_rows(setup, samples):
    own = results.rows(replace(setup, rows=3), samples[3])[2]
    alone = results.rows(setup, samples[1])[2]
    assert (own.tau, own.lengths) == (alone.tau, alone.lengths)
    assert own.acceptance == alone.acceptance


def test_a_sweep_measures_every_run_at_every_number_of_rows(setup):
    runs = runner.prepare(setup, ["lookup", "transformers"])
    ticks = []
    loads = concurrency.sweep(setup, runs, (1, 9), repeat=1, on_progress=lambda: ticks.append(1))
    assert [(load.run, load.rows) for load in loads] == [("plain", 1), ("lookup", 1), ("plain", 9), ("lookup", 9)]
    assert all(load.tokens_per_second > 0 and load.token_ms["p50"] <= load.token_ms["p99"] for load in loads)
    assert len(ticks) == concurrency.num_answers(setup, 2, (1, 9), 1) == 2 * 2 * (7 + 9)


def test_more_rows_than_prompts_repeat_the_prompts_with_other_seeds(setup):
    loaded = concurrency.loaded(setup, 9)
    assert [task.prompt for task in loaded.tasks] == [setup.tasks[index % 7].prompt for index in range(9)]
    assert loaded.params_of(7).seed != loaded.params_of(0).seed
    assert concurrency.loaded(setup, 2).tasks == setup.tasks


def test_a_replay_of_several_rows_is_refused(setup):
    with pytest.raises(ValueError, match="follows one text at a time, but rows is 2"):
        runner.prepare(replace(setup, rows=2, is_replay=True), ())


@pytest.mark.parametrize(
    ("text", "words"), [("1,x", "whole numbers"), ("0", "from 1 to 32"), ("33", "from 1 to 32"), ("2,2", "given once")]
)
def test_numbers_of_rows_out_of_bounds_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        concurrency.read_levels(text)
