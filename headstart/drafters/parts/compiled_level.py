"""A level of a drafter in one call of the compiled kernels, where all its modules are compiled ones. Must not import a method."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from headstart.drafters.parts.decoder import Memory
from headstart.drafters.parts.grow import Level
from headstart.drafters.parts.host_tree import HostLevel
from headstart.target.steps import EMBEDDINGS, STATES, Numbers, Steps, UnsupportedError

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
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}  # by rows, width and place: states and logits

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that one level reads."""
        return self._steps.nbytes

    def run(self, level: Level, states: Tensor, rows: tuple[int, ...], seats: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """The states [rows, width, hidden] and the logits [rows * width, vocab] of a level, until the next run.

        states: [rows before, width before, hidden] of the level before; rows: its rows. seats: of the level's rows.
        None where the level needs the modules: its nodes are not in lists, or hidden by a window.
        """
        weight, memory = self._embedding.weight, self._memory
        if not isinstance(level, HostLevel) or weight.dtype is not states.dtype or not states.is_contiguous():
            return None
        lengths = [memory.length(seat) for seat in seats]
        longest, depth, width = max(lengths), len(level.paths[0][0]), level.width
        angles = memory.angles(longest + self._offset + depth)
        if angles is None or memory.hides(longest + len(level.run_depths)):
            return None
        tokens = array("q", [token for of_row in level.nodes for token in of_row])
        parents = array("q", _parents(level, rows, states.shape[1]))
        positions = array("q", [length + self._offset + depth - 1 for length in lengths for _ in range(width)])
        tables = _tables(level, [memory.first_slot(seat) for seat in seats], lengths)
        made = self._steps.run(len(tokens), (states, weight, *angles), (parents, tokens, positions, positions), tables)
        key = len(lengths), width, made[0].data_ptr()
        if key not in self._views:
            self._views = {key: (made[self._states][: len(tokens)].unflatten(0, key[:2]), made[self._logits][: len(tokens)])}
        new_states, logits = self._views[key]
        return new_states, self._finish(logits)


def _parents(level: HostLevel, rows: tuple[int, ...], width: int) -> list[int]:
    """The index of each node's parent among all nodes of the level before, which had `width` of them for each of `rows`."""
    pairs = zip(level.rows, level.node_parents, strict=True)
    return [parent + rows.index(row) * width for row, of_row in pairs for parent in of_row]


def _tables(level: HostLevel, firsts: Sequence[int], lengths: Sequence[int]) -> tuple[Numbers, ...]:
    """`rows`, `prefixes`, `starts` and `paths` of `RowTables` for a level. firsts: slots; lengths: entries of the rows."""
    width, depth, earlier = level.width, len(level.paths[0][0]), level.earlier
    rows, prefixes, paths = array("q"), array("q"), array("i")
    for row, (first, length, of_row) in enumerate(zip(firsts, lengths, level.paths, strict=True)):
        rows.extend((row * width, (row + 1) * width, first, length + earlier))
        prefixes.extend([length] * width)
        paths.extend([length + column for path in of_row for column in path])
    return rows, prefixes, array("q", range(0, len(prefixes) * depth + 1, depth)), paths
