"""Stop strings, and text streams that are cut at them, compared with reading character by character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TOKENIZERS

from headstart.text.text_stream import StopStrings, TextStream


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character; stop as soon as the text ends in a stop string, the longest if in several."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=500)
@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_reading_character_by_character_would(pieces, stops):
    reader, out, stopped = StopStrings(stops), "", None
    for piece in pieces:
        text, stopped = reader.push(piece)
        out += text
        if stopped:
            break
    assert (out if stopped else out + reader.flush(), stopped) == naive_stop("".join(pieces), stops)


def test_only_text_that_may_become_a_stop_string_is_held_back():
    reader = StopStrings(["\n\nUser:"])
    assert reader.push("Yes.\n") == ("Yes.", None)
    assert reader.push("\n") == ("", None)
    assert reader.push("Use it") == ("\n\nUse it", None)
    assert reader.push("\n\nUser: hm") == ("", "\n\nUser:")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop string is empty"):
        StopStrings(["\n", ""])


def test_a_single_stop_string_need_not_be_a_list():
    assert StopStrings("end").push("the end") == ("the ", "end")


def test_a_stop_string_inside_a_push_counts_the_tokens_that_belong_to_the_answer():
    tokenizer = TOKENIZERS["byte_level"]
    answer = TextStream(tokenizer, ["b."])
    assert answer.push(tokenizer.encode("aab")).text == "aa"
    piece = answer.push(tokenizer.encode(".cc"))
    assert (piece.text, piece.num_tokens_used, piece.stopped) == ("", 1, "b.")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab€. ", max_size=5)), st.lists(st.text("ab€. ", min_size=1, max_size=3), max_size=2))
def test_a_text_stream_uses_the_same_tokens_whether_they_come_alone_or_together(pushes, stops):
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = [tokenizer.encode(push) for push in pushes]
    together = run(TextStream(tokenizer, stops), token_ids)
    alone = run(TextStream(tokenizer, stops), [[token_id] for push in token_ids for token_id in push])
    assert together == alone
    assert (together[0], together[2]) == naive_stop("".join(pushes), stops)


def run(answer: TextStream, pushes: list[list[int]]) -> tuple[str, int, str | None]:
    text, num_used = "", 0
    for push in pushes:
        piece = answer.push(push)
        text, num_used = text + piece.text, num_used + piece.num_tokens_used
        if piece.stopped:
            return text, num_used, piece.stopped
    last = answer.flush()
    return text + last.text, num_used, last.stopped


def test_a_stop_string_in_bytes_that_the_end_makes_final_is_still_found():
    tokenizer = TOKENIZERS["byte_fallback"]
    answer = TextStream(tokenizer, ["ü"])
    a, first, second = tokenizer.convert_tokens_to_ids(["a", "<0xC3>", "<0xBC>"])
    assert answer.push([a, first, second]).text == "a"
    assert answer.flush().stopped == "ü"
