"""Packing: documents joined into streams and cut into blocks of equal length, for pretraining.

    stream   a b c d e f g h        each pair of adjacent tokens is in one block: the last token of a block is
    blocks   a b c d                the first token of the next block
                   d e f g
                         g h

All tokens have a loss, and only the last block of a stream is padded. The module must not import models, heads or losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from headstart.training.dataset import PAD, TextBatch
from headstart.training.token_streams import Stream, Tokens, chunks, read_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Block:
    """A piece of a stream. tokens: [length], integers."""

    tokens: Tokens

    @property
    def num_targets(self) -> int:
        """Number of tokens that are predicted: all but the first."""
        return len(self.tokens) - 1


class Blocks(Sequence[Block]):
    """All blocks of some streams, cut when they are read.

    streams: tokens of each, [tokens].
    length: tokens of a block.
    """

    def __init__(self, streams: Sequence[Tokens], length: int) -> None:
        self.streams, self.length = tuple(streams), length
        self._first_blocks = np.cumsum([0, *(_num_blocks(stream, length) for stream in streams)])

    def __len__(self) -> int:
        return int(self._first_blocks[-1])

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]  # slices are not supported
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        stream = int(np.searchsorted(self._first_blocks, index, side="right")) - 1
        start = (index - int(self._first_blocks[stream])) * (self.length - 1)
        return Block(self.streams[stream][start : start + self.length])

    def of(self, stream: int) -> range:
        """The indices of a stream's blocks."""
        return range(int(self._first_blocks[stream]), int(self._first_blocks[stream + 1]))


@dataclass(frozen=True, eq=False)
class Packed:
    """All blocks of a run; has the methods of `Dataset`.

    texts: train and held-out blocks.
    train: indices of the blocks to train on; an index occurs as often as an epoch reads its block.
    held_out: indices of the blocks to evaluate on.
    """

    texts: Blocks
    train: tuple[int, ...]
    held_out: tuple[int, ...]

    def pad(self, indices: Sequence[int]) -> TextBatch:
        """A batch of these blocks, padded to the longest of them."""
        chosen = [self.texts[index].tokens for index in indices]
        longest = max(map(len, chosen))
        tokens = torch.full((len(chosen), longest), PAD, dtype=torch.int64)
        loss_mask = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for row, block in enumerate(chosen):
            tokens[row, : len(block)] = torch.from_numpy(block.astype(np.int64))
            loss_mask[row, : len(block)] = True
        return TextBatch(tokens, loss_mask, tuple(indices))

    def masked_batch(self) -> TextBatch:
        """A block with an empty loss mask, for a process without a batch: it still takes part in the step."""
        padded = self.pad([self._shortest])
        return TextBatch(padded.tokens, torch.zeros_like(padded.loss_mask), padded.indices)

    def digest(self) -> str:
        """Hash of all tokens, the length of a block, how often blocks are read, and what is held out."""
        sha = hashlib.sha256(f"{self.texts.length} {[len(stream) for stream in self.texts.streams]}".encode())
        for indices in (self.train, self.held_out):
            sha.update(np.array(indices, "<i8").tobytes() + b"|")
        for chunk in (chunk for stream in self.texts.streams for chunk in chunks(stream)):
            sha.update(np.ascontiguousarray(chunk, "<u4").data)
        return sha.hexdigest()[:16]

    @cached_property
    def _shortest(self) -> int:
        last_blocks = [blocks[-1] for stream in range(len(self.texts.streams)) if (blocks := self.texts.of(stream))]
        return min(last_blocks, key=lambda index: len(self.texts[index].tokens))  # only the last block of a stream may be short


