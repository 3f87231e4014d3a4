"""The texts of a run, split into those that teach and those that test, padded into batches.

Texts are padded on the right and attention is causal, so no token that counts sees padding and no mask is needed. This file
knows tokens and who said them. It refuses to know files, chat templates and what is learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headstart.drafters.parts.losses import Batch

if TYPE_CHECKING:
    from headstart.text.conversations import Example

PAD = 0  # any token would do


@dataclass(frozen=True)
class Text:
    """A text. mask: which of its tokens an assistant said."""

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]

    @cached_property
    def num_targets(self) -> int:
        """Positions at which a first guess counts: what the loss of a step is divided by."""
        return int(counted(torch.tensor([self.mask])).sum())

    @property
    def prompt(self) -> tuple[int, ...]:
        """What was said before the first answer; one token at least."""
        return self.tokens[: max(1, self.mask.index(True))]


@dataclass(frozen=True, eq=False)
class TextBatch:
    """A batch of texts. tokens: [rows, length] int64. counts: [rows, length] bool. indices: which texts; () for a batch that
    teaches nothing and only keeps processes in step."""

    tokens: Tensor
    loss_mask: Tensor
    indices: tuple[int, ...]

    def to(self, device: torch.device) -> TextBatch:
        return TextBatch(self.tokens.to(device, non_blocking=True), self.loss_mask.to(device, non_blocking=True), self.indices)


@dataclass(frozen=True)
class Dataset:
    """All texts of a run. train, held_out: indices of those to train on and of those held out. num_useless: texts that were left
    out because no guess counts in them."""

    texts: tuple[Text, ...]
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    num_useless: int = 0

    def pad(self, indices: Sequence[int]) -> TextBatch:
        """Texts side by side, as long as the longest of them."""
        chosen = [self.texts[index] for index in indices]
        longest = max(len(text.tokens) for text in chosen)
        tokens = torch.full((len(chosen), longest), PAD, dtype=torch.int64)
        counts = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for row, text in enumerate(chosen):
            tokens[row, : len(text.tokens)] = torch.tensor(text.tokens)
            counts[row, : len(text.tokens)] = torch.tensor(text.mask)
        return TextBatch(tokens, counts, tuple(indices))

    def masked_batch(self) -> TextBatch:
        """The shortest text, of which nothing counts: a process without a batch still takes part in the step."""
        shortest = min(range(len(self.texts)), key=lambda index: len(self.texts[index].tokens))
        padded = self.pad([shortest])
        return TextBatch(padded.tokens, torch.zeros_like(padded.loss_mask), padded.indices)

    def token_counts(self, vocab: int) -> Tensor:
        """[vocab] int64: how often an assistant says each token in the train texts."""
        train_texts = (self.texts[index] for index in self.train)
        tokens = [token for text in train_texts for token, is_said in zip(text.tokens, text.mask, strict=True) if is_said]
        return torch.bincount(torch.tensor(tokens, dtype=torch.int64), minlength=vocab)

    def digest(self) -> str:
        """Of every token, who said it, and what is held out: two runs with the same digest read the same."""
        sha = hashlib.sha256(repr((self.train, self.held_out)).encode())
        for text in self.texts:
            sha.update(repr((text.tokens, text.mask)).encode())
        return sha.hexdigest()[:16]


def counted(counts: Tensor, depth: int = 1) -> Tensor:
    """[rows, length] bool -> where a guess of this depth counts."""
    none = torch.empty(0)
    return Batch(counts, counts, none, none).counted(depth)


def split(examples: Sequence[Example], held_out: float | Sequence[Example]) -> Dataset:
    """Held out are a share of the texts (by digest, so that equal texts stay together), or other texts.

    Raises ValueError where nothing is left to learn from.
    """
    train_texts = _useful(examples)
    if not train_texts:
        raise ValueError(
            f"none of the {len(examples)} texts has two tokens of an answer in a row; raise length, or give other data"
        )
    if not isinstance(held_out, float | int):
        held_out_texts = _useful(held_out)
        first = len(train_texts)
        useless = len(examples) + len(held_out) - first - len(held_out_texts)
        return Dataset(
            (*train_texts, *held_out_texts), tuple(range(first)), tuple(range(first, first + len(held_out_texts))), useless
        )
    tested_indices = _share(train_texts, held_out)
    rest = tuple(index for index in range(len(train_texts)) if index not in tested_indices)
    if not rest:
        raise ValueError(f"held_out is {held_out} and there are {len(train_texts)} texts: none is left to train on; hold out less")
    return Dataset(tuple(train_texts), rest, tuple(sorted(tested_indices)), len(examples) - len(train_texts))


def _useful(examples: Sequence[Example]) -> list[Text]:
    texts = [Text(tuple(map(int, one.tokens)), tuple(map(bool, one.mask))) for one in examples]
    return [text for text in texts if text.num_targets]


def _share(texts: Sequence[Text], share: float) -> set[int]:
    if not share:
        return set()
    digests = [hashlib.sha256(repr(text.tokens).encode()).digest() for text in texts]
    border = sorted(digests)[: max(1, round(share * len(texts)))][-1]
    return {index for index, digest in enumerate(digests) if digest <= border}
