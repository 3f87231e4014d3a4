"""The suffix automaton against a search of the whole text, then the drafter that uses it."""

import random
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headstart.drafters import Drafter
from headstart.drafters.lookup import Lookup, Record, SuffixAutomaton
from headstart.speculation.distribution import SamplingTensors
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Plan
from headstart.speculation.rows import Rows
from headstart.speculation.tree import ROOT, Kept

TEXTS = st.lists(st.integers(0, 2), max_size=30)


# -- the automaton --


def occurrences(text: list[int], words: list[int]) -> list[int]:
    """The indices of the tokens that follow each occurrence of `words`."""
    return [index for index in range(len(words), len(text)) if text[index - len(words) : index] == words]


def naive_followers(text: list[int], read: list[int]) -> list[tuple[int, int, int]]:
    """(token, length of the match, rivals) of all tokens that followed a suffix of `read`: longest match, then latest first."""
    followers: dict[int, tuple[int, int, int]] = {}
    for length in range(len(read), 0, -1):
        indices = occurrences(text, read[len(read) - length :])
        for index in reversed(indices):
            followers.setdefault(text[index], (text[index], length, len({text[i] for i in indices})))
    return list(followers.values())


@given(TEXTS)
def test_the_texts_match_is_its_longest_suffix_that_occurred_before(text):
    lengths = [length for length in range(1, len(text)) if occurrences(text, text[len(text) - length :])]
    assert SuffixAutomaton(text).end[1] == max(lengths, default=0)


@given(TEXTS, st.integers(1, 3))
def test_followers_are_those_that_a_search_of_the_text_finds(text, count):
    automaton = SuffixAutomaton(text)
    followers = automaton.followers(automaton.end, count)
    assert [(f.token, f.length, f.rivals) for f in followers] == naive_followers(text, text)[:count]
    assert [f.rank for f in followers] == list(range(len(followers)))


@given(TEXTS, st.lists(st.integers(0, 2), max_size=6))
def test_followers_of_a_draft_are_those_of_text_and_draft_together(text, choices):
    automaton, read = SuffixAutomaton(text), list(text)
    match = automaton.end
    for choice in choices:
        followers = automaton.followers(match, 3)
        assert [(f.token, f.length, f.rivals) for f in followers] == naive_followers(text, read)
        if not followers:
            return
        chosen = followers[choice % len(followers)]
        read, match = [*read, chosen.token], chosen.match


def fibonacci_word(size: int) -> list[int]:
    """A text that repeats as much as one can without being periodic."""
    first, second = [0], [0, 1]
    while len(second) < size:
        first, second = second, second + first
    return second[:size]


def count_lines(action) -> int:
    """How many lines of lookup.py run: a cost without a clock."""
    num_lines = 0

    def trace(frame, event, _):
        nonlocal num_lines
        num_lines += event == "line"
        return trace if frame.f_code.co_filename.endswith("lookup.py") else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return num_lines


@pytest.mark.parametrize(
    "text",
    [
        [7] * 4000,
        [1, 2, 3] * 1333,
        fibonacci_word(4000),
        random.Random(0).choices(range(2), k=4000),
        random.Random(0).choices(range(500), k=4000),
        list(range(4000)),
    ],
    ids=["one token", "period", "fibonacci", "bits", "words", "never twice"],
)
def test_a_token_costs_the_same_at_the_end_of_a_long_text_as_at_its_start(text):
    automaton = SuffixAutomaton()

    def read(tokens):
        for token in tokens:
            automaton.followers(automaton.end, 4)
            automaton.extend(token)

    costs = [count_lines(lambda part=part: read(part)) for part in (text[:1000], text[1000:2000], text[2000:3000], text[3000:])]
    assert max(costs) < 450 * 1000
    assert all(later < 1.5 * earlier for earlier, later in pairwise(costs))


@given(st.lists(st.integers(0, 2), max_size=200))
def test_memory_grows_with_the_text_and_no_faster(text):
    automaton = SuffixAutomaton(text)
    assert len(automaton._followers) <= 2 * len(text) + 1
    assert sum(map(len, automaton._followers)) <= 3 * len(text)


