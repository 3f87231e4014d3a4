"""Texts that are kept for later requests, seats that grow, and requests that lose their seat: the tokens stay the same."""

import random

import pytest
from heads import heads_for
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import AsDrafted, Ask, Scripted, asks, decode, random_trees, texts
from tiny import VOCAB, tiny

from headstart.drafters.lookup import Lookup
from headstart.engine.engine import Engine
from headstart.engine.prefixes import SHORTEST, num_common
from headstart.speculation.params import SamplingParams
from headstart.target.cache import Seating

GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.9, top_p=0.9, frequency_penalty=0.3)
HEADROOM = 25


def conversation(turns: int, length: int = 20) -> list[tuple[int, ...]]:
    """Prompts of a conversation, each of which begins with the one before."""
    rng = random.Random(1)
    words = [rng.randrange(VOCAB) for _ in range(turns * length)]
    return [tuple(words[: (turn + 1) * length]) for turn in range(turns)]


def run(engine: Engine, requests: list[Ask]) -> list[list[int]]:
    added = [engine.add(ask.prompt, ask.params) for ask in requests]
    for _ in engine.run():
        engine.seating.check()
    return [request.output for request in added]


# -- texts that are kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", [None, "lookup", "medusa", "eagle3", "mtp"])
def test_a_conversation_is_scored_once_and_its_answers_stay_the_same(kind, params):
    target = tiny()
    requests = [Ask(prompt, SamplingParams(**{**vars(params), "max_tokens": 8, "seed": 5})) for prompt in conversation(4)]
    plain, _ = decode(target, requests)
    drafter = None if kind is None else Lookup() if kind == "lookup" else heads_for(target, kind)
    engine = Engine(target, drafter, max_rows=2, prefixes=2)
    for index, ask in enumerate(requests):
        request = engine.add(ask.prompt, ask.params)
        for _ in engine.run():
            engine.seating.check()
        assert request.output == plain[index]
        assert request.num_copied == (0 if index == 0 else len(requests[index - 1].prompt) - 1)
        assert sum(part.nodes - part.drafts for part in request.rounds[:1]) == len(ask.prompt) - request.num_copied
    assert len(engine.state.prefixes) == 2


def test_a_running_requests_prompt_is_shared_too():
    target, system = tiny(), tuple(range(1, 40))
    engine = Engine(target, max_rows=3)
    first = engine.add((*system, 50), SamplingParams(max_tokens=9))
    engine.step()
    second = engine.add((*system, 51), SamplingParams(max_tokens=9))
    for _ in engine.run():
        pass
    assert (first.num_copied, second.num_copied) == (0, len(system) - 1)
    plain, _ = decode(target, [Ask((*system, 51), SamplingParams(max_tokens=9))])
    assert second.output == plain[0]


def test_texts_with_little_in_common_share_nothing():
    engine = Engine(tiny(), max_rows=1, prefixes=3)
    common = tuple(range(SHORTEST))
    run(engine, [Ask((*common, 50, 51), SamplingParams(max_tokens=3))])
    request = engine.add((*common, 52), SamplingParams(max_tokens=3))
    list(engine.run())
    assert request.num_copied == 0


def test_the_least_recently_used_text_gives_up_its_slots_first():
    target, (short, middle, _) = tiny(), conversation(3)
    other = tuple(reversed(middle))
    engine = Engine(target, max_rows=1, prefixes=2)
    one = SamplingParams(max_tokens=2)
    run(engine, [Ask(short, one), Ask(other, one), Ask(middle, one)])  # the last one uses the first one's text
    kept = [prefix.tokens[:3] for prefix in engine.state.prefixes]
    assert kept == [short[:3], middle[:3]]


def test_kept_texts_never_keep_a_request_waiting():
    target = tiny()
    memory = 80 * Engine(target).slot_bytes
    engine = Engine(target, max_rows=2, prefixes=8, memory=memory)
    requests = asks(VOCAB, [30] * 12, [30] * 12, GREEDY)
    plain, _ = decode(target, requests)
    assert run(engine, requests) == plain
    assert engine.seating.num_used <= 80
    assert all(seat in {prefix.seat for prefix in engine.state.prefixes} for seat in engine.seating.taken)


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=60), st.integers(0, 60))
def test_the_common_beginning_is_counted(one, other, shared):
    one, other = tuple(other[:shared] + one), tuple(other)
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    assert num_common(one, other) == count


