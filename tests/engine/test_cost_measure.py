"""What rounds cost: rounds of the sizes asked for keep drafts, events time a GPU, and the sizes are those of its graphs."""

import copy
import time

import pytest
import torch
from fake_device import fake_device, send
from heads import heads_for
from recorded_graph import RecordedGraph
from tiny import ARCHITECTURES, random_model, tiny

from headstart.engine import cost_measure, timed_rounds
from headstart.engine.cost_measure import GRAPH_SIZES, _median, _stepped, measure_cost
from headstart.engine.timed_rounds import EventClock, Sample, Setting, TimedRounds
from headstart.target.flat_rows import node_bucket
from headstart.target.graphs import FlatRunner
from headstart.target.target import Target


class Event:
    """Stands for an event of CUDA: it happens when it is recorded."""

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return 1000 * (later.at - self.at)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kept", [1, 2])
def test_a_timed_round_has_the_nodes_asked_for_and_keeps_so_many_drafts(rows, kept):
    target = tiny("llama")
    for drafter, setting in ((None, Setting(rows * 9, 4)), (heads_for(target, "eagle3"), Setting(rows * 13, 3, 2))):
        rounds = TimedRounds(target, drafter, rows, prompt=6, growth=60, nodes=rows * 8 * 5, kept=kept)
        for _ in range(12):  # past the end of a text
            before = rounds.engine.stats.copy()
            sample = rounds.sample(setting)
            spent = rounds.engine.stats.since(before)
        assert spent.nodes == setting.nodes
        assert rows * (1 + kept) <= spent.tokens <= rows * 4  # what follows may be right by chance
        assert min(sample.forward, sample.draft, sample.host) > 0
        assert rows * 6 <= sample.context < rows * 66


def test_a_round_without_drafts_keeps_none():
    rounds = TimedRounds(tiny("llama"), None, 1, prompt=6, growth=60, nodes=8, kept=2)
    before = rounds.engine.stats.copy()
    rounds.sample(Setting(1))
    assert rounds.engine.stats.since(before).tokens == 1


def test_the_median_of_few_samples_is_their_lower_quartile_and_disturbed_ones_do_not_count():
    def samples(*forwards, is_clean=True):
        return [Sample(value, 0.0, 0.0, 10.0, is_clean) for value in forwards]

    assert _median(samples(1, 2, 3, 4, 5, 6, 7, 8, 9)).forward == 5
    assert _median(samples(1, 2, 3, 40)).forward == 1
    assert _median([*samples(3, 4, 5), *samples(1, is_clean=False)]).forward == 3
    assert _median(samples(7, is_clean=False)).forward == 7


# -- on a GPU --


def test_events_are_summed_by_part_in_seconds_once_the_kernels_have_run():
    times, waits = iter((1.0, 4.0, 10.0, 11.5, 20.0, 21.0)), []

    class Stopped:
        def record(self):
            self.at = next(times)

        def elapsed_time(self, later):
            assert waits, "an event is read before the kernels have run"
            return later.at - self.at

    clock = EventClock(lambda: waits.append(1), Stopped)
    host = {"draft": 0.0, "score": 0.0}
    for share in ("draft", "score", "draft"):
        with clock(host, share):
            pass
    assert clock.take() == {"draft": pytest.approx(0.004), "score": pytest.approx(0.0015)}
    assert host == {"draft": 0.0, "score": 0.0}
    assert clock.take() == {}


def test_the_sizes_on_a_gpu_are_those_that_graphs_are_captured_for():
    assert GRAPH_SIZES[:7] == (1, 2, 4, 8, 16, 24, 32)
    assert GRAPH_SIZES[-1] == 256
    assert {node_bucket(size) for size in range(1, 257)} == {*GRAPH_SIZES}


def test_a_forward_that_is_padded_to_the_next_graph_costs_as_much_as_that():
    nodes, seconds = _stepped((1, 2, 4, 8, 32), (1.0, 1.1, 1.5, 2.0, 6.0))
    assert dict(zip(nodes, seconds, strict=True)) == {1: 1.0, 2: 1.1, 3: 1.5, 4: 1.5, 5: 2.0, 8: 2.0, 32: 6.0}


@pytest.mark.parametrize("new_graph", [None, RecordedGraph])
def test_the_cost_on_a_device_is_timed_with_events_and_has_the_steps_of_its_graphs(new_graph, monkeypatch):
    made = []

    def events(device):
        assert device.type == "meta"
        made.append(EventClock(lambda: None, Event))
        return made[-1]

    monkeypatch.setattr(timed_rounds, "_events", events)
    monkeypatch.setattr(cost_measure, "_REPEATS", 1)
    monkeypatch.setattr(cost_measure, "_sizes", lambda target, seconds: (1, 2, 4, 8, 16))
    model = random_model(ARCHITECTURES["llama"](), torch.float64)
    heads = heads_for(Target(copy.deepcopy(model), check=False), "mtp")
    with fake_device():
        target = Target(send(model), check=False)
        target.flat_runner = FlatRunner(new_graph=new_graph)
        cost = measure_cost(target, send(heads), 0.01)
        assert (target.flat_runner.num_replayed > 0) == (new_graph is not None)
    assert len(made) == 7  # of the forwards, of one row and of several, and these with and without the drafter
    assert min(cost.seconds) > 0 < cost.draft.first
    assert list(cost.seconds) == sorted(cost.seconds)
    has_steps = any(cost.forward(size) == cost.forward(size + 1) for size in cost.nodes if node_bucket(size) != size)
    assert has_steps == (new_graph is not None)
