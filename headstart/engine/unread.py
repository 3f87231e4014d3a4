"""What became certain in rounds of which the drafter was not told yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from headstart.speculation.tree import Kept


@dataclass(frozen=True)
class Unread:
    """What waits to be told, in order.

    parts: by round.
    forgotten: seat -> number of parts that hold nothing of its present text.
    num_bytes: memory of the parts' features, and about as much for a token as an integer takes.
    """

    parts: tuple[Kept, ...] = ()
    forgotten: Mapping[int, int] = field(default_factory=dict)
    num_bytes: int = 0

    def with_part(self, kept: Kept) -> Unread:
        """This and what became certain in a further round."""
        features = kept.features.nbytes if kept.features is not None else 0
        return Unread((*self.parts, kept), self.forgotten, self.num_bytes + 8 * num_tokens(kept) + features)

    def without(self, seat: int) -> Unread:
        """This without the text of a seat."""
        return replace(self, forgotten={**self.forgotten, seat: len(self.parts)}) if self.parts else self

    def joined(self, chunk: int) -> Iterator[Kept]:
        """What to tell, of several rounds at once: about `chunk` tokens, or a round that has more."""
        first, size = 0, 0
        for number, part in enumerate(self.parts):
            if size and size + num_tokens(part) > chunk:
                yield from self._joined(range(first, number))
                first, size = number, 0
            size += num_tokens(part)
        yield from self._joined(range(first, len(self.parts)))

    def _joined(self, numbers: range) -> Iterator[Kept]:
        """What became certain in consecutive rounds, as if they had been one; nothing where all seats are forgotten."""
        parts = [self.parts[number] for number in numbers]
        if len(parts) == 1 and not any(self.forgotten.get(seat, 0) > numbers[0] for seat in parts[0].seats):
            yield parts[0]
            return
        by_seat: dict[int, list[_Piece]] = {}
        line = 0
        for number, part in zip(numbers, parts, strict=True):
            for row, (seat, text) in enumerate(zip(part.seats, part.texts, strict=True)):
                if self.forgotten.get(seat, 0) <= number:
                    by_seat.setdefault(seat, []).append(_Piece(text, part.starts[row], part.tried[row], part.held[row], line))
                line += len(text) - 1
        if by_seat:
            yield _kept_of(by_seat, parts)


class _Piece(NamedTuple):
    """What became certain in one seat in one round.

    text, start, tried, held: as in `Kept`.
    line: of its first token in the features of all rounds.
    """

    text: tuple[int, ...]
    start: int
    tried: int
    held: int
    line: int


def num_tokens(kept: Kept) -> int:
    """Number of kept tokens."""
    return sum(map(len, kept.texts)) - len(kept.texts)


def _kept_of(by_seat: Mapping[int, Sequence[_Piece]], parts: Sequence[Kept]) -> Kept:
    """The pieces of each seat as one text, with their lines of the parts' features."""
    of_seats = list(by_seat.values())
    features = None
    if parts[0].features is not None:
        lines = [piece.line + index for pieces in of_seats for piece in pieces for index in range(len(piece.text) - 1)]
        features = torch.cat([part.features for part in parts if part.features is not None])
        features = features[torch.tensor(lines, dtype=torch.int64).to(features.device, non_blocking=True)]
    return Kept(
        seats=tuple(by_seat),
        texts=tuple((*(t for piece in pieces for t in piece.text[:-1]), pieces[-1].text[-1]) for pieces in of_seats),
        starts=tuple(pieces[0].start for pieces in of_seats),
        tried=tuple(pieces[-1].tried for pieces in of_seats),
        held=tuple(pieces[-1].held for pieces in of_seats),
        features=features,
        device=parts[0].device,
    )