def test_a_longer_match_with_fewer_rivals_has_a_better_chance():
    record, automaton = Record(), SuffixAutomaton([1, 2, 3, 4, 9, 3, 5, 1, 2, 3])
    best, other = automaton.followers(automaton.end, 2)
    assert (best.token, best.length, best.rivals, other.token, other.length, other.rivals) == (4, 3, 1, 5, 1, 2)
    assert record.chance(best) > 0.5 > record.chance(other)


def test_chances_follow_how_often_such_followers_were_right():
    automaton = SuffixAutomaton([1, 2, 1])
    followers = automaton.followers(automaton.end, 1)
    always_right, never_right = Record(), Record()
    for _ in range(50):
        always_right.learn(followers, 2)
        never_right.learn(followers, 3)
    assert always_right.chance(followers[0]) > 0.9
    assert never_right.chance(followers[0]) < 0.1


def test_a_follower_is_counted_only_where_those_of_lower_rank_were_wrong():
    automaton = SuffixAutomaton([1, 2, 1, 3, 1])
    followers = automaton.followers(automaton.end, 2)
    record, untouched = Record(), Record()
    record.learn(followers, followers[0].token)
    assert record.chance(followers[1]) == untouched.chance(followers[1])
    record.learn(followers, followers[1].token)
    assert record.chance(followers[1]) > untouched.chance(followers[1])


# -- the drafter --


def rows_of(*texts: list[int], depth: int = 4, width: int = 4, beam: int = 4, nodes: int = 15) -> Rows:
    sampling = SamplingTensors.of([SamplingParams()] * len(texts), [0] * len(texts), "cpu")
    return Rows(
        seats=tuple(range(len(texts))), roots=tuple(text[-1] for text in texts),
        root_positions=tuple(len(text) - 1 for text in texts), depths=(depth,) * len(texts),
        plan=Plan(depth, width, beam, nodes), sampling=sampling, vocab=100,
    )  # fmt: skip


def kept_of(*texts: list[int], starts: tuple[int, ...] | None = None) -> Kept:
    seats = tuple(range(len(texts)))
    starts = starts or (0,) * len(texts)
    return Kept(seats, tuple(map(tuple, texts)), starts, starts, starts, None, torch.device("cpu"))


def drafter_of(*texts: list[int], **settings: float) -> Lookup:
    drafter = Lookup(**settings)
    drafter.extend(kept_of(*texts))
    return drafter


def num_drafts(drafter: Lookup, prompt: list[int], answer: list[int], **plan: int) -> list[int]:
    """The number of drafts in each round of a target whose answer is `answer`; the drafter has read `prompt`."""
    text, sizes = list(prompt), []
    while left := answer[len(text) - len(prompt) :]:
        drafts = drafter.propose(rows_of(text, **plan))
        drafts.check()
        path = {ROOT: 0}  # kept nodes: their depth
        nodes = zip(drafts.tokens.tolist(), drafts.parents.tolist(), drafts.depths.tolist(), strict=True)
        for node, (token, parent, depth) in enumerate(nodes):
            if parent in path and depth < len(left) and token == left[depth - 1]:
                path[node] = depth
        new = left[: max(path.values()) + 1]
        drafter.extend(kept_of([text[-1], *new], starts=(len(text) - 1,)))
        text += new
        sizes.append(len(drafts))
    return sizes


def test_lookup_is_a_drafter():
    assert isinstance(Lookup(), Drafter)


def test_a_copied_passage_takes_one_round_for_every_depth_plus_one_tokens():
    passage = list(range(10, 50))
    prompt = [*passage, 1, *passage[:8]]
    assert len(num_drafts(drafter_of(prompt), prompt, passage[8:38], depth=4)) == 30 / 5


def test_a_text_that_repeats_nothing_is_never_drafted_for():
    assert num_drafts(drafter_of([1, 2, 3]), [1, 2, 3], list(range(10, 60))) == [0] * 50


def test_wrong_followers_stop_the_drafting_and_a_repetition_starts_it_again():
    noise = random.Random(0).choices(range(60), k=900)  # every token occurred before, and does not predict the next
    drafter = drafter_of([0])
    sizes = num_drafts(drafter, [0], noise)
    assert sum(sizes[:100]) > 0.2 * 100
    assert sum(sizes[-300:]) < 0.1 * 300
    assert len(num_drafts(drafter, [0, *noise], list(range(70, 90)) * 3)) < 40


