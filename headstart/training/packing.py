"""Documents chained into streams, cut into blocks of equal length: what a model is pretrained on.

    stream   a b c d e f g h        each pair of neighbours is read once: the last token of a block is
    blocks   a b c d                the first of the next one
                   d e f g
                         g h

All tokens count, and nothing is padded but the last block of a stream. This file knows tokens and blocks. It refuses to know
texts, tokenizers and what is learned.
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
    """A piece of a stream. tokens: [length]."""

    tokens: Tokens

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: all but the first."""
        return len(self.tokens) - 1


class Blocks(Sequence[Block]):
    """All blocks of some streams, cut when they are asked for. length: tokens of a block."""

    def __init__(self, streams: Sequence[Tokens], length: int) -> None:
        self.streams, self.length = tuple(streams), length
        self._firsts = np.cumsum([0, *(_num_blocks(stream, length) for stream in streams)])  # the first block of each stream

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]  # nobody takes a slice
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        stream = int(np.searchsorted(self._firsts, index, side="right")) - 1
        start = (index - int(self._firsts[stream])) * (self.length - 1)
        return Block(self.streams[stream][start : start + self.length])

    def of(self, stream: int) -> range:
        """The indices of a stream's blocks."""
        return range(int(self._firsts[stream]), int(self._firsts[stream + 1]))


@dataclass(frozen=True, eq=False)
class Packed:
    """All blocks of a run, in the place of a `Dataset`. train: indices of those to train on, one for each time that an epoch reads
    it. held_out: of those held out."""

    texts: Blocks
    train: tuple[int, ...]
    held_out: tuple[int, ...]

    def pad(self, indices: Sequence[int]) -> TextBatch:
        """Blocks side by side, as long as the longest of them."""
        chosen = [self.texts[index].tokens for index in indices]
        longest = max(map(len, chosen))
        tokens = torch.full((len(chosen), longest), PAD, dtype=torch.int64)
        counts = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for row, block in enumerate(chosen):
            tokens[row, : len(block)] = torch.from_numpy(block.astype(np.int64))
            counts[row, : len(block)] = True
        return TextBatch(tokens, counts, tuple(indices))

    def masked_batch(self) -> TextBatch:
        """A block of which nothing counts: a process without a batch still takes part in the step."""
        padded = self.pad([self._shortest])
        return TextBatch(padded.tokens, torch.zeros_like(padded.loss_mask), padded.indices)

    def digest(self) -> str:
        """Of every token, how they are cut, how often they are read, and what is held out."""
        sha = hashlib.sha256(f"{self.texts.length} {[len(stream) for stream in self.texts.streams]}".encode())
        for indices in (self.train, self.held_out):
            sha.update(np.array(indices, "<i8").tobytes() + b"|")
        for chunk in (chunk for stream in self.texts.streams for chunk in chunks(stream)):
            sha.update(np.ascontiguousarray(chunk, "<u4").data)
        return sha.hexdigest()[:16]

    @cached_property
    def _shortest(self) -> int:
        lasts = [blocks[-1] for place in range(len(self.texts.streams)) if (blocks := self.texts.of(place))]
        return min(lasts, key=lambda index: len(self.texts[index].tokens))  # only the last block of a stream may be short


def read_packed(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, *, length: int, vocab: int, held_out: float | Path = 0.0,
    times: Mapping[str, float] | None = None,
) -> tuple[Packed, str]:  # fmt: skip
    """The blocks of some files, and a sentence that says what was read.

    paths: JSONL with `text` or `messages`, plain text, or `.npy` with tokens. length: of a block, in tokens, two or more. vocab:
    tokens are below it. held_out: a share, taken of whole documents, or where a file has but one, its end; or a file. times: how
    often an epoch reads a file, by its path or name; a fraction reads blocks spread over it. Raises ValueError for what cannot be
    read, and where nothing is left to learn from.
    """
    often = _often(paths, times or {})
    read = [read_stream(path, tokenizer, vocab) for path in paths]
    if isinstance(held_out, Path):
        teaching, testing = [stream.tokens for stream in read], [read_stream(held_out, tokenizer, vocab).tokens]
    else:
        teaching, testing = _parted(read, held_out)
    blocks = Blocks(teaching + testing, length)
    train_texts = [index for place, count in enumerate(often) for index in _repeated(blocks.of(place), count)]
    held_out_texts = range(blocks.of(len(teaching)).start, len(blocks))
    if not train_texts:
        raise ValueError(_why_nothing(paths, read, held_out))
    return Packed(blocks, tuple(train_texts), tuple(held_out_texts)), _told(read, len(train_texts), len(held_out_texts), length)


def _parted(streams: Sequence[Stream], share: float) -> tuple[list[Tokens], list[Tokens]]:
    """What teaches, and what is held out, of each stream. A document's lot depends on its own tokens, not on what else is read;
    only where every one would be train, one is held out all the same."""
    marks = [stream.marks() if share and len(stream.ends) > 1 else np.empty(0) for stream in streams]
    border = max(share, min((mark.min() for mark in marks if mark.size), default=share))
    parts = [
        stream.parted_by(mark <= border) if mark.size else stream.parted(share) for stream, mark in zip(streams, marks, strict=True)
    ]
    return [train for train, _ in parts], [held_out for _, held_out in parts]


def _repeated(blocks: range, times: float) -> Iterator[int]:
    """Each block so often; of a fraction, blocks spread evenly."""
    for _ in range(int(times)):
        yield from blocks
    few = round((times - int(times)) * len(blocks))
    yield from (blocks[place * len(blocks) // few] for place in range(few))


def _often(paths: Sequence[Path], times: Mapping[str, float]) -> list[float]:
    """How often each file is read."""
    unknown = [name for name in times if not any(name in (str(path), path.name) for path in paths)]
    if unknown:
        known = ", ".join(str(path) for path in paths)
        raise ValueError(f"times names {', '.join(unknown)}, which is no file of the data; there are {known}")
    return [times.get(str(path), times.get(path.name, 1)) for path in paths]


def _why_nothing(paths: Sequence[Path], read: Sequence[Stream], held_out: float | Path) -> str:
    found = sum(len(stream.tokens) for stream in read)
    names = ", ".join(str(path) for path in paths)
    if found < 2:
        return f"the number of tokens in {names} is {found}, and it takes two to learn what follows; give more data"
    return f"of the {found} tokens in {names} none are left to train on; hold out less (held_out is {held_out}), or raise times"


def _told(read: Sequence[Stream], num_taught: int, num_tested: int, length: int) -> str:
    tokens, documents = sum(len(stream.tokens) for stream in read), sum(len(stream.ends) for stream in read)
    return (
        f"{len(read):,} files with {documents:,} documents of {tokens:,} tokens; an epoch reads {num_taught:,} blocks of {length} "
        f"tokens, {num_tested:,} are held out"
    )


def _num_blocks(stream: Tokens, length: int) -> int:
    """So many that each pair of neighbours is in one of them."""
    return -(-max(0, len(stream) - 1) // (length - 1))
