"""Running a drafter that reads its own output over the levels of a tree: it keeps the states of the level that was run last.

Must not import a method.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.drafters.parts.compiled_level import CompiledLevel
from headstart.drafters.parts.decoder import Memory
from headstart.drafters.parts.grow import Level, states_of_parents
from headstart.speculation.rows import Rows


class Expansion:
    """One round of a drafter that reads, for every node, the states it made of the node's parent.

    Subclasses define `run` and `logits`; `grow` is called with `logits()` and `expand`.

    depth: of the nodes that were run last; 0 for the roots.
    states: of these nodes, tensors of [rows, nodes per row, width]; one tensor per module that deeper levels read.
    """

    def __init__(self, rows: Rows, states: Sequence[Tensor], compiled: CompiledLevel | None = None) -> None:
        """states: of the roots of the rows that draft, [drafting rows, 1, width] each.

        compiled: runs levels in place of `run` and `logits`, for drafters with one tensor of states.
        """
        self._compiled = compiled
        self._rows = rows.drafting
        self._seats = rows.seats
        self.depth = 0
        self.states = tuple(states)

    def logits(self) -> Tensor:
        """[rows * nodes per row, vocab] logits after the nodes that were run last."""
        raise NotImplementedError

    def run(self, level: Level, parents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The states of a level's nodes, [rows, nodes per row, width] each; parents: those of their parents, in the same shape."""
        raise NotImplementedError

    def expand(self, level: Level) -> Tensor:
        """Run one level. Returns [rows * nodes per row, vocab] logits after its nodes."""
        if self._compiled and (made := self._compiled.run(level, self.states[0], self._rows, self._seats_of(level))):
            self.depth, self.states, self._rows = self.depth + 1, made[:1], level.rows
            return made[1]
        parents = [states_of_parents(states, self._rows, level) for states in self.states]
        self.depth += 1
        self.states = tuple(self.run(level, parents))
        self._rows = level.rows
        return self.logits()

    def positions(self, level: Level, memory: Memory, offset: int = 0) -> Tensor:
        """[rows * nodes per row] positions of a level's nodes: those behind the entries of `memory`.

        offset: position of a seat's first entry.
        """
        firsts = [memory.length(seat) + offset + self.depth - 1 for seat in self._seats_of(level)]
        if len(firsts) == 1:
            return torch.full((level.width,), firsts[0], device=level.tokens.device)
        return torch.tensor(firsts).to(level.tokens.device, non_blocking=True).repeat_interleave(level.width)

    def read(self, level: Level, memory: Memory, inputs: Tensor, positions: Tensor) -> Tensor:
        """Run a decoder over a level's nodes: [rows, nodes per row, input width] -> [rows, nodes per row, hidden]."""
        flat = memory.level(inputs.flatten(0, 1), positions, self._seats_of(level), level)
        states: Tensor = flat.unflatten(0, level.tokens.shape)
        return states

    def _seats_of(self, level: Level) -> list[int]:
        return [self._seats[row] for row in level.rows]
