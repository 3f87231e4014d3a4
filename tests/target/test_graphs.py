"""A forward through a graph equals the same forward run directly, and so do answers of engines, with every kind of drafter."""

import gc

import pytest
import torch
from heads import heads_for
from recorded_graph import RecordedGraph
from scripted import asks
from small_trees import STEMS, TREE, forest_of, fresh_cache
from tiny import ARCHITECTURES, VOCAB, cut, random_model

from headstart.drafters.draft_model import ModelDrafter
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best
from headstart.speculation.tree import Drafts, merge
from headstart.target import graphs
from headstart.target.flat_rows import bucket, node_bucket
from headstart.target.flex import flex_kernel
from headstart.target.graphs import FlatRunner, cuda_graphs
from headstart.target.target import Target

MODEL = random_model(ARCHITECTURES["llama"]())


def target_with(runner, model=MODEL):
    """A target whose forwards run all rows at once, in this runner."""
    target = Target(model, check=False)
    target.pad_rows, target.flat_runner = True, runner
    return target


def rounds(target, taps=()):
    """Logits and features of a few forwards over growing texts: prompts, then trees, of which some drafts are kept."""
    cache, seats = fresh_cache(target, STEMS)
    results = []
    for stems, kept in ((STEMS, None), ([[1], [2]], [(0, 2), (1,)]), ([[3], [4]], [(), (0,)]), ([[5]], None)):
        here = seats[: len(stems)]
        starts = [cache.lengths[seat] for seat in here]
        drafts = Drafts.none() if kept is None else forest_of(stems).drafts
        forest = merge(stems, starts, [True] * len(stems), drafts)
        scored = target.score(forest, cache, here, taps)
        results += [scored.logits, *(() if scored.features is None else (scored.features,))]
        cache.commit(here, forest.stems, kept or [()] * len(stems))
    return results, cache


