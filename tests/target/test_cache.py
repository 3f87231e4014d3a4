"""Seats and slots of the KV cache, compared with plain lists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headstart.target.cache import KVCache, LayerShape, Seating

SHAPES = [LayerShape(2, 4, 3), LayerShape(1, 4, 4)]  # keys and values of different widths; the second layer shares a store


@given(
    st.lists(st.one_of(st.tuples(st.just("take"), st.integers(1, 30)), st.tuples(st.just("back"), st.integers(0, 5))), max_size=40)
)
def test_every_slot_is_free_or_used_once_after_any_takes_and_returns(steps):
    seating = Seating(4, 64)
    used: dict[int, int] = {}
    for what, number in steps:
        if what == "take":
            fits = seating.find(number) is not None
            seat = seating.take(number)
            assert (seat is not None) == fits
            if seat is not None:
                assert seat == min({0, 1, 2, 3} - used.keys())
                used[seat] = number
        elif number in used:
            seating.give_back(number)
            del used[number]
        seating.check()
        assert {seat: seating[seat].capacity for seat in seating.taken} == used
        assert (seating.num_used, seating.num_free) == (sum(used.values()), 64 - sum(used.values()))
    for seat in used:
        seating.give_back(seat)
    assert seating.take(64) == 0  # all runs are merged again


def test_a_new_seat_takes_the_smallest_run_that_fits():
    seating = Seating(4, 30)
    seats = [seating.take(size) for size in (4, 10, 2, 6)]
    seating.give_back(seats[1])
    seating.give_back(seats[3])  # free: [4, 14) and [16, 30), which merged with the rest
    assert seating.find(10).start == 4
    assert seating.find(11).start == 16
    assert seating.find(15) is None


def test_no_seat_is_found_when_all_are_taken():
    seating = Seating(1, 10)
    seating.take(2)
    assert seating.take(2) is None


def test_a_cache_without_slots_is_refused():
    with pytest.raises(ValueError, match="a cache of 0 slots for 2 rows holds nothing"):
        Seating(2, 0)


def test_lost_and_shared_slots_are_noticed():
    seating = Seating(2, 10)
    seating.take(4)
    seating._free = []
    with pytest.raises(AssertionError, match="lost"):
        seating.check()


def fresh(num_seats: int = 3, capacity: int = 20) -> KVCache:
    seating = Seating(num_seats, num_seats * capacity)
    for _ in range(num_seats):
        seating.take(capacity)
    return KVCache(SHAPES, seating, "cpu", torch.float32)


def write(cache: KVCache, seat: int, values: list[int]) -> None:
    """Write as a forward does: every node's keys and values, behind the committed slots."""
    first = cache.seating[seat].start + cache.lengths[seat]
    for layer in range(len(SHAPES)):
        for part, store in enumerate(cache.layer(layer)):
            store[:, first : first + len(values)] = torch.tensor(values)[:, None] + 1000.0 * (2 * layer + part)


def read(cache: KVCache, seat: int) -> list[int]:
    """The committed values, asserting that all layers agree."""
    first = cache.seating[seat].start
    contents = set()
    for layer in range(len(SHAPES)):
        for part, store in enumerate(cache.layer(layer)):
            held = store[:, first : first + cache.lengths[seat]] - 1000.0 * (2 * layer + part)
            assert bool((held == held[:1, :, :1]).all())
            contents.add(tuple(held[0, :, 0].int().tolist()))
    assert len(contents) == 1
    return [*contents.pop()]


ROUND = st.tuples(st.integers(1, 2), st.lists(st.booleans(), max_size=5))  # stem, and which drafts are kept


@given(st.lists(st.lists(ROUND, min_size=3, max_size=3), max_size=4), st.integers(0, 3), st.integers(0, 20))
def test_a_cache_holds_the_kept_nodes_and_nothing_else(turns, fork_after, fork_length):
    cache = fresh(capacity=40)
    model: list[list[int]] = [[], [], []]
    count = 0
    for turn, rounds in enumerate(turns):
        kept = [[index for index, is_kept in enumerate(drafts) if is_kept] for _, drafts in rounds]
        for seat, (stem, drafts) in enumerate(rounds):
            values = [*range(count, count := count + stem + len(drafts))]
            write(cache, seat, values)
            model[seat] += [*values[:stem], *(values[stem + index] for index in kept[seat])]
        cache.commit([0, 1, 2], [stem for stem, _ in rounds], kept)
        if turn == fork_after:
            length = min(fork_length, len(model[0]))
            cache.fork(0, 2, length)
            model[2] = model[0][:length]
        assert [read(cache, seat) for seat in range(3)] == model


def test_a_commit_moves_only_the_rows_that_are_named():
    cache = fresh()
    for seat in range(3):
        write(cache, seat, [10 * seat, 10 * seat + 1, 10 * seat + 2])
    cache.commit([2], [1], [[1]])
    assert cache.lengths == [0, 0, 2]
    assert read(cache, 2) == [20, 22]


def test_a_freed_seat_is_empty():
    cache = fresh()
    write(cache, 1, [1, 2, 3])
    cache.commit([1], [3], [[]])
    cache.free(1)
    assert cache.lengths == [0, 0, 0]


def test_a_fork_beyond_what_is_committed_is_refused():
    cache = fresh(capacity=4)
    with pytest.raises(AssertionError, match="beyond what is committed"):
        cache.fork(0, 1, 1)


def test_bytes_are_those_of_the_stores():
    cache = fresh()
    assert cache.bytes == sum(store.nbytes for store in cache._stores.values())
