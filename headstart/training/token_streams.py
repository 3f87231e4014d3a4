"""From files to streams of tokens: documents one after another, each ended by the tokenizer's end of text.

This file knows files and tokenizers. It refuses to know blocks, batches and models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from headstart.text.jsonl import is_jsonl, read_records, read_text
from headstart.text.tokenizer import checked_messages, name_of, render, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = NDArray[np.integer[Any]]  # [tokens] of some integer kind: as small as the vocabulary allows, or as a file has them

ARRAY = ".npy"
BATCH = 1_000_000  # characters that are made into tokens together
CHUNK = 1 << 22  # tokens of a mapped file that are in memory at once


@dataclass(frozen=True, eq=False)
class Stream:
    """The tokens of a file. ends: [documents] int64, where each document ends; a single one where nobody knows."""

    tokens: Tokens
    ends: NDArray[np.int64]

    def parted(self, share: float) -> tuple[Tokens, Tokens]:
        """What teaches, and what is held out: the last share of the tokens."""
        border = len(self.tokens) - round(share * len(self.tokens))
        return self.tokens[:border], self.tokens[border:]

    def parted_by(self, is_held_out: NDArray[np.bool_]) -> tuple[Tokens, Tokens]:
        """What teaches, and what is held out. is_held_out: [documents]."""
        if not is_held_out.any():
            return self.tokens, self.tokens[:0]
        is_out = np.repeat(is_held_out, np.diff(self.ends, prepend=0))
        return self.tokens[~is_out], self.tokens[is_out]

    def marks(self) -> NDArray[np.float64]:
        """[documents] a number in [0, 1) that a document has by its tokens alone, wherever it stands; equal ones share it."""
        starts = [0, *self.ends[:-1].tolist()]
        return np.array([_mark(self.tokens[start:end]) for start, end in zip(starts, self.ends.tolist(), strict=True)])


def read_stream(path: Path, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Stream:
    """The tokens of JSONL with `text`, `messages` or, distilled, `tokens` (packed or not), of a plain text, which is one document,
    or of a `.npy` file.

    Raises ValueError, naming the file, for what cannot be read, and for tokens that are not below `vocab`.
    """
    if path.suffix == ARRAY:
        tokens = _stored(path, vocab)
        return Stream(tokens, np.array([len(tokens)]))
    end = _end(tokenizer, vocab)
    kind = np.uint16 if vocab <= 2**16 else np.uint32
    pieces = [np.array(ids if ids[-1] == end else [*ids, end], kind) for ids in _encoded(path, tokenizer, vocab) if ids]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return Stream(np.concatenate(pieces) if pieces else np.empty(0, kind), ends)


def chunks(tokens: Tokens) -> Iterator[Tokens]:
    """A stream, a few megabytes at a time."""
    return (tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK))


@dataclass(frozen=True)
class _Document:
    """A plain text, a rendered chat, which holds its special tokens already, or the tokens of a distilled line."""

    kind: Literal["text", "chat", "tokens"]
    content: Any


def _encoded(path: Path, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Iterator[list[int]]:
    """The tokens of each document."""
    for kind, group in groupby(_documents(path, tokenizer, vocab), key=lambda document: document.kind):
        contents = (document.content for document in group)
        yield from contents if kind == "tokens" else _tokenized(contents, tokenizer, is_chat=kind == "chat")


def _tokenized(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, is_chat: bool) -> Iterator[list[int]]:
    for batch in _batches(texts):
        found: Any = tokenizer(
            batch, add_special_tokens=not is_chat, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        yield from found["input_ids"]


def _documents(path: Path, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Iterator[_Document]:
    """Empty ones are left out."""
    if not is_jsonl(path):
        found = iter([_Document("text", read_text(path))])
    else:
        found = (_document(f"line {number} of {path}", fields, tokenizer, vocab) for number, fields in read_records(path))
    return (document for document in found if document.content)


def _document(where: str, fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vocab: int) -> _Document:
    if isinstance(fields.get("tokens"), list):
        strange = next((token for token in fields["tokens"] if not isinstance(token, int) or not 0 <= token < vocab), None)
        if strange is not None:
            raise ValueError(f"{where}: token {strange!r} is not in the vocabulary of {vocab}")
        return _Document("tokens", fields["tokens"])
    if isinstance(fields.get("messages"), list):
        try:
            return _Document("chat", render(tokenizer, checked_messages(fields["messages"]), tokenize=False))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if isinstance(fields.get("text"), str):
        return _Document("text", fields["text"])
    raise ValueError(f"{where} has no field to learn from; give text, messages, or the tokens of distilled lines")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _end(tokenizer: PreTrainedTokenizerBase, vocab: int) -> int:
    """The token that ends a document."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError(f"{name_of(tokenizer)} has no end-of-text token, which must end each document; set its eos_token")
    if vocabulary_size(tokenizer) > vocab:
        raise ValueError(
            f"{name_of(tokenizer)} has {vocabulary_size(tokenizer)} tokens and the model only {vocab}; "
            f"set vocab_size to {vocabulary_size(tokenizer)} or more, or name another tokenizer"
        )
    return end


def _stored(path: Path, vocab: int) -> Tokens:
    """A file of tokens, mapped, so that it may be larger than memory."""
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    try:
        tokens: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an array of tokens: {error}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        found = f"{list(tokens.shape)} {tokens.dtype}" if isinstance(tokens, np.ndarray) else "several arrays"
        raise ValueError(f"{path} holds {found}; tokens are one row of integers, [tokens]")
    for place, chunk in enumerate(chunks(tokens)):
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocab:
            strange = int(np.argmax((chunk < 0) | (chunk >= vocab)))
            raise ValueError(f"token {chunk[strange]} at {place * CHUNK + strange} of {path} is not in the vocabulary of {vocab}")
    return tokens


def _mark(tokens: Tokens) -> float:
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=6).digest(), "big") / 2**48
