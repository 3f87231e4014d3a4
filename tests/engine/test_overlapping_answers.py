"""Several answers of one model at once: by turns, nested, in threads, dropped. Each has the text that it has alone."""

import gc
import threading
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import check_empty

from headstart import LLM, load
from headstart.engine.engine import Engine
from headstart.engine.exclusive import Exclusive
from headstart.engine.stats import Stats

SETTINGS = {"max_tokens": 14, "temperature": 1.1, "ignore_eos": True}
PROMPTS = ["The cat", "The sea and the cat", "Once upon a time there was a", "Was für ein", "猫は魚が", "sea"]


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder, dtype=torch.float64, drafter="lookup", exact=False)


@pytest.fixture
def llm(model):
    """A new engine for two rows: other requests wait."""
    return LLM(Engine(model.engine.target, type(model.engine.drafter)(floor=0.01, min_gain=0.0), max_rows=2), model.tokenizer)


@pytest.fixture(scope="module")
def alone(model):
    @cache
    def answer(number):
        return model.generate(PROMPTS[number % len(PROMPTS)], seed=number, **SETTINGS)[0]

    return answer


def stream(llm, number):
    return llm.stream(PROMPTS[number % len(PROMPTS)], seed=number, **SETTINGS)


def text(fragments):
    return "".join(map(str, fragments))


def check_gone(llm):
    """Check that nothing is left of any request, dropped ones included."""
    gc.collect()
    check_empty(llm.engine)


def test_two_streams_by_turns_have_the_texts_they_have_alone(llm, alone):
    pairs = list(zip(stream(llm, 1), stream(llm, 2), strict=False))
    shorter = min(len(pairs), 14)
    assert shorter > 2
    first, second = stream(llm, 1), stream(llm, 2)
    one, two = iter(first), iter(second)
    texts = ["", ""]
    for _ in range(20):
        texts[0] += str(next(one, ""))
        texts[1] += str(next(two, ""))
    assert texts == [alone(1).text, alone(2).text]
    assert [first.answers[0].token_ids, second.answers[0].token_ids] == [alone(1).token_ids, alone(2).token_ids]
    del pairs
    check_gone(llm)


def test_generate_in_the_middle_of_a_stream_disturbs_neither(llm, alone):
    outer, inner = "", []
    for index, piece in enumerate(stream(llm, 3)):
        outer += str(piece)
        if index % 2:
            inner.append(llm.generate(PROMPTS[4], seed=4, **SETTINGS)[0].text)
    assert outer == alone(3).text
    assert len(inner) > 1
    assert set(inner) == {alone(4).text}
    check_gone(llm)


ACTIONS = ["read", "read", "open", "drop", "close", "generate", "drain"]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5)), max_size=30))
def test_any_interleaving_gives_every_answer_its_own_text(model, alone, actions):
    llm = LLM(Engine(model.engine.target, type(model.engine.drafter)(), max_rows=2), model.tokenizer)
    streams, readers, read = {}, {}, {}

    def finish(number):
        read[number] += text(readers[number])
        assert read[number] == alone(number).text == streams[number].answers[0].text

    for action, number in actions:
        if action == "generate":
            assert llm.generate(PROMPTS[number], seed=number, **SETTINGS)[0].text == alone(number).text
        elif action == "open" and number not in streams:
            streams[number] = stream(llm, number)
            readers[number], read[number] = iter(streams[number]), ""
        elif number in streams and action == "read":
            read[number] += str(next(readers[number], ""))
        elif number in streams and action in ("drop", "close", "drain"):
            if action == "drain":
                finish(number)
            if action == "close":
                streams[number].close()
                assert alone(number).text.startswith(streams[number].answers[0].text)
            assert alone(number).text.startswith(read[number])
            del streams[number], readers[number], read[number]
        llm.engine.seating.check()
    for number in streams:
        finish(number)
    streams.clear(), readers.clear()
    check_gone(llm)


def in_threads(*works):
    """Run functions at once, each in a thread. Raises what one of them raised."""
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread never ends"
    if errors:
        raise errors[0]


def test_four_threads_generate_and_stream_at_the_same_time(llm, alone):
    expected = {number: alone(number) for number in range(24)}
    actual = {}

    def generate(numbers):
        for number in numbers:
            actual[number] = llm.generate(PROMPTS[number % len(PROMPTS)], seed=number, **SETTINGS)[0].text

    def read(numbers):
        for number in numbers:
            actual[number] = text(stream(llm, number))

    def leave(numbers):
        for number in numbers:
            for _ in stream(llm, number):
                break
            stream(llm, number)  # and one that is dropped without being read
            actual[number] = expected[number].text

    works = [(generate, range(0, 6)), (read, range(6, 12)), (generate, range(12, 18)), (read, range(18, 23)), (leave, [23] * 6)]
    in_threads(*(lambda work=work, numbers=numbers: work(numbers) for work, numbers in works))
    assert actual == {number: answer.text for number, answer in expected.items()}
    check_gone(llm)


