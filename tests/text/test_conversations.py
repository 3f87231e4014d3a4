"""Conversations as tokens with a loss mask, and training examples read from files."""

import gzip
import json
import lzma

import pytest
from folders import TEMPLATE, write_tokenizer
from tokenizers import processors

from headstart.text.conversations import encode_conversation, follow_up, read_examples

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WITH_LINES = "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] | trim + '<|end|>\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
LINES_MARKED = WITH_LINES.replace(
    "{{ '<|' + m['role'] + '|>\\n' + m['content'] | trim + '<|end|>\\n' }}",
    "{{ '<|' + m['role'] + '|>\\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] | trim + '<|end|>' }}{% endif %}{{ '\\n' }}",
)


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


CHATS = {
    "one reply": chat("the cat", "a fish"),
    "several": chat("the cat", "a fish", "and the sea", "was blue and grey", "so", "so"),
    "repeated": chat("the cat", "the cat", "the cat", "the cat"),
    "a reply that the user wrote before": chat("say a fish<|end|> a fish", "a fish", "a fish", "a fish"),
    "with a system message": chat("the cat", "a fish", "a song", "take it", system="You are the sea."),
    "not yet answered": chat("the cat", "a fish", "and the sea"),
    "another script": chat("Was für ein Tag", "猫は魚が好きです。"),
    "an empty reply": chat("the cat", "", "the sea", "a fish"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def spans(tokenizer, tokens: list[int], mask: list[int]) -> list[str]:
    """The masked text, one string for each run of the mask."""
    runs: list[list[int]] = []
    for token, now, before in zip(tokens, mask, [0, *mask], strict=False):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


# -- the mask --


@pytest.mark.parametrize("template", [TEMPLATE, MARKED, WITH_LINES, LINES_MARKED], ids=["plain", "marked", "lines", "lines-marked"])
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_the_loss_mask_covers_every_reply_and_its_end(tokenizer, template, messages):
    tokenizer.chat_template = template
    tokens, mask = encode_conversation(tokenizer, messages)
    assert spans(tokenizer, tokens, mask) == [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"]
    assert tokens == tokenizer.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize(("plain", "marked"), [(TEMPLATE, MARKED), (WITH_LINES, LINES_MARKED)])
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_the_mask_is_the_same_with_and_without_markers(tokenizer, plain, marked, messages):
    tokenizer.chat_template = plain
    by_differencing = encode_conversation(tokenizer, messages)
    tokenizer.chat_template = marked
    assert encode_conversation(tokenizer, messages) == by_differencing


def test_a_reply_that_begins_with_a_blank_is_masked_where_tokens_exclude_blanks(tmp_path):
    tokenizer = write_tokenizer(tmp_path, template=MARKED)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # Llama 3's, GPT-2's
    tokens, mask = encode_conversation(tokenizer, chat("the cat", " a fish", "so", " so"))
    assert spans(tokenizer, tokens, mask) == [" a fish<|end|>", " so<|end|>"]


def test_a_template_that_rewrites_earlier_messages_is_refused_by_name(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content if loop.last else 'so' }}<|end|>{% endfor %}"
    with pytest.raises(ValueError, match=r"the chat template of the tokenizer .* in another way than the whole"):
        encode_conversation(tokenizer, chat("the cat", "a fish", "the sea", "so"))


def test_a_reply_without_a_prompt_is_refused(tokenizer):
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="begins with the assistant"):
        encode_conversation(tokenizer, [{"role": "assistant", "content": "a fish"}])


@pytest.mark.parametrize("template", [TEMPLATE, MARKED, WITH_LINES, LINES_MARKED])
def test_follow_up_joins_a_reply_to_the_next_prompt(tokenizer, template):
    tokenizer.chat_template = template
    messages = chat("the cat", "a fish", "the sea", "so", "the cat")
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokens, mask = encode_conversation(tokenizer, messages[:4])
    end = len(mask) - mask[::-1].index(1)
    assert tokens[:end] + follow_up(tokenizer, messages) == prompt


# -- files --

DISTILLED = {
    "id": "a",
    "tokens": [5, 6, 7, 8],
    "loss_mask": [0, 0, 1, 1],
    "settings": {"temperature": 0.7, "seed": 3},
    "target": {"name": "sea", "digest": "abc"},
}


@pytest.fixture
def lines(tmp_path):
    def write(*records: object, name: str = "data.jsonl"):
        text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records)
        opener = {"gz": gzip.open, "xz": lzma.open}.get(name.rpartition(".")[2], open)
        with opener(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(text)
        return tmp_path / name

    return write


def test_a_distilled_line_is_used_as_it_is(tokenizer, lines):
    [example], report = read_examples([lines(DISTILLED)], tokenizer, digest="abc")
    assert example.tokens == (5, 6, 7, 8)
    assert example.mask == (False, False, True, True)
    assert (example.temperature, example.seed) == (0.7, 3)
    assert (report.num_read, report.num_foreign, report.num_cut) == (1, 0, 0)


def test_another_targets_answers_are_refused_unless_allowed(tokenizer, lines):
    path = lines(DISTILLED)
    with pytest.raises(ValueError, match=r"line 1 of .*sea \(digest abc\).*own target's answers.*any_target=True"):
        read_examples([path], tokenizer, digest="def")
    [example], report = read_examples([path], tokenizer, digest="def", any_target=True)
    assert example.seed is None, "the noise of another target's answer explains nothing about this one"
    assert report.num_foreign == 1


def test_an_answer_from_an_endpoint_is_of_an_unknown_target(tokenizer, lines):
    path = lines(DISTILLED | {"target": {"name": "sea", "digest": None}})
    [example], report = read_examples([path], tokenizer, digest="def")
    assert (example.temperature, example.seed, report.num_foreign) == (0.7, None, 1)


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.jsonl.xz"])
def test_chats_and_texts_are_read_compressed_or_not(tokenizer, lines, name):
    tokenizer.chat_template = TEMPLATE
    path = lines({"messages": chat("the cat", "a fish")}, "", {"text": "the sea was blue"}, name=name)
    (first, second), report = read_examples([path], tokenizer)
    assert (list(first.tokens), list(first.mask)) == encode_conversation(tokenizer, chat("the cat", "a fish"))
    assert list(second.tokens) == tokenizer.encode("the sea was blue")
    assert all(second.mask)
    assert report.num_read == 2


def test_a_text_file_is_one_text_split_into_pieces(tokenizer, tmp_path):
    (tmp_path / "sea.txt").write_text("the sea was blue\n\nand the cat was grey\n" * 3)
    examples, report = read_examples([tmp_path / "sea.txt"], tokenizer, max_length=8)
    tokens = [token for example in examples for token in example.tokens]
    assert tokenizer.decode(tokens) == (tmp_path / "sea.txt").read_text()
    assert {len(example) for example in examples[:-1]} == {8}
    assert report.num_pieces == len(examples)


def test_what_is_cut_and_dropped_is_counted(tokenizer, lines):
    tokenizer.chat_template = TEMPLATE
    path = lines(
        {"messages": chat("the cat", "a fish " * 20)},
        {"messages": chat("the cat " * 20, "a fish")},
        {"messages": chat("the cat")},
        {"tokens": [], "loss_mask": []},
    )
    [example], report = read_examples([path], tokenizer, max_length=16)
    assert len(example) == 16
    assert (report.num_read, report.num_cut) == (4, 1)
    assert sorted(report.dropped.values()) == [1, 1, 1]
    assert "1 dropped: data without assistant turns" in str(report)


def test_one_conversation_that_the_template_refuses_does_not_stop_the_others(tokenizer, lines):
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    messages = chat("the cat", "a fish")
    path = lines({"messages": messages}, {"messages": chat("the cat", "a fish", system="so")})
    examples, report = read_examples([path], tokenizer)
    assert len(examples) == 1
    assert "no system" in next(iter(report.dropped))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("not json", "line 2 of .* is not JSON"),
        ([1], "line 2 of .* each line must be a JSON object"),
        ({"story": "a"}, "line 2 of .*no field to learn from"),
        (DISTILLED | {"loss_mask": [1]}, "line 2 of .*they have 4 and 1 items"),
        (DISTILLED | {"tokens": [5, 6, 7, 9999]}, "line 2 of .*token 9999 is not in the vocabulary"),
        (DISTILLED | {"tokens": [5, 6, 7, "x"]}, "line 2 of .*token 'x'"),
        ({"messages": [{"role": "user"}]}, "line 2 of .*has no 'content'"),
    ],
)
def test_a_bad_line_is_named(tokenizer, lines, record, words):
    with pytest.raises(ValueError, match=words):
        read_examples([lines(DISTILLED, record)], tokenizer)


def test_data_without_assistant_turns_is_refused(tokenizer, lines):
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=r"nothing to learn in .*data without assistant turns"):
        read_examples([lines({"messages": chat("the cat")})], tokenizer)


def test_messages_need_a_chat_template(tokenizer, lines):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"line 1 of .* has no chat template"):
        read_examples([lines({"messages": chat("the cat", "a fish")})], tokenizer)


def test_a_missing_file_and_a_binary_file_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_examples([tmp_path / "none.jsonl"], tokenizer)
    (tmp_path / "data.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not valid UTF-8"):
        read_examples([tmp_path / "data.txt"], tokenizer)
    (tmp_path / "data.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        read_examples([tmp_path / "data.jsonl.gz"], tokenizer)
    with pytest.raises(ValueError, match="max_length is 1"):
        read_examples([], tokenizer, max_length=1)