@pytest.mark.parametrize("taps", [(), (0, -1)], ids=["", "taps"])
@pytest.mark.parametrize("kernel", ["padded", "flex"])
def test_forwards_through_graphs_equal_forwards_run_directly(taps, kernel, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    expected, expected_cache = rounds(target_with(FlatRunner()), taps)
    new_graph = None if kernel == "flex" else RecordedGraph  # the recorder cannot see into flex_attention
    runner = FlatRunner(flex_kernel, new_graph, True) if kernel == "flex" else FlatRunner(new_graph=new_graph)
    actual, cache = rounds(target_with(runner), taps)
    for new, old in zip(actual, expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-12, rtol=0)
    assert cache.lengths == expected_cache.lengths
    for dim, store in expected_cache._stores.items():
        torch.testing.assert_close(cache._stores[dim][:, : cache.sink], store[:, : cache.sink], atol=1e-12, rtol=0)
    if kernel == "padded":
        assert (runner.num_captured, runner.num_replayed) == (3, 4)  # the third forward has the shapes of the second


def test_a_smaller_forward_in_the_same_bucket_leaves_no_trace_of_the_larger_one(monkeypatch):
    """Four rows, then three: the fourth row's drafts, which are still in the graph's buffers, must not be written again."""
    monkeypatch.setattr(graphs, "node_bucket", lambda size: 32)
    stores = []
    for new_graph in (None, RecordedGraph):
        target = target_with(FlatRunner(new_graph=new_graph))
        cache, seats = fresh_cache(target, [[]] * 4)
        for rows, stem in ((4, [1, 2]), (3, [3, 4, 5, 6])):
            drafts = forest_of([stem] * rows).drafts
            forest = merge([stem] * rows, [cache.lengths[seat] for seat in seats[:rows]], [True] * rows, drafts)
            target.score(forest, cache, seats[:rows])
            cache.commit(seats[:rows], forest.stems, [(1, 4)] * rows)
        committed = [store[:, slots] for store in cache._stores.values() for slots in committed_slots(cache, seats)]
        stores.append(committed)
    assert target.flat_runner.num_captured == 1
    for old, new in zip(*stores, strict=True):
        torch.testing.assert_close(new, old, atol=1e-12, rtol=0)


def committed_slots(cache, seats):
    """The slots of each seat that are committed."""
    starts = [cache.seating[seat].start for seat in seats]
    return [slice(start, start + cache.lengths[seat]) for start, seat in zip(starts, seats, strict=True)]


DRAFTERS = ["model", "hydra++", "mtp", "mtp, 3 modules", "eagle3.1, 40 tokens"]


@pytest.mark.parametrize("name", [None, *DRAFTERS])
def test_engines_on_graphs_give_the_answers_of_engines_without(name):
    """Rows come and go, stems and trees change: texts are equal, and levels of drafters are captured too."""
    answers, runners = [], []
    for new_graph in (None, RecordedGraph):
        target, draft = target_with(FlatRunner(new_graph=new_graph)), cut(MODEL, 2)
        if name == "model":
            draft.pad_rows, draft.flat_runner = True, FlatRunner(new_graph=new_graph)
        drafter = None if name is None else ModelDrafter(draft) if name == "model" else heads_for(target, name)
        engine = Engine(target, drafter, Best(nodes=5, depth=3, width=2, beam=2) if drafter else None, max_rows=3)
        params = SamplingParams(temperature=0.7)
        requests = [engine.add(ask.prompt, ask.params) for ask in asks(VOCAB, [5, 1, 12, 3], [7, 5, 12, 6], params)]
        for _ in engine.run():
            pass
        answers.append([request.output for request in requests])
        runners.append((target.flat_runner, draft.flat_runner))
    assert answers[0] == answers[1]
    of_target, of_draft = runners[1]
    levels_run = of_draft.num_replayed if name == "model" else of_target.num_replayed - engine.stats.rounds
    assert of_target.num_replayed >= engine.stats.rounds
    assert (levels_run > 0) == (name is not None)


def test_nothing_that_the_caller_holds_changes_with_the_next_forward():
    target = target_with(FlatRunner(new_graph=RecordedGraph))
    first, _ = rounds(target)
    before = [logits.clone() for logits in first]
    rounds(target)
    assert all(torch.equal(old, new) for old, new in zip(before, first, strict=True))


class Refusing(RecordedGraph):
    """A graph that waits for the host while it is captured, as experts that are chosen on the host do."""

    def capture(self, work):
        return super().capture(lambda: (work()[0] * torch.ones(1).sum().item(),))


def test_what_cannot_be_captured_runs_directly_and_warns_once():
    expected, _ = rounds(target_with(FlatRunner()))
    runner = FlatRunner(new_graph=Refusing)
    with pytest.warns(UserWarning, match="a forward cannot be captured as a graph and runs directly") as caught:
        actual, _ = rounds(target_with(runner))
    assert len(caught) == 1
    assert (runner.num_captured, runner.num_replayed) == (0, 0)
    for new, old in zip(actual, expected, strict=True):
        assert torch.equal(new, old)


def test_graphs_are_few_and_end_with_their_cache_and_their_target(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    runner = FlatRunner(new_graph=RecordedGraph)
    target = target_with(runner)
    for _ in range(2):
        rounds(target)
        assert len(runner._graphs) <= 2
    gc.collect()
    runner._make_room()
    assert not runner._graphs
    _, cache = rounds(target)
    assert runner._graphs
    target.release()
    assert not runner._graphs
    assert cache.sink == cache.seating.num_slots


def test_long_prompts_run_directly(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_NODES", len(TREE))
    runner = FlatRunner(new_graph=RecordedGraph)
    rounds(target_with(runner))
    assert runner.num_replayed == 1  # only the last forward, of one node, is small enough


def test_cuda_graphs_without_a_gpu_are_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        cuda_graphs()


def test_the_nodes_of_a_graph_are_few_sizes():
    assert [node_bucket(size) for size in (1, 2, 3, 5, 8, 9, 17, 64, 65, 250, 257)] == [1, 2, 4, 8, 8, 16, 24, 64, 96, 256, 384]
    assert [bucket(size) for size in (0, 1, 2, 3, 9)] == [1, 1, 2, 4, 16]
