"""Packed batches from several streams of tokens, without randomness: a position per source is all the state.

Each row of a batch comes from the source that is furthest behind its share, and each source is read from
front to back, over and over. So every token of a source is seen before any is seen twice.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LONG_EVERY = 4  # one batch in four has rows of twice the length, so that late positions are trained too


class Mixture:
    """Deals batches; `state()` and `restore()` carry it over an interruption."""

    def __init__(self, streams: dict[str, np.ndarray], shares: dict[str, float]) -> None:
        """streams: name to [tokens] uint16."""
        empty = [name for name, stream in streams.items() if len(stream) < 2]
        if empty:
            raise ValueError(f"sources without tokens: {', '.join(empty)}; give them more documents or remove them")
        self.streams, self.shares = streams, shares
        self.taken = dict.fromkeys(streams, 0)

    def state(self) -> dict[str, int]:
        return dict(self.taken)

    def restore(self, taken: dict[str, int]) -> None:
        if taken.keys() != self.streams.keys():
            raise ValueError(f"the checkpoint was made with sources {sorted(taken)}, not {sorted(self.streams)}")
        self.taken = dict(taken)

    def batch(self, rows: int, length: int) -> Tensor:
        """Returns [rows, length + 1] int64: inputs and, shifted by one, their targets."""
        return torch.from_numpy(np.stack([self._row(length) for _ in range(rows)]).astype(np.int64))

    def batch_of_step(self, step: int, rows: int, length: int) -> Tensor:
        """Returns [rows, length + 1] int64, or [rows / 2, 2 * length + 1] on every LONG_EVERY-th step."""
        is_long = step % LONG_EVERY == LONG_EVERY - 1
        return self.batch(max(1, rows // 2), 2 * length) if is_long else self.batch(rows, length)

    def _row(self, length: int) -> np.ndarray:
        name = min(self.streams, key=lambda n: self.taken[n] / self.shares[n])
        stream, start = self.streams[name], self.taken[name]
        self.taken[name] += length
        # one more than `length`: the last token of a row is a target here and the first input of the next row
        return stream.take(np.arange(start, start + length + 1), mode="wrap")


def load_streams(work: Path, part: str) -> dict[str, np.ndarray]:
    """Open the arrays that prepare wrote; `part` is "train" or "held_out". Returns name to [tokens] uint16."""
    files = sorted((work / "tokens").glob(f"*.{part}.npy"))
    if not files:
        raise ValueError(f"{work / 'tokens'} holds no *.{part}.npy; run recipes.embedded.prepare first")
    return {file.name.removesuffix(f".{part}.npy"): np.load(file, mmap_mode="r") for file in files}