def read_packed(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, *, length: int, vocab: int, held_out: float | Path = 0.0,
    times: Mapping[str, float] | None = None,
) -> tuple[Packed, str]:  # fmt: skip
    """The blocks of some files, and a sentence that says what was read.

    paths: JSONL with `text` or `messages`, plain text, or `.npy` with tokens.
    length: tokens of a block, at least 2.
    vocab: all tokens are below it.
    held_out: a share of the documents, or of the tokens at the end of a file with one document; or a file.
    times: how often an epoch reads a file, by its path or name; a fraction reads evenly spread blocks. Default: once.

    Raises ValueError for what cannot be read, and if no block is left to train on.
    """
    repeats = _repeats(paths, times or {})
    streams = [read_stream(path, tokenizer, vocab) for path in paths]
    if isinstance(held_out, Path):
        train_streams, held_out_streams = [stream.tokens for stream in streams], [read_stream(held_out, tokenizer, vocab).tokens]
    else:
        train_streams, held_out_streams = _split(streams, held_out)
    blocks = Blocks(train_streams + held_out_streams, length)
    train = [index for stream, count in enumerate(repeats) for index in _repeated(blocks.of(stream), count)]
    held_out_blocks = range(blocks.of(len(train_streams)).start, len(blocks))
    if not train:
        raise ValueError(_why_nothing(paths, streams, held_out))
    return Packed(blocks, tuple(train), tuple(held_out_blocks)), _report(streams, len(train), len(held_out_blocks), length)


def _split(streams: Sequence[Stream], share: float) -> tuple[list[Tokens], list[Tokens]]:
    """The train part and the held-out part of each stream.

    Whether a document is held out depends on its own tokens, not on the other documents; only if none would be held out, the one
    with the smallest hash is.
    """
    hashes = [stream.hashes() if share and len(stream.ends) > 1 else np.empty(0) for stream in streams]
    threshold = max(share, min((of_stream.min() for of_stream in hashes if of_stream.size), default=share))
    parts = [
        stream.split_documents(of_stream <= threshold) if of_stream.size else stream.split_end(share)
        for stream, of_stream in zip(streams, hashes, strict=True)
    ]
    return [train for train, _ in parts], [held_out for _, held_out in parts]


def _repeated(blocks: range, times: float) -> Iterator[int]:
    """Each block `times` times; the fraction of `times` adds evenly spread blocks."""
    for _ in range(int(times)):
        yield from blocks
    rest = round((times - int(times)) * len(blocks))
    yield from (blocks[number * len(blocks) // rest] for number in range(rest))


def _repeats(paths: Sequence[Path], times: Mapping[str, float]) -> list[float]:
    """How often an epoch reads each file."""
    unknown = [name for name in times if not any(name in (str(path), path.name) for path in paths)]
    if unknown:
        known = ", ".join(str(path) for path in paths)
        raise ValueError(f"times names {', '.join(unknown)}, which is no file of the data; there are {known}")
    return [times.get(str(path), times.get(path.name, 1)) for path in paths]


def _why_nothing(paths: Sequence[Path], streams: Sequence[Stream], held_out: float | Path) -> str:
    num_tokens = sum(len(stream.tokens) for stream in streams)
    names = ", ".join(str(path) for path in paths)
    if num_tokens < 2:
        return f"the number of tokens in {names} is {num_tokens}, and a prediction needs two; give more data"
    return (
        f"of the {num_tokens} tokens in {names} none are left to train on; hold out less (held_out is {held_out}), or raise times"
    )


def _report(streams: Sequence[Stream], num_train: int, num_held_out: int, length: int) -> str:
    tokens, documents = sum(len(stream.tokens) for stream in streams), sum(len(stream.ends) for stream in streams)
    return (
        f"{len(streams):,} files with {documents:,} documents of {tokens:,} tokens; an epoch reads {num_train:,} blocks "
        f"of {length} tokens, {num_held_out:,} are held out"
    )


def _num_blocks(stream: Tokens, length: int) -> int:
    """Number of blocks of a stream, such that each pair of adjacent tokens is in one of them."""
    return -(-max(0, len(stream) - 1) // (length - 1))
