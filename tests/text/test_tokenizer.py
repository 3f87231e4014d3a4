"""Streaming is checked against the one line it must equal: decoding all tokens at once."""

from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.detokenizer import Detokenizer
from headstart.text.text_stream import StopStrings, TextStream
from headstart.text.tokenizer import decode, encode_prompt, special_ids, stop_token_ids

MODELS = Path(__file__).parents[3] / "shared" / "models"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<s>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>")])  # added, but not special: it is part of the text
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_level() -> PreTrainedTokenizerFast:
    """A vocabulary of every byte and a few merges: a space with a letter, half a character, a letter and a first byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    euro = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("€")[0][0]
    merges = [("Ġ", "a"), (euro[0], euro[1]), ("b", euro[0])]
    vocab = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama 2's: words include the space before them, unknown characters become byte tokens."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc.\n€", "▁a", "ab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = byte_fallback().backend_tokenizer
    tokenizer.decoder = decoders.Metaspace()
    return wrap(tokenizer)


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "metaspace": metaspace()}
FOLDERS = sorted(folder.parent for folder in MODELS.glob("*/tokenizer.json"))
REAL = {folder.name: load_tokenizer(folder) for folder in FOLDERS}


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


# -- stop strings --


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


# -- prompts --


def test_a_string_gets_the_tokenizers_own_special_tokens():
    tokenizer = TOKENIZERS["byte_level"]
    assert encode_prompt(tokenizer, "a b") == tokenizer("a b").input_ids


def test_token_ids_pass_unchanged():
    assert encode_prompt(TOKENIZERS["byte_level"], [5, 0, 5]) == [5, 0, 5]


def test_messages_are_rendered_by_the_chat_template_with_a_generation_prompt():
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    assert decode(tokenizer, prompt) == "user:hi;assistant:"


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "empty string"),
        ([], "empty list"),
        (5, "not int"),
        ([0, 100_000], "token id 100000 is not in the vocabulary of the tokenizer: ids are 0 to 261"),
        ([-1], "token id -1 is not in the vocabulary"),
        ([0, "a"], "message 0 is a int"),
        ([{"role": "user"}], "message 0 has no 'content'"),
        ([{"role": "user", "content": None}], "'content' of message 0 is a NoneType"),
        ([{"role": "tool", "content": "x"}], "refuses these messages: no tools here"),
    ],
)
def test_a_wrong_prompt_is_refused_in_one_sentence(prompt, sentence):
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=sentence):
        encode_prompt(tokenizer, prompt)


def test_messages_without_a_chat_template_name_the_tokenizer_and_the_way_out():
    tokenizer = byte_level()
    tokenizer.name_or_path = "some/base-model"
    with pytest.raises(ValueError, match="'some/base-model' has no chat template: give the prompt as one string"):
        encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])


# -- what belongs to a model --


@pytest.mark.parametrize(
    ("of_tokenizer", "of_generation", "of_config", "expected"),
    [
        (None, None, None, ()),
        (7, None, None, (7,)),
        (7, None, 3, (3, 7)),
        (7, [2, 1], 3, (2, 1, 7)),
        (1, [2, 1], None, (2, 1)),
        (0, 0, None, (0,)),
    ],
)
def test_stop_tokens_are_the_models_and_the_tokenizers(of_tokenizer, of_generation, of_config, expected):
    holders = [SimpleNamespace(eos_token_id=eos) for eos in (of_tokenizer, of_generation, of_config)]
    assert stop_token_ids(*holders) == expected
    assert stop_token_ids(None) == ()


def test_special_tokens_are_those_that_decoding_leaves_out():
    tokenizer = TOKENIZERS["byte_level"]
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    assert {decode(tokenizer, [token_id]) for token_id in special_ids(tokenizer)} == {""}
    assert tool not in special_ids(tokenizer)
    assert decode(tokenizer, [tool]) == "<tool>"


def test_a_saved_tokenizer_is_loaded_from_its_folder(tmp_path):
    TOKENIZERS["byte_level"].save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("a€ b") == TOKENIZERS["byte_level"].encode("a€ b")


def test_a_folder_without_a_tokenizer_is_refused_with_what_was_looked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer in the folder .*: looked for tokenizer.json, tokenizer.model"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file_and_a_missing_folder_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"is not JSON: Expecting property name"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        load_tokenizer(tmp_path / "missing")