# -- seats that grow, and requests that lose their seat ---------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", [None, "lookup", "medusa", "eagle3", "mtp"])
def test_a_request_that_loses_its_seat_goes_on_with_the_same_tokens(kind, params):
    target = tiny()
    requests = asks(VOCAB, [10, 20, 5, 12], [60] * 4, params)
    plain, _ = decode(target, requests)
    drafter = None if kind is None else Lookup() if kind == "lookup" else heads_for(target, kind)
    small = Engine(target, drafter, max_rows=1)
    memory = (100 + 2 * small.scheduler.headroom) * small.slot_bytes
    engine = Engine(target, drafter, max_rows=4, memory=memory, ahead=4)
    added = [engine.add(ask.prompt, ask.params) for ask in requests]
    for _ in engine.run():
        engine.seating.check()
    assert [request.output for request in added] == plain
    assert sum(request.num_preempted for request in added) > 0
    assert added[0].num_preempted == 0  # who came first keeps its seat
    assert engine.seating.num_free == engine.seating.num_slots


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 50)), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 60),
    st.integers(1, 64),
    st.integers(0, 1000),
)
def test_whatever_the_memory_the_tokens_are_those_of_plain_decoding(sizes, ahead, prefixes, more, chunk, seed):
    target, (lengths, tokens) = tiny(), zip(*sizes, strict=True)
    requests = asks(VOCAB, lengths, tokens, SAMPLED, seed)
    requests += [Ask((*ask.prompt, 7, seed % VOCAB), ask.params) for ask in requests[:2]]
    plain, _ = decode(target, requests)
    scripted = Scripted(random_trees(VOCAB, 8, seed), texts(requests, plain), planner=AsDrafted(8, 4))
    slots = max(len(ask.prompt) + ask.params.max_tokens for ask in requests) + HEADROOM + more
    memory = slots * Engine(target).slot_bytes
    engine = Engine(target, scripted, max_rows=3, memory=memory, ahead=ahead, prefixes=prefixes, chunk=chunk)
    assert run(engine, requests) == plain
    assert engine.seating.num_used == sum(engine.seating[prefix.seat].capacity for prefix in engine.state.prefixes)


class Failing(Scripted):
    """Fails in some rounds."""

    rng = random.Random(3)

    def propose(self, rows):
        if self.rng.random() < 0.2:
            raise RuntimeError("by chance")
        return super().propose(rows)


def test_rounds_that_fail_change_no_token_where_texts_are_kept_and_seats_grow():
    target = tiny()
    prompts = conversation(5)
    requests = [Ask(prompt, SamplingParams(max_tokens=20, seed=3)) for prompt in (*prompts, *prompts)]
    plain, _ = decode(target, requests)
    drafter = Failing(random_trees(VOCAB, 8), texts(requests, plain), planner=AsDrafted(8, 4))
    memory = 260 * Engine(target).slot_bytes
    engine = Engine(target, drafter, max_rows=3, memory=memory, ahead=3, prefixes=2)
    added = [engine.add(ask.prompt, ask.params) for ask in requests]
    num_failed = 0
    while not engine.is_idle:
        try:
            engine.step()
        except RuntimeError:
            num_failed += 1
        engine.seating.check()
    assert num_failed > 3
    assert [request.output for request in added] == plain


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 12)), max_size=40))
def test_slots_are_never_lost_or_shared(steps):
    seating, seats = Seating(6, 40), []
    for action, index, size in steps:
        if action == 0 and (seat := seating.take(size)) is not None:
            seats.append(seat)
        elif seats and action == 1:
            seat = seats[index % len(seats)]
            before = seating[seat]
            if seating.extend(seat, before.capacity + size):
                assert (seating[seat].start, seating[seat].capacity) == (before.start, before.capacity + size)
        elif seats and action == 2:
            seat = seats[index % len(seats)]
            if size < seating[seat].capacity:
                seating.shrink(seat, size)
            else:
                seating.give_back(seats.pop(index % len(seats)))
        seating.check()


# -- the chunk --------------------------------------------------------------------------------------------------------------


def test_a_short_prompt_does_not_wait_for_a_long_one():
    engine = Engine(tiny(), max_rows=3, chunk=16)
    engine.add((1, 2, 3, 4, 5) * 20, SamplingParams(max_tokens=4))
    short = engine.add((1, 2, 3), SamplingParams(max_tokens=1))
    engine.step()
    assert short.finish_reason == "length"


def test_a_long_prompt_is_not_kept_waiting_by_short_ones_that_keep_coming():
    engine = Engine(tiny(), max_rows=4, chunk=16)
    long = engine.add((1, 2, 3, 4, 5) * 20, SamplingParams(max_tokens=1))
    for _ in range(13):
        for _ in range(3):
            engine.add(tuple(range(1, 15)), SamplingParams(max_tokens=1))
        engine.step()
    assert long.finish_reason == "length"


def test_settings_out_of_range_are_refused():
    for wrong in ({"prefixes": -1}, {"ahead": 0}):
        with pytest.raises(ValueError, match="at least 0 and 1"):
            Engine(tiny(), **wrong)
