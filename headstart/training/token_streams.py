"""Reading files as streams of tokens: documents one after another, each ended by the tokenizer's end-of-text token.

The module must not import blocks, batches or models.
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

from headstart.text.chat_template import checked_messages, name_of, render
from headstart.text.jsonl import read_fields
from headstart.text.tokenizer import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = NDArray[np.integer[Any]]  # [tokens]; the smallest integer type for the vocabulary, or the type of the file

ARRAY = ".npy"
BATCH = 1_000_000  # characters that are tokenized together
CHUNK = 1 << 22  # tokens of a memory-mapped file that are read at once


@dataclass(frozen=True, eq=False)
class Stream:
    """The tokens of a file.

    tokens: [tokens].
    ends: [documents] int64, end of each document; one document where the file does not say.
    """

    tokens: Tokens
    ends: NDArray[np.int64]

    def split_end(self, share: float) -> tuple[Tokens, Tokens]:
        """The train tokens and the held-out tokens; held out is the last share of the stream."""
        num_train = len(self.tokens) - round(share * len(self.tokens))
        return self.tokens[:num_train], self.tokens[num_train:]

    def split_documents(self, is_held_out: NDArray[np.bool_]) -> tuple[Tokens, Tokens]:
        """The train tokens and the held-out tokens. is_held_out: [documents]."""
        if not is_held_out.any():
            return self.tokens, self.tokens[:0]
        mask = np.repeat(is_held_out, np.diff(self.ends, prepend=0))
        return self.tokens[~mask], self.tokens[mask]

    def hashes(self) -> NDArray[np.float64]:
        """Hash of each document's tokens as a number in [0, 1), [documents]; equal documents have equal hashes."""
        starts = [0, *self.ends[:-1].tolist()]
        return np.array([_hash(self.tokens[start:end]) for start, end in zip(starts, self.ends.tolist(), strict=True)])


def read_stream(path: Path, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Stream:
    """The tokens of a file.

    path: JSONL, compressed or not, with `text`, `messages` or, distilled, `tokens`; a plain text, which is one document; or a
    `.npy` file with tokens.
    vocab: all tokens are below it.

    Raises ValueError, naming the file, for what cannot be read, and for tokens that are not below `vocab`.
    """
    if path.suffix == ARRAY:
        tokens = _memory_mapped(path, vocab)
        return Stream(tokens, np.array([len(tokens)]))
    end = _end(tokenizer, vocab)
    kind = np.uint16 if vocab <= 2**16 else np.uint32
    pieces = [np.array(ids if ids[-1] == end else [*ids, end], kind) for ids in _encoded(path, tokenizer, vocab) if ids]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return Stream(np.concatenate(pieces) if pieces else np.empty(0, kind), ends)


def chunks(tokens: Tokens) -> Iterator[Tokens]:
    """A stream in pieces of a few megabytes."""
    return (tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK))


@dataclass(frozen=True)
class _Document:
    """A plain text, a chat rendered with its special tokens, or the tokens of a distilled line."""

    kind: Literal["text", "chat", "tokens"]
    content: Any


def _encoded(path: Path, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Iterator[list[int]]:
    """The tokens of each document."""
    for kind, group in groupby(_documents(path, tokenizer, vocab), key=lambda document: document.kind):
        contents = (document.content for document in group)
        yield from contents if kind == "tokens" else _tokenized(contents, tokenizer, is_chat=kind == "chat")


def _tokenized(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, is_chat: bool) -> Iterator[list[int]]:
    for batch in _batches(texts):
        encoded: Any = tokenizer(
            batch, add_special_tokens=not is_chat, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        yield from encoded["input_ids"]


def _documents(path: Path, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Iterator[_Document]:
    """Empty ones are left out."""
    found = (_document(f"line {number} of {path}", fields, tokenizer, vocab) for number, fields in read_fields(path, "text"))
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


def _memory_mapped(path: Path, vocab: int) -> Tokens:
    """A file of tokens, memory-mapped, so that it may be larger than memory."""
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    try:
        tokens: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an array of tokens: {error}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        content = f"{list(tokens.shape)} {tokens.dtype}" if isinstance(tokens, np.ndarray) else "several arrays"
        raise ValueError(f"{path} holds {content}; tokens are one row of integers, [tokens]")
    for number, chunk in enumerate(chunks(tokens)):
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocab:
            index = int(np.argmax((chunk < 0) | (chunk >= vocab)))
            raise ValueError(f"token {chunk[index]} at {number * CHUNK + index} of {path} is not in the vocabulary of {vocab}")
    return tokens


def _hash(tokens: Tokens) -> float:
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=6).digest(), "big") / 2**48
