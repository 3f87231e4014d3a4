"""A level of a drafter in one call of the compiled kernels, where all its modules are compiled ones. Must not import a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn

from headstart.drafters.parts.decoder import Memory
from headstart.drafters.parts.grow import Level
from headstart.drafters.parts.host_tree import HostLevel
from headstart.target.kernels.steps import EMBEDDINGS, STATES, Steps, UnsupportedError

# (steps, states of the parents, embeddings of the nodes) -> states of the nodes, their logits: numbers of values of the steps
Record = Callable[[Steps, int, int], tuple[int, int]]


class CompiledLevel:
    """Runs levels: reads the states of the parents, and makes the states and logits of the nodes.

    Raises UnsupportedError where some module is not a compiled one.

    memory: of the drafter's only decoder.
    embedding: from tokens to [hidden].
    record: adds the drafter's steps.
    width: of a state.
    finish: from the last product to logits.
    offset: position of a seat's first entry in the memory.
    """

    def __init__(
        self, memory: Memory, embedding: nn.Module, record: Record, width: int, finish: Callable[[Tensor], Tensor], offset: int
    ) -> None:
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None or embedding._forward_hooks:
            raise UnsupportedError
        self._memory, self._embedding, self._finish, self._offset = memory, embedding, finish, offset
        self._steps = Steps(memory.dtype)
        states, embedded = self._steps.take(STATES, width), self._steps.take(EMBEDDINGS, embedding.weight.shape[1])
        self._states, self._logits = record(self._steps, states, embedded)

    def run(self, level: Level, states: Tensor, rows: tuple[int, ...], seats: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """The states [rows, width, hidden] and the logits [rows * width, vocab] of a level, until the next run.

        states: [rows before, width before, hidden] of the level before; rows: its rows. seats: of the level's rows.
        None where the level needs the modules: its nodes are not in lists, or hidden by a window.
        """
        weight, memory = self._embedding.weight, self._memory
        if not isinstance(level, HostLevel) or weight.dtype is not states.dtype or not states.is_contiguous():
            return None
        lengths = [memory.length(seat) for seat in seats]
        depth = len(level.paths[0][0])
        angles = memory.angles(max(lengths) + self._offset + depth)
        if angles is None or memory.hides(max(lengths) + len(level.run_depths)):
            return None
        count, width = level.nodes.shape[1:]
        nodes = count * width
        tokens, parents = level.nodes.reshape(2, nodes)
        if len(rows) > 1:
            parents = parents + np.repeat([rows.index(row) * states.shape[1] for row in level.rows], width)
        positions = np.repeat(np.array(lengths, np.int64) + (self._offset + depth - 1), width)
        tables = _tables(level, [memory.first_slot(seat) for seat in seats], lengths)
        values = self._steps.run(nodes, (states, weight, *angles), (parents, tokens, positions, positions), tables)
        return values(self._states).unflatten(0, (count, width)), self._finish(values(self._logits))


def _tables(level: HostLevel, firsts: Sequence[int], lengths: Sequence[int]) -> tuple[np.ndarray, ...]:
    """`rows`, `prefixes`, `starts` and `paths` of `RowTables` for a level. firsts: slots; lengths: entries of the rows."""
    count, width = level.nodes.shape[1:]
    depth, earlier = len(level.paths[0][0]), level.earlier
    places = zip(range(count), firsts, lengths, strict=True)
    rows = np.array([(row * width, (row + 1) * width, first, length + earlier) for row, first, length in places], np.int64)
    prefixes = np.repeat(np.array(lengths, np.int64), width)
    starts = np.arange(0, (count * width + 1) * depth, depth, dtype=np.int64)
    paths = (np.array(level.paths) + np.array(lengths)[:, None, None]).astype(np.int32)
    return rows, prefixes, starts, paths
