"""Packing: every prediction of every document once, nothing of the held-out documents, and one sentence for every error."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from folders import END, TEXT, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from headstart.training.packing import Blocks, Packed, read_packed
from headstart.training.token_streams import read_stream

VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def read(tokenizer, tmp_path):
    """A function that writes files by name and packs them; a `.npy` is written from a list, a `.txt` from a string."""

    def read(files: dict[str, object], **settings: object) -> tuple[Packed, str]:
        for name, content in files.items():
            write(tmp_path / name, content)
        return read_packed([tmp_path / name for name in files], tokenizer, **{"length": 8, "vocab": VOCAB, **settings})

    return read


def write(path: Path, content: object) -> None:
    if path.suffix == ".npy":
        np.save(path, np.array(content))
    elif path.suffix == ".txt":
        path.write_text(str(content))
    else:
        lines = "".join(json.dumps(line) + "\n" for line in content).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def unpacked(packed: Packed, indices) -> list[int]:
    """The stream that these blocks were cut from."""
    blocks = [packed.texts[index].tokens.tolist() for index in indices]
    return blocks[0] + [token for block in blocks[1:] for token in block[1:]] if blocks else []


def texts(*documents: str) -> list[dict]:
    return [{"text": document} for document in documents]


# -- blocks --


@given(st.lists(st.lists(st.integers(0, 9), max_size=40), max_size=4), st.integers(2, 9))
def test_each_pair_of_adjacent_tokens_is_in_exactly_one_block_and_in_order(streams, length):
    blocks = Blocks([np.array(stream, np.uint16) for stream in streams], length)
    cut = [block.tokens.tolist() for block in blocks]
    pairs = [pair for block in cut for pair in pairwise(block)]
    assert pairs == [pair for stream in streams for pair in pairwise(stream)]
    assert all(2 <= len(block) <= length for block in cut)
    assert sum(block.num_targets for block in blocks) == len(pairs)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.data())
def test_the_digest_changes_with_any_token(stream, data):
    index = data.draw(st.integers(0, len(stream) - 1))
    other = [*stream[:index], stream[index] + 1, *stream[index + 1 :]]
    assert digest(stream) == digest(stream, np.int64) != digest(other)
    assert digest(stream) != digest(stream, length=7)


def digest(stream: list[int], kind: type = np.uint16, length: int = 5) -> str:
    blocks = Blocks([np.array(stream, kind)], length)
    return Packed(blocks, tuple(range(len(blocks))), ()).digest()


def test_the_digest_changes_with_what_is_read_how_often_and_what_is_held_out():
    blocks = Blocks([np.arange(9)], 3)
    indices = [((0, 1, 2, 3), ()), ((0, 1, 2), (3,)), ((0, 1, 2, 2, 3), ()), ((0, 1, 3, 2), ())]
    assert len({Packed(blocks, train, held_out).digest() for train, held_out in indices}) == 4


def test_padding_is_on_the_right_and_outside_the_loss_mask():
    packed = Packed(Blocks([np.array([1, 2, 3, 4, 5, 6])], 4), (0, 1), ())
    padded = packed.pad([1, 0])
    assert padded.tokens.tolist() == [[4, 5, 6, 0], [1, 2, 3, 4]]
    assert padded.loss_mask.tolist() == [[True, True, True, False], [True] * 4]
    assert (packed.masked_batch().tokens.tolist(), packed.masked_batch().loss_mask.any().item()) == ([[4, 5, 6]], False)


def test_a_billion_tokens_are_cut_into_blocks_without_being_copied():
    stream = np.broadcast_to(np.uint16(7), 10**9)  # one number in memory
    blocks = Blocks([stream, np.array([1, 2])], 513)
    assert len(blocks) == -(-(10**9 - 1) // 512) + 1
    assert blocks[len(blocks) - 1].tokens.tolist() == [1, 2]
    assert np.shares_memory(blocks[12_345].tokens, stream)


# -- files --


def test_documents_of_all_kinds_are_packed_each_with_one_end_token(read, tokenizer):
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the sea"}]
    files = {
        "a.jsonl": [*texts(TEXT[0], "", "the fish"), {"messages": chat}, *texts("a song")],
        "b.txt": TEXT[1],
        "c.jsonl.gz": texts(TEXT[2]),
        "d.npy": [5, 6, 7],
    }
    packed, report = read(files)
    rendered = tokenizer.apply_chat_template(chat, tokenize=False).removesuffix(END)  # the end of a document is added below
    parts = [[TEXT[0], "the fish", rendered, "a song"], [TEXT[1]], [TEXT[2]]]
    expected = [[token for text in part for token in tokenizer.encode(text + END)] for part in parts] + [[5, 6, 7]]
    assert [unpacked(packed, packed.texts.of(stream)) for stream in range(4)] == expected
    assert report.startswith(
        f"4 files with 7 documents of {sum(map(len, expected))} tokens; an epoch reads {len(packed.train)} blocks"
    )


def test_the_size_of_tokenizer_batches_does_not_change_the_stream(read, monkeypatch):
    expected, _ = read({"a.jsonl": texts(*TEXT * 3)})
    monkeypatch.setattr("headstart.training.token_streams.BATCH", 150)
    assert read({"a.jsonl": texts(*TEXT * 3)})[0].digest() == expected.digest()


def test_tokens_have_the_smallest_type_and_those_of_a_file_are_memory_mapped(read):
    packed, _ = read({"a.jsonl": texts(*TEXT), "b.npy": list(range(30))})
    assert packed.texts.streams[0].dtype == np.uint16
    assert isinstance(packed.texts.streams[1].base, np.memmap) or isinstance(packed.texts.streams[1], np.memmap)
    assert read({"a.jsonl": texts(*TEXT)}, vocab=2**17)[0].texts.streams[0].dtype == np.uint32


def test_times_says_how_often_an_epoch_reads_a_file(read, tmp_path):
    files = {"a.npy": list(range(15)), "b.npy": list(range(71)), "c.npy": list(range(8))}  # 2, 10 and 1 blocks of 8
    packed, _ = read(files, times={"a.npy": 3, str(tmp_path / "b.npy"): 1.3})
    assert packed.train == (*(0, 1) * 3, *range(2, 12), 2, 5, 8, 12)
    assert read(files, times={"b.npy": 0.2})[0].train == (0, 1, 2, 7, 12)


# -- the held-out part --


def test_whole_documents_are_held_out_and_equal_ones_together(read, tokenizer):
    documents = [f"{number} {TEXT[number % 3]}" for number in range(60)]
    packed, _ = read({"a.jsonl": texts(*documents, *documents)}, held_out=0.2)
    train, held_out = (set(tokenizer.decode(unpacked(packed, part)).split(END)) - {""} for part in (packed.train, packed.held_out))
    assert train | held_out == set(documents)
    assert not train & held_out
    assert 4 <= len(held_out) <= 20


def test_whether_a_document_is_held_out_does_not_depend_on_the_others(read, tokenizer):
    documents = [f"{number} the cat" for number in range(50)]
    runs = [read({"a.jsonl": texts(*part)}, held_out=0.3)[0] for part in (documents, documents[20:], ["a song", *documents])]
    held_out = [set(tokenizer.decode(unpacked(packed, packed.held_out)).split(END)) & set(documents[20:]) for packed in runs]
    assert held_out[0] == held_out[1] == held_out[2] != set()


def test_at_least_one_document_is_held_out_however_small_the_share(read):
    packed, _ = read({"a.jsonl": texts(*TEXT)}, held_out=0.0001)
    assert packed.held_out
    assert read({"a.jsonl": texts(*TEXT)}, held_out=0.0)[0].held_out == ()


def test_the_end_of_a_file_without_document_boundaries_is_held_out(read):
    packed, _ = read({"a.npy": list(range(100)), "b.txt": TEXT[0]}, held_out=0.2)
    assert unpacked(packed, packed.texts.of(0)) == list(range(80))
    assert unpacked(packed, packed.texts.of(2)) == list(range(80, 100))
    assert set(packed.held_out) == {*packed.texts.of(2), *packed.texts.of(3)}


def test_held_out_may_be_a_file(read, tmp_path):
    write(tmp_path / "other.npy", [9, 8, 7])
    packed, _ = read({"a.npy": list(range(8))}, held_out=tmp_path / "other.npy")
    assert (packed.train, packed.held_out) == ((0,), (1,))
    assert packed.texts[1].tokens.tolist() == [9, 8, 7]


# -- errors --


@pytest.mark.parametrize(
    ("files", "settings", "words"),
    [
        ({"a.jsonl": [{"text": ""}]}, {}, "the number of tokens in .*a.jsonl is 0"),
        ({"a.npy": [4]}, {}, "the number of tokens in .*a.npy is 1, and a prediction needs two"),
        ({"a.npy": [4, 5, 6]}, {"held_out": 0.9}, "of the 3 tokens in .*a.npy none are left to train on; hold out less"),
        ({"a.npy": [4, 5, 6]}, {"times": {"a.npy": 0.1}}, "none are left to train on.*raise times"),
        ({"a.npy": [4, 5, 6]}, {"times": {"b.npy": 2}}, "times names b.npy, which is no file of the data; there are .*a.npy"),
        ({"a.npy": [[4, 5]]}, {}, r"a.npy holds \[1, 2\] int64; tokens are one row of integers"),
        ({"a.npy": [0.5]}, {}, r"a.npy holds \[1\] float64"),
        ({"a.npy": [4, 320]}, {}, "token 320 at 1 of .*a.npy is not in the vocabulary of 320"),
        ({"a.npy": [4, -1]}, {}, "token -1 at 1 of .*a.npy"),
        ({"a.txt": "the cat"}, {"vocab": 319}, "has 320 tokens and the model only 319; set vocab_size to 320"),
        ({"a.jsonl": [{"text": "a"}, {"say": "b"}]}, {}, "line 2 of .*a.jsonl has no field to learn from; give text, messages"),
        ({"a.jsonl": [{"messages": ["a"]}]}, {}, "line 1 of .*a.jsonl: message 0 is a str"),
    ],
)  # fmt: skip
def test_wrong_data_is_one_sentence(read, files, settings, words):
    with pytest.raises(ValueError, match=words):
        read(files, **settings)


def test_a_tokenizer_without_end_token_is_refused_unless_the_data_is_tokens(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    tokenizer.eos_token = None
    (tmp_path / "a.txt").write_text("the cat")
    with pytest.raises(ValueError, match="has no end-of-text token, which must end each document; set its eos_token"):
        read_packed([tmp_path / "a.txt"], tokenizer, length=8, vocab=VOCAB)
    write(tmp_path / "a.npy", [1, 2])
    assert read_packed([tmp_path / "a.npy"], tokenizer, length=8, vocab=VOCAB)[0].train == (0,)


def test_a_file_that_is_not_an_array_is_refused(tmp_path, tokenizer):
    for name, content in (("a.npy", b"tokens"), ("b.npy", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as an array of tokens"):
            read_packed([tmp_path / name], tokenizer, length=8, vocab=VOCAB)
    with pytest.raises(ValueError, match="there is no file"):
        read_packed([tmp_path / "c.npy"], tokenizer, length=8, vocab=VOCAB)


def test_distilled_lines_are_read_as_tokens(tmp_path, tokenizer):
    lines = [{"text": "the cat", "tokens": [5, 6, 7, 0], "loss_mask": [0, 0, 1, 1]}, {"text": "the sea", "tokens": []}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_stream(tmp_path / "answers.jsonl", tokenizer, 320).tokens.tolist() == [5, 6, 7, 0]
    (tmp_path / "answers.jsonl").write_text(json.dumps({"tokens": [5, 999]}))
    with pytest.raises(ValueError, match=r"line 1 of .*answers.jsonl: token 999 is not in the vocabulary of 320"):
        read_stream(tmp_path / "answers.jsonl", tokenizer, 320)
