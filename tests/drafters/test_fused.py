"""Several drafters in one: the tokens of plain decoding, what each part is told, and how far each is trusted."""

import pytest
import torch
from cells import DISTRIBUTIONS
from heads import heads_for
from scripted import Scripted, asks, check_empty, decode, random_trees, right, texts, wrong
from tiny import VOCAB, cut, tiny

from headstart.drafters import Drafter, Restorable
from headstart.drafters.draft_model import ModelDrafter
from headstart.drafters.fused import Fused
from headstart.drafters.lookup import Lookup
from headstart.engine.drafter_loading import make, split_parts
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain, StaticTree
from headstart.speculation.tree import Drafts

PLANNERS = {"own": None, "chain": Chain(4), "best": Best(nodes=6, depth=3, width=2, beam=2), "static": StaticTree.full(2, 2)}
PARTS = {
    "lookup and modules": lambda target, answers: [Lookup(floor=0.01, min_gain=0.0), heads_for(target, "mtp")],
    "different taps": lambda target, answers: [heads_for(target, "eagle3"), Lookup(), heads_for(target, "medusa")],
    "a model and a script": lambda target, answers: [
        ModelDrafter(cut(target.model, 2)),
        Scripted(random_trees(VOCAB, 8), answers, planner=Best(nodes=8, depth=6, width=8, beam=8)),
    ],
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("parts", PARTS)
def test_joined_drafters_give_the_tokens_of_plain_decoding(parts, rows, distribution):
    target, requests = tiny(), asks(VOCAB, [6, 13, 3, 9], [22, 9, 17, 12], distribution)
    plain, _ = decode(target, requests)
    for planner in PLANNERS.values():
        fused = Fused(PARTS[parts](target, texts(requests, plain)))
        drafted, engine = decode(target, requests, fused, planner, max_rows=rows, chunk=5)
        assert drafted == plain
        assert engine.stats.drafts > 0


def test_a_joined_drafter_keeps_the_protocol_and_adds_up_its_parts():
    target = tiny()
    parts = [Lookup(), heads_for(target, "mtp"), heads_for(target, "eagle3")]
    fused = Fused(parts)
    assert isinstance(fused, Drafter)
    assert isinstance(fused, Restorable)
    assert fused.name == "lookup+mtp+eagle3"
    assert fused.taps == (-1, 0, 1)
    assert fused.slot_bytes == sum(part.slot_bytes for part in parts)


class Tapping(Scripted):
    """Records the features that it is told, by position, and drafts what its script says."""

    def __init__(self, taps, name="tapping"):
        super().__init__(wrong(VOCAB), [], name, taps)
        self.features = {}

    def extend(self, kept):
        super().extend(kept)
        for position, features in zip(kept.positions.tolist(), kept.features, strict=True):
            self.features[position] = features

    def snapshot(self):
        return {seat: list(text) for seat, text in self.texts.items()}

    def restore(self, snapshot):
        self.texts = {seat: list(text) for seat, text in snapshot.items()}


def test_each_part_gets_the_features_that_it_taps():
    target, requests = tiny(), asks(VOCAB, [6], [9], SamplingParams())
    alone = [Tapping((0, 1)), Tapping((1, -1)), Tapping((0, 1, -1))]
    for part in alone:
        decode(target, requests, part)
    together = [Tapping((0, 1), "first"), Tapping((1, -1), "second"), Tapping((0, 1, -1), "third")]
    decode(target, requests, Fused(together))
    for one, joined in zip(alone, together, strict=True):
        assert one.features.keys() == joined.features.keys()
        for position, features in one.features.items():
            torch.testing.assert_close(features, joined.features[position])


# -- trust --


class Confident(Scripted):
    """Scripted, with the same chance for each draft given its parent."""

    def __init__(self, script, answers, name, chance):
        super().__init__(script, answers, name, planner=Best(nodes=8, depth=4, width=8, beam=8))
        self.chance = chance

    def propose(self, rows):
        drafts = super().propose(rows)
        return Drafts(
            *(getattr(drafts, name) for name in ("tokens", "parents", "rows", "depths")), self.chance**drafts.depths, drafts.sources
        )


def test_a_part_that_is_wrong_is_trusted_less_and_one_that_is_right_more():
    target, requests = tiny(), asks(VOCAB, [6], [80], SamplingParams())
    plain, _ = decode(target, requests)
    answers = texts(requests, plain)
    liar, sage = Confident(wrong(VOCAB), answers, "liar", 0.45), Confident(right(3), answers, "sage", 0.3)
    fused, seen = Fused([liar, sage], enough=9), []
    engine = Engine(target, fused, Best(nodes=3, depth=3, width=2, beam=2), max_rows=1)
    request = engine.add(requests[0].prompt, requests[0].params)
    while request.finish_reason is None:
        engine.step()
        if request.finish_reason is None:
            seen.append(fused.odds(request.seat))
    assert request.output == plain[0]
    assert seen[0] == (1.0, 1.0)
    assert seen[-1][0] < 0.2
    assert seen[-1][1] > 3
    assert engine.stats.tau > 3  # the sage's drafts are verified, though the liar's chances are larger


def test_a_seat_that_is_freed_is_trusted_anew():
    target, requests = tiny(), asks(VOCAB, [6], [30], SamplingParams())
    plain, _ = decode(target, requests)
    fused = Fused([Confident(wrong(VOCAB), texts(requests, plain), "liar", 0.45), Lookup()])
    decode(target, requests, fused)
    assert fused.odds(0) == (1.0, 1.0)


def test_samples_of_one_prompt_are_those_of_separate_requests():
    target, (ask,) = tiny(), asks(VOCAB, [12], [14], SamplingParams(temperature=1))
    answers = []
    for drafter in (None, Fused([Lookup(floor=0.01, min_gain=0), heads_for(target, "mtp")])):
        engine = Engine(target, drafter, max_rows=3)
        leader = engine.add(ask.prompt, ask.params, seed=1)
        others = [engine.add(ask.prompt, ask.params, seed=seed, leader=leader) for seed in (2, 3)]
        for _ in engine.run():
            engine.seating.check()
        check_empty(engine)
        answers.append([request.output for request in (leader, *others)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("enough", "is_asked"), [(0.5, False), (1.0, True)])
def test_later_parts_do_not_draft_where_earlier_ones_promise_enough(enough, is_asked):
    target, requests = tiny(), asks(VOCAB, [6], [16], SamplingParams())
    plain, _ = decode(target, requests)
    answers = texts(requests, plain)
    first, second = Confident(right(1), answers, "first", 0.6), Failing(wrong(VOCAB), answers)
    second.fails_at = ("propose", -1)
    drafted, _ = decode(target, requests, Fused([first, second], enough), Best(nodes=2, depth=1, width=2))
    assert drafted == plain
    assert (second.calls > 0) == is_asked


# -- rounds that fail --


class Failing(Scripted):
    """Raises once, at the given call of `propose` or `extend`."""

    calls = 0
    fails_at: tuple[str, int] = ("", 0)

    def _count(self, method):
        if method == self.fails_at[0]:
            self.calls += 1
            if self.calls == self.fails_at[1]:
                raise RuntimeError("out of memory")

    def extend(self, kept):
        self._count("extend before")
        super().extend(kept)
        self._count("extend after")

    def propose(self, rows):
        self._count("propose")
        return super().propose(rows)


@pytest.mark.parametrize("method", ["extend before", "extend after", "propose"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_after_a_round_that_failed_all_parts_go_on_from_the_state_before_it(method, call):
    target, requests = tiny(), asks(VOCAB, [7, 4], [15, 15], SamplingParams(temperature=1))
    plain, _ = decode(target, requests)
    failing = Failing(right(2), texts(requests, plain), planner=Best(nodes=8, depth=4, width=8, beam=8))
    failing.fails_at = (method, call)
    engine = Engine(target, Fused([heads_for(target, "mtp"), failing, Lookup()]), max_rows=2, chunk=4)
    running = [engine.add(ask.prompt, ask.params) for ask in requests]
    with pytest.raises(RuntimeError, match="out of memory"):
        for _ in engine.run():
            pass
    for _ in engine.run():
        engine.seating.check()
    assert [request.output for request in running] == plain
    assert engine.stats.tau > 2
    check_empty(engine)


# -- refusals and names --


def test_the_rejection_rule_is_refused_when_the_engine_is_made():
    target = tiny()
    with pytest.raises(ValueError, match=r"drafter lookup\+mtp joins .* not exact with accept='rejection'; take accept='coupled'"):
        Engine(target, Fused([Lookup(), heads_for(target, "mtp")]), accept="rejection")


def test_typical_acceptance_and_joined_drafters_go_together():
    target, requests = tiny(), asks(VOCAB, [6], [12], SamplingParams(temperature=1))
    engine = Engine(target, Fused([Lookup(), heads_for(target, "mtp")]), max_rows=1, accept="typical")
    request = engine.add(requests[0].prompt, requests[0].params)
    for _ in engine.run():
        pass
    assert len(request.output) == 12


@pytest.mark.parametrize("parts", [[], [Lookup()], [Lookup(), Lookup()]])
def test_at_least_two_different_drafters_are_joined(parts):
    with pytest.raises(ValueError, match="cannot be joined; name at least two, each once"):
        Fused(parts)


def test_enough_is_positive():
    with pytest.raises(ValueError, match="enough is 0; it must be positive"):
        Fused([Lookup(), heads_for(tiny(), "mtp")], enough=0)


def test_a_part_with_taps_that_cannot_be_restored_is_refused():
    with pytest.raises(ValueError, match="drafter scripted reads the target's hidden states and cannot return"):
        Fused([Lookup(), Scripted(right(), [], taps=(-1,))])


def test_a_plus_joins_drafters_unless_a_folder_has_it_in_its_name(tmp_path):
    for name in ("heads", "a+b", "a+b+c"):
        (tmp_path / name).mkdir()
    assert split_parts("lookup") == ["lookup"]
    assert split_parts("lookup+mtp") == ["lookup", "mtp"]
    assert split_parts(f"lookup+{tmp_path}/a+b") == ["lookup", f"{tmp_path}/a+b"]
    assert split_parts(f"{tmp_path}/a+b+c+lookup") == [f"{tmp_path}/a+b+c", "lookup"]
    assert split_parts(f"model:{tmp_path}/a+b+{tmp_path}/heads") == [f"model:{tmp_path}/a+b", f"{tmp_path}/heads"]


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="drafter 'nothing' is unknown"):
        make("lookup+nothing", tiny())
