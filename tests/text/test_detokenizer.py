"""Streamed text is compared with its definition: decoding all tokens at once."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import REAL, TOKENIZERS

from headstart.text.detokenizer import Detokenizer
from headstart.text.tokenizer import decode


def stream(tokenizer, pushes):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(push) for push in pushes), detokenizer.flush()]


def pushes_of(tokenizer) -> st.SearchStrategy[list[list[int]]]:
    """Random tokens in random groups, ids beyond the vocabulary included; few distinct ones, so that bytes meet."""
    size = len(tokenizer) + 2
    token = st.one_of(st.integers(0, size - 1), st.sampled_from(tokenizer.encode(" a€😀 b.", add_special_tokens=False)))
    return st.lists(st.lists(token, max_size=6), max_size=30)


@pytest.mark.parametrize("name", [*TOKENIZERS, *REAL])
def test_streamed_pieces_join_to_the_text_decoded_at_once(name):
    tokenizer = (TOKENIZERS | REAL)[name]

    @settings(max_examples=100, deadline=None)
    @given(pushes_of(tokenizer))
    def check(pushes):
        assert "".join(stream(tokenizer, pushes)) == decode(tokenizer, list(chain(*pushes)))

    check()


@pytest.mark.parametrize("name", [*TOKENIZERS, *REAL])
def test_real_text_is_streamed_one_token_at_a_time(name):
    """Long enough that the context is cut many times."""
    tokenizer = (TOKENIZERS | REAL)[name]
    token_ids = tokenizer.encode("A cab. Über €5 — 日本語 😀👍🏽, naïve  b\n\n" * 20, add_special_tokens=False)
    assert "".join(stream(tokenizer, [[token_id] for token_id in token_ids])) == decode(tokenizer, token_ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_final_text_does_not_depend_on_how_tokens_were_grouped(name, data):
    pushes = data.draw(pushes_of(TOKENIZERS[name]))
    together, alone = Detokenizer(TOKENIZERS[name]), Detokenizer(TOKENIZERS[name])
    for push in pushes:
        assert together.push(push) == "".join(alone.push([token_id]) for token_id in push)


def test_a_character_waits_for_its_last_byte():
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = [*tokenizer.encode("a😀"), *tokenizer.encode("b")]
    assert stream(tokenizer, [[token_id] for token_id in token_ids]) == ["a", "", "", "", "😀", "b", ""]


def test_a_run_of_byte_tokens_waits_for_its_end_because_one_wrong_byte_spoils_it():
    """A common error of engines: ü is complete after two byte tokens, and yet the final text does not contain it."""
    tokenizer = TOKENIZERS["byte_fallback"]
    first, second, wrong, a = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xBC>", "<0xFF>", "a"])
    assert stream(tokenizer, [[first], [second], [a]]) == ["", "", "üa", ""]
    assert stream(tokenizer, [[first], [second], [wrong], [a]]) == ["", "", "", "\ufffd\ufffd\ufffda", ""]


def test_a_special_token_inside_a_run_of_bytes_does_not_end_it():
    tokenizer = TOKENIZERS["byte_fallback"]
    first, end, second, a = tokenizer.convert_tokens_to_ids(["<0xC3>", "<|end|>", "<0xBC>", "a"])
    assert stream(tokenizer, [[first], [end], [second], [a]]) == ["", "", "", "üa", ""]


def test_a_character_is_complete_even_where_special_tokens_fill_the_context_between_its_bytes():
    tokenizer = TOKENIZERS["byte_level"]
    a, end = tokenizer.convert_tokens_to_ids(["a", "<|end|>"])
    first, *rest = tokenizer.encode("😀")
    pushes = [[a] * 40 + [first, end, end, end, rest[0]], *([token_id] for token_id in rest[1:])]
    assert stream(tokenizer, pushes)[1:] == ["", "😀", ""]


def test_an_invalid_byte_is_released_when_the_next_one_shows_it():
    tokenizer = TOKENIZERS["byte_level"]
    lone = tokenizer.encode("€")[-1]
    assert stream(tokenizer, [[lone]] * 4) == ["", "\ufffd", "\ufffd", "\ufffd", "\ufffd"]


def test_the_space_in_front_of_a_word_is_kept_inside_and_lost_at_the_start():
    tokenizer = TOKENIZERS["byte_fallback"]
    word = tokenizer.convert_tokens_to_ids("▁a")
    assert stream(tokenizer, [[word], [word]]) == ["a", " a", ""]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("token", ["a", "<0xE2>", "<|end|>", "â"])
def test_the_cost_of_a_push_does_not_grow_with_the_text(name, token, monkeypatch):
    """Whatever is repeated, letters, bytes that never become a character, special tokens: tokens decoded per token."""
    tokenizer = TOKENIZERS[name]
    token_id = tokenizer.convert_tokens_to_ids(token)
    num_decoded = []
    monkeypatch.setattr("headstart.text.detokenizer.decode", lambda _, ids: num_decoded.append(len(ids)) or decode(tokenizer, ids))
    stream(tokenizer, [[token_id or 0]] * 4000)
    assert sum(num_decoded) < 80 * 4000
