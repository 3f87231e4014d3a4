"""A drafter is told what was kept when it drafts next, and then knows as much as if it had been told every round."""

from dataclasses import replace

import pytest
import torch
from heads import KINDS, heads_for
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

from headstart.drafters.lookup import Lookup
from headstart.engine.engine import Engine
from headstart.engine.unread import Unread
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import NO_DRAFTS, Plan
from headstart.speculation.tree import Drafts, Kept

GROWN = Plan(depth=2, width=2, beam=2, nodes=99)


class Sometimes:
    """Drafts in every `every`-th round, and verifies nothing. Keeps the drafts by round."""

    def __init__(self, every):
        self.every, self.round, self.drafts = every, 0, {}

    def headroom(self, max_rows):
        return 8

    def plan(self, depths):
        self.round += 1
        return NO_DRAFTS if self.round % self.every else GROWN

    def prune(self, drafts, plan, num_rows):
        self.drafts[self.round] = drafts
        return Drafts.none()


def drafts_of(method, every, prompts):
    planner = Sometimes(every)
    target = tiny("llama")
    drafter = Lookup() if method == "lookup" else heads_for(target, method)
    engine = Engine(target, drafter, planner, max_rows=2, chunk=8)
    for seed, prompt in enumerate(prompts):
        engine.add(prompt, SamplingParams(max_tokens=12 + 5 * seed, temperature=0.5, seed=seed, ignore_eos=True))
    for _ in engine.run():
        pass
    return planner.drafts


@pytest.mark.parametrize("method", [*KINDS, "lookup"])
@pytest.mark.parametrize("prompts", [[[5, 17, 3, 44]], [[5, 17, 3, 44], [8, 61, 7, 30] * 3], [[1, 2, 3]] * 3])
def test_a_drafter_told_late_proposes_what_one_told_every_round_does(method, prompts):
    always, sometimes = drafts_of(method, 1, prompts), drafts_of(method, 4, prompts)
    assert len(sometimes) >= 2
    for number, drafts in sometimes.items():
        assert drafts.tokens.tolist() == always[number].tokens.tolist()
        torch.testing.assert_close(drafts.chances, always[number].chances, rtol=1e-5, atol=1e-6)


ROUNDS = st.lists(st.dictionaries(st.integers(0, 3), st.integers(1, 4), min_size=1), min_size=1, max_size=5)


def rounds_of(lengths):
    """Rounds in which some seats kept so many tokens each; a token's feature is the token."""
    ends, rounds = dict.fromkeys(range(4), 0), []
    for round_ in lengths:
        texts = {seat: tuple(100 * seat + place for place in range(ends[seat], ends[seat] + n + 1)) for seat, n in round_.items()}
        features = torch.tensor([[float(token)] for text in texts.values() for token in text[:-1]])
        starts = tuple(ends[seat] for seat in texts)
        rounds.append(
            Kept(tuple(texts), tuple(texts.values()), starts, (0,) * len(texts), (0,) * len(texts), features, torch.device("cpu"))
        )
        for seat, n in round_.items():
            ends[seat] += n
    return rounds


def unread_of(rounds):
    """The rounds, waiting to be told."""
    unread = Unread()
    for kept in rounds:
        unread = unread.with_part(kept)
    return unread


@given(ROUNDS, st.integers(1, 12))
def test_joined_rounds_hold_each_seats_text_with_its_features(lengths, chunk):
    ends: dict[int, int] = {}
    for kept in unread_of(rounds_of(lengths)).joined(chunk):
        assert len({*kept.seats}) == len(kept.seats)
        for seat, text, start in zip(kept.seats, kept.texts, kept.starts, strict=True):
            assert start == ends.get(seat, 0)
            ends[seat] = start + len(text) - 1
            assert text == tuple(100 * seat + place for place in range(start, start + len(text)))
        assert kept.features[:, 0].tolist() == kept.tokens.tolist()
    assert ends == {seat: total for seat in range(4) if (total := sum(round_.get(seat, 0) for round_ in lengths))}


@given(ROUNDS, ROUNDS, st.integers(0, 3))
def test_a_seat_that_was_left_has_only_what_came_after(before, after, seat):
    unread = unread_of(rounds_of(before)).without(seat)
    for kept in rounds_of(after):
        unread = unread.with_part(kept)
    told = list(unread.joined(10**6))
    num_after = sum(round_.get(seat, 0) for round_ in after)
    texts = [text for kept in told for other, text in zip(kept.seats, kept.texts, strict=True) if other == seat]
    assert sum(len(text) - 1 for text in texts) == num_after
    for kept in told:
        assert kept.features[:, 0].tolist() == kept.tokens.tolist()


def test_nothing_is_told_of_seats_that_were_all_left():
    assert list(unread_of(rounds_of([{0: 2}, {0: 1}])).without(0).joined(99)) == []


def test_rounds_without_features_are_joined_too():
    rounds = [replace(kept, features=None) for kept in rounds_of([{0: 2}, {0: 1}])]
    assert [kept.features for kept in unread_of(rounds).joined(99)] == [None]


def test_plain_rounds_cost_the_drafter_nothing():
    class Counting(Lookup):
        calls = 0

        def extend(self, kept):
            self.calls += 1
            super().extend(kept)

    drafter, target = Counting(), tiny("llama")
    engine = Engine(target, drafter, Sometimes(10**6), max_rows=1)
    engine.add([1, 2, 3], SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in engine.run():
        pass
    assert drafter.calls == 0
