"""The dataset of a run: texts with their loss masks, split into train and held out, padded into batches.

Texts are padded on the right and attention is causal, so no token of the loss mask attends to padding and no attention mask is
needed. The module must not read files or import chat templates.
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

PAD = 0  # any token is correct, since no loss is computed on padding


@dataclass(frozen=True)
class Text:
    """A text.

    tokens: [length].
    mask: the loss mask, [length]; True for tokens of an assistant.
    """

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]

    @cached_property
    def num_targets(self) -> int:
        """Number of positions at which a draft of depth 1 has a loss: the loss of a step is divided by their sum."""
        return int(mask_at_depth(torch.tensor([self.mask])).sum())

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first answer; at least one."""
        return self.tokens[: max(1, self.mask.index(True))]


@dataclass(frozen=True, eq=False)
class TextBatch:
    """A batch of texts.

    tokens: [rows, length] int64.
    loss_mask: [rows, length] bool.
    indices: of the texts in the dataset, one for each row.
    """

    tokens: Tensor
    loss_mask: Tensor
    indices: tuple[int, ...]

    def to(self, device: torch.device) -> TextBatch:
        """The batch on a device."""
        return TextBatch(self.tokens.to(device, non_blocking=True), self.loss_mask.to(device, non_blocking=True), self.indices)


@dataclass(frozen=True)
class Dataset:
    """All texts of a run.

    texts: train and held-out ones.
    train: indices of the texts to train on.
    held_out: indices of the texts to evaluate on.
    num_useless: texts that were left out because no position in them has a loss.
    """

    texts: tuple[Text, ...]
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    num_useless: int = 0

    def pad(self, indices: Sequence[int]) -> TextBatch:
        """A batch of these texts, padded to the longest of them."""
        chosen = [self.texts[index] for index in indices]
        longest = max(len(text.tokens) for text in chosen)
        tokens = torch.full((len(chosen), longest), PAD, dtype=torch.int64)
        loss_mask = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for row, text in enumerate(chosen):
            tokens[row, : len(text.tokens)] = torch.tensor(text.tokens)
            loss_mask[row, : len(text.tokens)] = torch.tensor(text.mask)
        return TextBatch(tokens, loss_mask, tuple(indices))

    def masked_batch(self) -> TextBatch:
        """The shortest text with an empty loss mask, for a process without a batch: it still takes part in the step."""
        shortest = min(range(len(self.texts)), key=lambda index: len(self.texts[index].tokens))
        padded = self.pad([shortest])
        return TextBatch(padded.tokens, torch.zeros_like(padded.loss_mask), padded.indices)

    def token_counts(self, vocab: int) -> Tensor:
        """How often each token occurs under the loss mask of the train texts, [vocab] int64."""
        train_texts = (self.texts[index] for index in self.train)
        tokens = [token for text in train_texts for token, is_answer in zip(text.tokens, text.mask, strict=True) if is_answer]
        return torch.bincount(torch.tensor(tokens, dtype=torch.int64), minlength=vocab)

    def digest(self) -> str:
        """Hash of all tokens, loss masks and the split: runs with the same digest read the same texts."""
        sha = hashlib.sha256(repr((self.train, self.held_out)).encode())
        for text in self.texts:
            sha.update(repr((text.tokens, text.mask)).encode())
        return sha.hexdigest()[:16]


def mask_at_depth(loss_mask: Tensor, depth: int = 1) -> Tensor:
    """Loss mask of a text, [rows, length] -> positions at which a draft of this depth has a loss, [rows, length] bool."""
    none = torch.empty(0)
    return Batch(loss_mask, loss_mask, none, none).counted(depth)


def split(examples: Sequence[Example | Text], held_out: float | Sequence[Example | Text]) -> Dataset:
    """The dataset of these examples, split into train and held out.

    held_out: a share of the examples, chosen by their hash so that equal texts stay together; or other examples.

    Raises ValueError if no text is left to train on.
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
    held_out_indices = _share(train_texts, held_out)
    rest = tuple(index for index in range(len(train_texts)) if index not in held_out_indices)
    if not rest:
        raise ValueError(f"held_out is {held_out} and there are {len(train_texts)} texts: none is left to train on; hold out less")
    return Dataset(tuple(train_texts), rest, tuple(sorted(held_out_indices)), len(examples) - len(train_texts))


def _useful(examples: Sequence[Example | Text]) -> list[Text]:
    """The examples with at least one position that has a loss."""
    texts = [Text(tuple(map(int, one.tokens)), tuple(map(bool, one.mask))) for one in examples]
    return [text for text in texts if text.num_targets]


def _share(texts: Sequence[Text], share: float) -> set[int]:
    """Indices of the texts with the smallest hashes."""
    if not share:
        return set()
    digests = [hashlib.sha256(repr(text.tokens).encode()).digest() for text in texts]
    threshold = sorted(digests)[: max(1, round(share * len(texts)))][-1]
    return {index for index, digest in enumerate(digests) if digest <= threshold}