def test_several_followers_become_branches():
    text = [5, 1, 20, 21, 22, 6, 1, 30, 31, 32, 7, 1]
    drafts = drafter_of(text, floor=0.01).propose(rows_of(text, depth=2))
    drafts.check()
    assert drafts.tokens[drafts.depths == 1].tolist() == [30, 20]
    assert drafts.tokens[drafts.depths == 2].tolist() == [31, 21]


def test_branches_share_their_common_beginning():
    text = [1, 2, 3, 10, 0, 1, 2, 3, 11, 0, 1, 2]
    drafts = drafter_of(text, floor=0.01).propose(rows_of(text, depth=2))
    assert drafts.tokens.tolist() == [3, 11, 10]
    assert drafts.parents.tolist() == [ROOT, 0, 0]


def test_chances_fall_along_a_path_and_siblings_share_at_most_one():
    text = random.Random(1).choices(range(4), k=200)
    drafts = drafter_of(text, floor=1e-6).propose(rows_of(text, depth=6, nodes=40))
    chances, parents = drafts.chances.tolist(), drafts.parents.tolist()
    assert len(drafts) == 40
    assert sorted(chances, reverse=True) == chances
    for parent in set(parents):
        of_parent = 1.0 if parent == ROOT else chances[parent]
        assert sum(c for c, p in zip(chances, parents, strict=True) if p == parent) <= of_parent + 1e-6


def test_the_plan_bounds_depth_width_beam_and_nodes():
    text = random.Random(1).choices(range(4), k=200)
    drafter = drafter_of(text, floor=1e-6)
    chain = drafter.propose(rows_of(text, depth=3, width=1, beam=1))
    assert chain.depths.tolist() == [1, 2, 3]
    assert chain.parents.tolist() == [ROOT, 0, 1]
    narrow = drafter.propose(rows_of(text, depth=3, width=3, beam=1, nodes=100))
    expanded = {int(narrow.depths[parent]) for parent in narrow.parents.tolist() if parent != ROOT}
    assert len({parent for parent in narrow.parents.tolist() if parent != ROOT}) == len(expanded)
    assert len(drafter.propose(rows_of(text, nodes=2))) == 2
    assert len(drafter.propose(rows_of(text, depth=0))) == 0


@pytest.mark.parametrize(("settings", "expected"), [({}, 4), ({"floor": 0.6}, 1), ({"min_gain": 5.0}, 0)])
def test_floor_drops_candidates_and_min_gain_drops_the_row(settings, expected):
    text = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert len(drafter_of(text, **settings).propose(rows_of(text))) == expected


@pytest.mark.parametrize("settings", [{"floor": 0.0}, {"floor": 1.0}, {"min_gain": -1.0}])
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is "):
        Lookup(**settings)


def test_each_row_is_drafted_for_from_its_own_text_alone():
    copied, fresh = [1, 2, 3, 4, 5, 6, 1, 2], [7, 8, 9]
    drafts = drafter_of(copied, fresh, copied).propose(rows_of(copied, fresh, copied))
    drafts.check()
    assert drafts.tokens[drafts.rows == 0].tolist() == drafts.tokens[drafts.rows == 2].tolist() == [3, 4, 5, 6]
    assert 1 not in drafts.rows


def test_a_prompt_in_chunks_gives_the_drafts_of_a_prompt_at_once():
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    chunked = drafter_of(text[:5])
    chunked.extend(kept_of(text[4:], starts=(4,)))
    assert chunked.propose(rows_of(text)).tokens.tolist() == drafter_of(text).propose(rows_of(text)).tokens.tolist()


def test_a_fork_has_the_first_tokens_and_a_text_of_its_own():
    text = [1, 2, 3, 4, 1, 9]
    drafter = drafter_of(text, floor=0.01)
    drafter.fork(0, 1, 5)
    rows = rows_of(text, [1, 2, 3, 4, 1])
    drafts = drafter.propose(rows)
    assert 0 not in drafts.rows
    assert drafts.tokens[drafts.rows == 1].tolist() == [2, 3, 4, 1]


def test_a_freed_seat_forgets_its_text():
    drafter = drafter_of([1, 2, 3, 1, 2])
    drafter.free(0)
    drafter.free(0)
    drafter.extend(kept_of([1, 2]))
    assert len(drafter.propose(rows_of([1, 2]))) == 0
