"""Which texts a step reads: batches of similar length in an order that is a function of seed and position alone.

A run is resumed by its position, and P processes with A batches each read what one process with P * A batches reads. This file
knows lengths and numbers. It refuses to know tokens, models and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from headstart.speculation.noise import mix

WINDOW = 32  # batches that are sorted by length together: the larger, the less padding and the less chance


class BatchOrder:
    """An endless row of batches, epoch after epoch. lengths: of the texts. rows: texts of a batch; the last may have fewer.

    A batch is a tuple of indices into `lengths`. `len` is the number of batches of an epoch.
    """

    def __init__(self, lengths: Sequence[int], rows: int, seed: int) -> None:
        if not lengths:
            raise ValueError("there is no text to train on; give more data, or hold out less of it")
        self.lengths, self.rows, self.seed = tuple(lengths), rows, seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.rows)

    def __getitem__(self, position: int) -> tuple[int, ...]:
        """The batch at a position, counted over all epochs."""
        epoch, place = divmod(position, len(self))
        return self._epoch(epoch)[place]

    def num_tokens(self, position: int) -> int:
        """Of the batch at a position, without padding."""
        return sum(self.lengths[index] for index in self[position])

    def _shuffled(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        generator = torch.Generator().manual_seed(mix(self.seed, epoch) % 2**63)
        texts = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = WINDOW * self.rows
        batches: list[tuple[int, ...]] = []
        for start in range(0, len(texts), window):
            similar = sorted(texts[start : start + window], key=lambda index: self.lengths[index])
            batches += [tuple(similar[first : first + self.rows]) for first in range(0, len(similar), self.rows)]
        return tuple(batches[place] for place in torch.randperm(len(batches), generator=generator).tolist())


def num_batches(order: BatchOrder, *, tokens: int | None, epochs: int | None, steps: int | None, per_step: int) -> int:
    """How many batches a budget buys; the one that reaches `tokens` is included. per_step: batches of a step, of all processes."""
    if steps is not None:
        return steps * per_step
    if epochs is not None:
        return epochs * len(order)
    assert tokens is not None, "a budget was checked where it was read"
    position = 0
    while tokens > 0:
        tokens -= order.num_tokens(position)
        position += 1
    return position


def evenly(lengths: Sequence[int], rows: int) -> list[tuple[int, ...]]:
    """Every text once, sorted by length, in batches: how held-out texts are read."""
    texts = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [tuple(texts[first : first + rows]) for first in range(0, len(texts), rows)]