def test_a_stream_that_another_thread_closes_ends_for_its_reader(llm, alone):
    one, pieces, has_started = stream(llm, 5), [], threading.Event()

    def read():
        for piece in one:
            pieces.append(str(piece))
            has_started.set()

    def close():
        has_started.wait(30)
        one.close()

    in_threads(read, close)
    assert alone(5).text.startswith("".join(pieces))
    check_gone(llm)


# -- streams that nobody reads ----------------------------------------------------------------------------------------------


def test_a_stream_that_is_dropped_unread_leaves_nothing_queued(llm):
    for _ in range(3):
        stream(llm, 1)
    check_gone(llm)
    kept = stream(llm, 1)
    llm.generate(PROMPTS[2], seed=2, **SETTINGS)
    assert kept.answers[0].token_ids  # it had a row in the rounds of the other
    del kept
    check_gone(llm)


def test_the_fragments_of_a_stream_that_is_kept_unread_wait_for_its_reader(llm, alone):
    kept = stream(llm, 1)
    assert llm.generate(PROMPTS[2], seed=2, **SETTINGS)[0].text == alone(2).text
    rounds = llm.stats.rounds
    assert text(kept) == alone(1).text
    assert llm.stats.rounds - rounds < 3, "its text had not been made before"
    check_gone(llm)


def test_unread_streams_do_not_keep_others_from_a_seat(llm, alone):
    kept = [stream(llm, number) for number in (1, 2, 3)]  # with two seats
    assert llm.generate(PROMPTS[4], seed=4, **SETTINGS)[0].text == alone(4).text
    assert [text(one) for one in kept] == [alone(number).text for number in (1, 2, 3)]
    check_gone(llm)


def test_a_stream_is_a_context_manager_that_ends_its_request(llm, alone):
    with stream(llm, 1) as one:
        first = str(next(iter(one)))
    check_empty(llm.engine)
    (answer,) = one.answers
    assert answer.finish_reason == "abort"
    assert alone(1).text.startswith(first)
    assert alone(1).token_ids[: len(answer.token_ids)] == answer.token_ids
    assert list(one) == []


def test_a_prompt_that_cannot_run_leaves_no_other_prompt_of_its_call_queued(llm):
    with pytest.raises(ValueError, match="exceeds the context"):
        llm.generate([PROMPTS[0], [1] * 400], **SETTINGS)
    check_gone(llm)


# -- statistics -------------------------------------------------------------------------------------------------------------


def test_statistics_of_answers_cover_each_alone_and_sum_to_the_engines(llm):
    before = llm.stats.copy()
    greedy = SETTINGS | {"temperature": 0.0}  # repeats itself, so that drafts are kept
    answers = llm.generate(PROMPTS, n=2, seed=1, **greedy)
    of_engine, total = llm.stats.since(before), Stats.total(answer.stats for answer in answers)
    for answer in answers:
        assert answer.stats.tokens == len(answer.token_ids)
        assert answer.stats.rounds >= answer.stats.row_rounds > 0
        assert sum(answer.stats.held) >= sum(answer.guessed)
    assert sum(of_engine.held) > 0
    for name in ("tokens", "row_rounds", "drafts", "tried", "held"):
        assert getattr(total, name) == getattr(of_engine, name)
    assert total.nodes == of_engine.nodes  # no dead nodes: only exact kernels add some
    assert total.seconds == pytest.approx(of_engine.seconds)


# -- mutual exclusion -------------------------------------------------------------------------------------------------------


def test_work_inside_work_of_the_same_thread_is_refused_at_once():
    exclusive = Exclusive()
    with pytest.raises(RuntimeError, match="in the middle of a round"):
        exclusive.run(lambda: exclusive.run(lambda: None))
    assert exclusive.run(lambda: exclusive.run_now(lambda: None)) is False
    assert exclusive.run_now(lambda: None) is True
    assert exclusive.run(lambda: 5) == 5


def test_a_waiting_thread_returns_when_its_condition_is_true():
    exclusive, has_started, may_end, results = Exclusive(), threading.Event(), threading.Event(), []

    def work():
        def inside():
            has_started.set()
            may_end.wait(30)
            results.append("worked")

        exclusive.run(inside)

    def wait():
        has_started.wait(30)
        may_end.set()
        results.append(exclusive.run(lambda: "not needed", unless=lambda: "worked" in results))

    in_threads(work, wait)
    assert results == ["worked", None]
