"""Prompts as token ids, stop tokens, special tokens, and loading tokenizers."""

from types import SimpleNamespace

import pytest
from tiny_tokenizers import TOKENIZERS, byte_level

from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.tokenizer import decode, encode_prompt, special_ids, stop_token_ids

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


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
