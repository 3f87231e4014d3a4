"""The drafter of an engine: what it is told of each seat, and how it recovers after a round that failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from headstart.drafters import Drafter, Restorable
from headstart.engine.prefixes import Prefix
from headstart.engine.scheduler import Request, Turn
from headstart.engine.unread import Unread
from headstart.speculation.tree import Forest, Kept
from headstart.speculation.verify import Verdict
from headstart.target.target import Scored

_MOST_BYTES = 2**26  # of what waits to be told


class DrafterState:
    """Tells a drafter what becomes certain in each seat, and returns it to the state before a round that failed.

    Without a drafter (None) no method does anything. What was kept waits until the drafter drafts next: in rounds of plain
    decoding it costs nothing.

    device: of the target.
    chunk: about how many tokens are told at once.
    """

    def __init__(self, drafter: Drafter | None, device: torch.device, chunk: int) -> None:
        self._drafter = drafter
        self._restorable: Restorable | None = drafter if isinstance(drafter, Restorable) else None
        self._device = device
        self._chunk = chunk
        self._snapshot: object = None  # of a restorable drafter, before the round
        self._num_failed = 0  # rounds that failed since the last one that counted
        self._stale_seats: set[int] = set()  # the drafter may hold a text there that is not the next occupant's
        self._is_recorder = bool(getattr(drafter, "is_recorder", False))  # it is told at once, the end of a text too
        self._unread = Unread()  # what the drafter was not told yet
        self._unread_before = self._unread  # the same, before the round

    # -- before and after a round --

    def begin(self) -> None:
        """Remember what the drafter knows, before a round."""
        self._unread_before = self._unread
        if self._restorable is not None:
            self._snapshot = self._restorable.snapshot()

    def count(self) -> None:
        """Note that a round counted."""
        self._num_failed = 0

    def mark_stale_seats(self, seats: Iterable[int]) -> None:
        """Note seats without an owner, of which the drafter may hold the texts."""
        for seat in seats:
            self._unread = self._unread.without(seat)
            self._stale_seats.add(seat)

    def mark_stale(self, requests: Iterable[Request]) -> None:
        """Note the seats of these requests as stale, before a failed round is undone."""
        self._stale_seats.update(request.seat for request in requests if request.seat is not None)

    def recover(self, requests: Iterable[Request]) -> None:
        """Bring the drafter back after a failed round, in which these requests had seats.

        A restorable drafter is restored. One without taps is told the texts again before it drafts next. Any other stops drafting
        for these requests, as does one that fails twice in a row.
        """
        if self._drafter is not None:
            if self._restorable is not None:
                self._restorable.restore(self._snapshot)
                self._unread = self._unread_before
            else:
                self._unread = Unread()  # it is told everything again
            for request in requests:
                request.is_lost = self._restorable is None
                request.drafts &= self._num_failed == 0 and (self._restorable is not None or not self._drafter.taps)
        self._num_failed += 1

    # -- seats --

    def seat(self, request: Request) -> None:
        """Start a request that has just got its seat."""
        request.is_lost = False
        self._clean(request)

    def _clean(self, request: Request) -> None:
        """Let the drafter forget what a request's new seat held before."""
        if self._drafter is not None and request.drafts and request.seat is not None and request.seat in self._stale_seats:
            self._drafter.free(request.seat)
            self._stale_seats.discard(request.seat)

    def can_fork(self, source: Request | Prefix) -> bool:
        """Whether the drafter holds all of a text, so that it can be copied for another request."""
        if self._drafter is None:
            return True
        return source.is_drafted if isinstance(source, Prefix) else is_told(source)

    def fork(self, source: int, request: Request, length: int) -> None:
        """Copy what is known of the first `length` tokens in a seat to a request's seat."""
        if self._drafter is not None and is_told(request):
            assert request.seat is not None, "the follower has no seat"
            self.tell()
            self._drafter.fork(source, request.seat, length)

    def move(self, source: int, request: Request, length: int) -> None:
        """Move what is known of a request's text to the request's new seat. source: its seat before."""
        self._clean(request)
        self.fork(source, request, length)
        self.forget(source, request.drafts)

    def free(self, request: Request) -> None:
        """Forget the text of a request that leaves its seat."""
        if request.seat is not None:
            self.forget(request.seat, request.drafts)

    def forget(self, seat: int, is_drafted: bool) -> None:
        """Forget the text in a seat. is_drafted: whether the drafter can be told so now."""
        if self._drafter is None:
            return
        self._unread = self._unread.without(seat)
        if is_drafted:
            self._drafter.free(seat)
            self._stale_seats.discard(seat)
        else:
            self._stale_seats.add(seat)

    # -- during a round --

    def remind(self, turns: Sequence[Turn]) -> None:
        """Tell the drafter what it needs to draft: what was kept since, and again the texts that it lost in a round that failed."""
        self.tell()
        for request in (turn.request for turn in turns if turn.request.is_lost and turn.request.drafts):
            if self._drafter is None or request.seat is None:
                continue
            self._drafter.free(request.seat)
            for start in range(0, request.scored, self._chunk):
                stop = min(start + self._chunk, request.scored)
                text = request.known(start, stop + 1)
                self._drafter.extend(Kept((request.seat,), (text,), (start,), (0,), (0,), None, self._device))
            request.is_lost = False

    def follow(self, turns: Sequence[Turn], forest: Forest, scored: Scored, verdict: Verdict) -> None:
        """Take what became certain in a round, for the rows that it drafts for, to tell it to the drafter."""
        if self._drafter is None:
            return
        kept = kept_of(turns, forest, scored, verdict)
        if kept.seats:
            self._unread = self._unread.with_part(kept)
            if self._is_recorder or self._unread.num_bytes > _MOST_BYTES:
                self.tell()

    def tell(self) -> None:
        """Tell the drafter what it was not told yet."""
        if self._drafter is not None:
            unread, self._unread = self._unread, Unread()
            for kept in unread.joined(self._chunk):
                self._drafter.extend(kept)


def is_told(request: Request) -> bool:
    """Whether the drafter is told what becomes certain of a request; a lost one is told all of it before the drafter drafts."""
    return request.drafts and not request.is_lost


def kept_of(turns: Sequence[Turn], forest: Forest, scored: Scored, verdict: Verdict) -> Kept:
    """What became certain in a round: of each row that drafts its stem, its kept drafts, and the token after them."""
    drafting = [row for row, turn in enumerate(turns) if is_told(turn.request)]
    texts: list[tuple[int, ...]] = []
    nodes: list[int] = []  # in the forest, of the tokens of `texts`
    first = 0
    for row, turn in enumerate(turns):
        size, kept = len(turn.stem), verdict.kept[row]
        after = turn.request.scored + size
        if is_told(turn.request):
            texts.append((*turn.stem, *(verdict.emitted[row] or turn.request.known(after, after + 1))))
            nodes += [*range(first, first + size), *(first + size + draft for draft in kept)]
        first += size + verdict.counts[row]
    features = scored.features
    if features is not None:
        features = features[torch.tensor(nodes, dtype=torch.int64).to(features.device, non_blocking=True)]
    requests = [turns[row].request for row in drafting]
    return Kept(
        seats=tuple(request.seat for request in requests if request.seat is not None),
        texts=tuple(texts),
        starts=tuple(request.scored for request in requests),
        tried=tuple(verdict.tried[row] for row in drafting),
        held=tuple(len(verdict.kept[row]) for row in drafting),
        features=features,
        device=forest.tokens.device,
    )
