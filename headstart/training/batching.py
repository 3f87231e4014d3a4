"""The order of batches: texts of similar length together, in an order that depends on seed and position alone.

A run is resumed by its position, and P processes with A batches each read what one process with P * A batches reads. The module
must not import datasets, models or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from headstart.speculation.noise import mix

WINDOW = 32  # batches that are sorted by length together; a larger window has less padding and less shuffling


class BatchOrder:
    """An endless sequence of batches, epoch after epoch. A batch is a tuple of indices into `lengths`.

    lengths: of the texts, in tokens.
    rows: texts of a batch; the last batch of an epoch may have fewer.

    `len` is the number of batches of an epoch. Raises ValueError if there is no text.
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
        epoch, index = divmod(position, len(self))
        return self._epoch(epoch)[index]

    def num_tokens(self, position: int) -> int:
        """Number of tokens of the batch at a position, without padding."""
        return sum(self.lengths[index] for index in self[position])

    def _shuffled(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        generator = torch.Generator().manual_seed(mix(self.seed, epoch) % 2**63)
        texts = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = WINDOW * self.rows
        batches: list[tuple[int, ...]] = []
        for start in range(0, len(texts), window):
            similar = sorted(texts[start : start + window], key=lambda index: self.lengths[index])
            batches += [tuple(similar[first : first + self.rows]) for first in range(0, len(similar), self.rows)]
        return tuple(batches[index] for index in torch.randperm(len(batches), generator=generator).tolist())


def num_batches(order: BatchOrder, *, tokens: int | None, epochs: int | None, steps: int | None, per_step: int) -> int:
    """Number of batches that a budget pays for; exactly one of `tokens`, `epochs` and `steps` is given.

    tokens: without padding; the batch that reaches this number is included.
    per_step: batches of a step, of all processes.
    """
    if steps is not None:
        return steps * per_step
    if epochs is not None:
        return epochs * len(order)
    assert tokens is not None, "the configuration checked that there is a budget"
    position = 0
    while tokens > 0:
        tokens -= order.num_tokens(position)
        position += 1
    return position


def evenly(lengths: Sequence[int], rows: int) -> list[tuple[int, ...]]:
    """Batches with every text once, sorted by length, for evaluation; indices into `lengths`."""
    texts = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [tuple(texts[first : first + rows]) for first in range(0, len(texts), rows)]
