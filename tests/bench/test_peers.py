"""transformers' own generate as runs beside ours."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from headstart.bench import peers, results, runner
from headstart.bench.tables import table, table_of_times
from headstart.speculation.params import SamplingParams
from headstart.target.target import Target

PROMPT = (*range(10, 22), *range(10, 16))


@pytest.fixture(scope="module")
def setup(model_folder):
    tasks = tuple(runner.Task((first, *PROMPT)) for first in (10, 40))
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    return runner.Setup(Target.load(model_folder), tasks, params, stop_ids=(2,))


@pytest.fixture(scope="module")
def measured(setup, draft_folder):
    """Runs and rows by the kind of peer."""
    names = ("transformers", "transformers:lookup", f"transformers:model:{draft_folder}")
    runs = runner.prepare(setup, names)
    rows = results.rows(setup, runner.measure(setup, runs), {run.name: run.memory for run in runs})
    return dict(zip(("plain", "generate", "lookup", "model"), zip(runs, rows, strict=True), strict=True))


def test_peers_give_the_text_of_plain_decoding(measured):
    assert [row.identical for _, row in measured.values()] == ["yes"] * 4
    assert [row.is_peer for _, row in measured.values()] == [False, True, True, True]
    assert [row.tokens for _, row in measured.values()] == [40] * 4


def test_the_copy_of_the_weights_has_none_of_our_kernels(setup, measured, model_folder):
    models = {run.model for run, row in measured.values() if row.is_peer}
    (model,) = models
    assert model is not setup.target.model
    fresh = AutoModelForCausalLM.from_pretrained(model_folder, dtype=setup.target.dtype)
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True))
    assert model.config._attn_implementation == fresh.config._attn_implementation


def test_rounds_of_peers_are_counted_by_their_forwards(measured):
    generate, assisted = measured["generate"][1], measured["model"][1]
    assert (generate.tau, generate.acceptance, generate.lengths, generate.nodes) == (1, [], [38], 1)
    assert assisted.tau >= 1
    assert sum(n * count for n, count in enumerate(assisted.lengths, 1)) == pytest.approx(assisted.tau * sum(assisted.lengths))
    assert assisted.nodes > 1
    assert assisted.shares["draft"] > generate.shares["draft"] == 0
    assert abs(sum(assisted.shares.values()) - 1) < 1e-6


def test_the_memory_of_peers_names_the_copy_and_the_assistant(setup, measured, draft_folder):
    weights = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_pretrained(draft_folder).parameters())
    cache = (len(PROMPT) + 1 + 20) * setup.target.slot_bytes
    assert measured["generate"][1].memory == {"heads": 0, "cache": cache, "copy": measured["lookup"][1].memory["copy"]}
    assert measured["model"][1].memory["heads"] == weights
    assert measured["model"][1].memory["cache"] > cache
    rows = [row for _, row in measured.values()]
    assert table(rows, "").row_count == table_of_times(rows).row_count == 4


def test_a_sampled_peer_is_not_compared(setup):
    warm = runner.Setup(setup.target, setup.tasks[:1], SamplingParams(max_tokens=6, temperature=1.0, top_p=0.9, seed=3))
    runs = runner.prepare(warm, ["transformers", "lookup"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = runner.measure(warm, runs, repeat=2)
    identical = {row.run: row.identical for row in results.rows(warm, samples)}
    assert identical == {"plain": "yes", "lookup": "yes", "transformers": "n/a"}
    assert [sample.run for sample in samples] == ["plain", "lookup", "transformers"] * 2  # peers last, in each repetition
    drawn = [sample.tokens for sample in samples if sample.run == "transformers"]
    assert drawn[0] == drawn[1]  # seeded


def test_a_peer_ends_at_the_models_stop_tokens(setup):
    stop = runner.measure(setup, runner.prepare(setup, ()))[0].tokens[4]
    ending = runner.Setup(setup.target, setup.tasks[:1], SamplingParams(max_tokens=20, seed=3), stop_ids=(stop, 7))
    plain, peer = runner.measure(ending, runner.prepare(ending, ["transformers"]))
    assert plain.tokens == peer.tokens
    assert peer.tokens[-1] == stop


@pytest.mark.parametrize("name", ["transformers:", "transformers:crystal", "transformers:model:", "transformers:lookup:3"])
def test_an_unknown_peer_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match="of transformers there are transformers, transformers:lookup and transformers:model:PATH"):
        runner.read_spec(name, 0.0, None)


def test_a_peer_with_a_planner_and_settings_it_cannot_honour_are_refused():
    with pytest.raises(ValueError, match="a planner, which transformers does not read"):
        runner.read_spec("transformers:lookup@chain:3", 0.0, None)
    for settings in ({"is_replay": True}, {"rows": 2}, {"weights": "int8"}):
        with pytest.raises(ValueError, match="cannot be measured with --"):
            peers.check_settings(SamplingParams(), **settings)
    with pytest.raises(ValueError, match="use --repetition-penalty"):
        peers.check_settings(SamplingParams(presence_penalty=1.0))
