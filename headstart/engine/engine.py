"""The round, over and over: draft a forest, score it in one target forward, keep a path per row, commit.

Plain decoding is the round without drafts, a prompt is a longer stem, several requests are several rows. There is no other loop.
This file knows the order of things. It refuses to know any method, any model and any character.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor

from headstart.drafters import Drafter, Restorable
from headstart.engine.events import Event, EventQueue
from headstart.engine.exclusive import Exclusive
from headstart.engine.savepoint import Savepoint
from headstart.engine.scheduler import Request, Scheduler, Stream, Turn
from headstart.engine.stats import Part, Stats
from headstart.speculation.distribution import History, SamplingTensors
from headstart.speculation.noise import draw_seed
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import NO_DRAFTS, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.rules import parse_rule
from headstart.speculation.tree import Drafts, Forest, Kept, merge
from headstart.speculation.verify import Rule, Verdict, verify
from headstart.target.cache import Seating
from headstart.target.target import Scored, Target


class Engine:
    """Runs requests through rounds on one target, with one drafter (or none) and one planner (None: the drafter's own).

    max_rows: requests that run at once. memory: bytes for keys and values, the drafter's included; None: enough for `max_rows`
    requests of the target's full context, but at most 1 GiB. accept: the rule, as `parse_rule` reads it, or one of your own.
    chunk: prompt tokens per round. Raises ValueError for settings that cannot be honoured.

    Threads may share an engine: rounds run one at a time. A round counts as a whole or not at all: whatever interrupts it (a
    signal, an error of a drafter, no memory), the next one begins where it began.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        planner: Planner | None = None,
        *,
        max_rows: int = 8,
        memory: int | None = None,
        accept: str | Rule = "coupled",
        chunk: int = 256,
    ) -> None:
        if max_rows < 1 or chunk < 1:
            raise ValueError(f"max_rows is {max_rows} and chunk is {chunk}; both must be at least 1")
        self.target = target
        self.drafter = drafter
        self.planner = planner or (drafter.planner if drafter else None)
        self.rule = accept if isinstance(accept, Rule) else parse_rule(accept)
        headroom = max(self.planner.headroom(max_rows) if self.planner and drafter else 0, target.min_nodes)
        self.slot_bytes = target.slot_bytes + (drafter.slot_bytes if drafter else 0)
        self.seating = Seating(max_rows, _slots(target.context + headroom, max_rows, memory, self.slot_bytes))
        self.scheduler = Scheduler(self.seating, headroom, chunk)
        self.cache = target.new_cache(self.seating)
        if drafter:
            drafter.attach(target, self.seating)
        self.history: History | None = None
        self.stats = Stats()  # of the rounds that counted; replaced after each, never changed
        self._sampling: tuple[tuple[int, ...], SamplingTensors] | None = None
        self._ids = count()
        self._exclusive = Exclusive()
        self._joining: deque[Request] = deque()  # added, and not yet with the scheduler
        self._leaving: deque[Request] = deque()  # to be ended before the next round
        self._savepoint: Savepoint | None = None  # while what changes does not count yet
        self._restorable: Restorable | None = drafter if isinstance(drafter, Restorable) else None
        self._drafter_before: object = None  # its snapshot at the savepoint
        self._num_failed = 0  # rounds in a row that did not end
        self._strangers: set[int] = set()  # seats of which the drafter may know another text than their next occupant's
        self._touched: list[EventQueue] = []  # queues with events that are not published yet
        self._unread = EventQueue()  # of requests without a queue of their own

    @property
    def memory(self) -> int:
        """Bytes of the cache, the drafter's share included: allocated at birth, never more."""
        return self.slot_bytes * self.seating.num_slots

    # -- requests --

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
        stream: Stream | None = None,
        leader: Request | None = None,
        queue: EventQueue | None = None,
    ) -> Request:
        """Queue a prompt of token ids. Raises ValueError if it can never run. Does not wait for a round of another thread.

        stop_ids: the model's own stop tokens (dropped with `ignore_eos`). stream: turns tokens into text and looks for stop
        strings, which cut a kept path before anything of it is emitted. leader: a request with the same prompt to fork from.
        queue: where its events go; None: `step` returns them.
        """
        limit = self.target.context
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        if len(prompt) + params.max_tokens > limit:
            raise ValueError(
                f"prompt of {len(prompt)} tokens plus max_tokens={params.max_tokens} exceeds the context of {limit} tokens of "
                f"{self.target.name}; " + _way_out(len(prompt), limit)
            )
        if params.stop and stream is None:
            raise ValueError("stop strings need a tokenizer; use headstart.load, or hand the engine a TextStream")
        strange = [token for token in (*prompt, *params.logit_bias, *params.stop_token_ids) if not 0 <= token < self.target.vocab]
        if strange:
            raise ValueError(f"token {strange[0]} is not in the vocabulary of {self.target.vocab} of {self.target.name}")
        if (params.logprobs or 0) > self.target.vocab:
            raise ValueError(f"logprobs is {params.logprobs}; the vocabulary has {self.target.vocab} tokens to choose from")
        own = () if params.ignore_eos else stop_ids
        if seed is None:
            seed = draw_seed() if params.seed is None else params.seed
        stops = frozenset([*own, *params.stop_token_ids])
        request = Request(next(self._ids), tuple(prompt), params, seed, stops, stream, leader, queue)
        self.scheduler.check(request)
        self._joining.append(request)
        self._exclusive.run_now(self._join)
        return request

    def abort(self, request: Request) -> None:
        """End a request now, or after the round that another thread is in; its tokens so far stay."""
        self._leaving.append(request)
        if not self._exclusive.is_mine:
            self._exclusive.run(self._settle, lambda: request not in self._leaving)

    def leave(self, requests: Iterable[Request]) -> None:
        """End requests without waiting: now, or after the round that is running. For finalizers, which may run anywhere."""
        self._leaving.extend(requests)
        self._exclusive.run_now(self._settle)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.scheduler.is_idle and not self._joining

    def run(self) -> Iterator[Event]:
        """Rounds until nothing is left to do. Yields what `step` returns."""
        while not self.is_idle or self._unread.num_published:
            yield from self.step()

    # -- what counts and what does not --

    def step(self) -> list[Event]:
        """One round over all running requests. Returns the events of those that have no queue of their own.

        Raises whatever the round raised, after which everything is as it was before the round. Where the text stream of a request
        raised, the request has ended and the others went on; the error is raised here if the request has no queue.
        """
        events: list[Event] = []

        def work() -> None:
            self._transact()
            events.extend(self._unread.take())

        self._alone(work)
        return events

    def advance(self, is_done: Callable[[], bool]) -> None:
        """One round, unless another thread's rounds make `is_done` true first."""

        def work() -> None:
            self._transact()
            assert is_done() or not self.is_idle, "what is waited for never comes: nothing is left to do"

        self._alone(work, is_done)

    def _alone(self, work: Callable[[], object], unless: Callable[[], bool] | None = None) -> None:
        try:
            self._exclusive.run(work, unless)
        finally:
            if self._leaving:  # of a finalizer that ran meanwhile
                self._exclusive.run_now(self._settle)

    @torch.inference_mode()
    def _transact(self) -> None:
        """A round, or nothing at all."""
        self._settle()
        self._begin()
        try:
            self._round()
            self._count()
        except BaseException:
            self._roll_back()
            raise
        self._publish()

    def _begin(self) -> None:
        if self._restorable is not None:
            self._drafter_before = self._restorable.snapshot()
        self._savepoint = Savepoint(self.scheduler, self.cache)

    def _count(self) -> None:
        """From here on what has changed counts."""
        self._num_failed = 0
        self._savepoint = None

    def _publish(self) -> None:
        """Show readers what counts. May be called again where it was interrupted."""
        for queue in self._touched:
            queue.publish()
        self._touched.clear()

    def _join(self) -> None:
        """Finish what an interrupted round left to do, and hand added requests to the scheduler."""
        if self._savepoint is not None:
            self._roll_back()
        self._publish()
        while self._joining:
            if not self.scheduler.waiting or self.scheduler.waiting[-1] is not self._joining[0]:  # interrupted between the two
                self.scheduler.add(self._joining[0])
            self._joining.popleft()

    def _settle(self) -> None:
        """The same, and end the requests that leave."""
        self._join()
        while self._leaving:
            request = self._leaving[0]
            if request.finish_reason is None:
                self._begin()
                try:
                    self._finish(request, "abort")
                    if request.queue is not None:
                        self._tell(Event(request, finish_reason="abort"))
                    self._count()
                except BaseException:
                    self._roll_back()
                    raise
                self._publish()
            self._leaving.popleft()

    @torch.inference_mode()
    def _roll_back(self) -> None:
        """Everything as it was at the savepoint. May be called again where it was interrupted."""
        savepoint = self._savepoint
        if savepoint is None:  # it counts already
            return
        for queue in self._touched:
            queue.withdraw()
        self._touched.clear()
        seated = {request for request in savepoint.requests if request.seat is not None}
        self._strangers.update(request.seat for request in seated if request.seat is not None)
        savepoint.restore()
        if self.history is not None:
            for request in self.scheduler.running:
                if request.params.has_penalties and request.seat is not None:
                    self.history.start(request.seat, request.prompt, request.output)
        if self.drafter:
            self._recover(self.drafter, seated.union(self.scheduler.running))
        self._num_failed += 1
        self._savepoint = None

    def _recover(self, drafter: Drafter, requests: Iterable[Request]) -> None:
        """Nobody knows what a drafter remembers after a round that failed. It is restored where it can be; one that reads nothing
        but tokens is told them again; any other no longer drafts for these requests. Nor does one that failed twice in a row."""
        if self._restorable is not None:
            self._restorable.restore(self._drafter_before)
        for request in requests:
            request.is_lost = self._restorable is None
            request.drafts &= self._num_failed == 0 and (self._restorable is not None or not drafter.taps)

    def _round(self) -> None:
        """One round over all running requests. Whatever it changes is in the savepoint or is garbage without it."""
        began = time.perf_counter()
        seconds = dict.fromkeys(("draft", "score", "verify", "commit", "host"), 0.0)
        self._seat_newcomers()
        turns = self.scheduler.turns()
        if not turns:
            return
        seats = [turn.request.seat for turn in turns if turn.request.seat is not None]
        rows = self._rows(turns, seats)
        with _clock(seconds, "draft"):
            self._remind(turns)
            drafts = self._draft(rows)
        with _clock(seconds, "host"):
            forest = merge(
                [turn.stem for turn in turns],
                [turn.request.scored for turn in turns],
                [turn.is_whole for turn in turns],
                drafts,
                self.target.min_nodes,
                self.target.device,
            )
        with _clock(seconds, "score"):
            scored = self.target.score(forest, self.cache, seats, self.drafter.taps if self.drafter else ())
        with _clock(seconds, "verify"):
            verdict = verify(forest, scored.logits, rows, self.rule)
        with _clock(seconds, "commit"):
            self.cache.commit(seats, forest.stems, verdict.kept)
        with _clock(seconds, "draft"):
            self._follow(turns, forest, scored, verdict)
        emitted = self._emit(turns, scored, verdict)
        seconds["host"] += time.perf_counter() - began - sum(seconds.values())
        self._note(turns, forest, verdict, emitted, seconds)

    def _seat_newcomers(self) -> None:
        for request in self.scheduler.admit():
            assert request.seat is not None
            self.cache.free(request.seat)
            request.is_lost = False
            if self.drafter and request.drafts and request.seat in self._strangers:
                self.drafter.free(request.seat)
                self._strangers.discard(request.seat)
            leader, length = request.leader, len(request.prompt) - 1
            if leader is not None and leader.seat is not None and length and self._is_followed(leader):
                self.cache.fork(leader.seat, request.seat, length)
                request.scored = length
                if self.drafter and request.drafts:
                    self.drafter.fork(leader.seat, request.seat, length)
            if request.params.has_penalties:
                if self.history is None:
                    self.history = History(self.seating.num_seats, self.target.vocab, self.target.device)
                self.history.start(request.seat, request.prompt)

    def _is_followed(self, request: Request) -> bool:
        """Whether all that is known of a request can be forked, by the drafter too."""
        return self.drafter is None or (request.drafts and not request.is_lost)

    def _remind(self, turns: Sequence[Turn]) -> None:
        """Tell the drafter the texts that it lost in a round that failed."""
        for request in (turn.request for turn in turns if turn.request.is_lost and turn.request.drafts):
            if self.drafter is None or request.seat is None:
                continue
            self.drafter.free(request.seat)
            for start in range(0, request.scored, self.scheduler.chunk):
                stop = min(start + self.scheduler.chunk, request.scored)
                text = request.known(start, stop + 1)
                self.drafter.extend(Kept((request.seat,), (text,), (start,), (0,), (0,), None, self.target.device))
            request.is_lost = False

    def _rows(self, turns: Sequence[Turn], seats: Sequence[int]) -> Rows:
        requests = [turn.request for turn in turns]
        limits = [self._depth_limit(turn) for turn in turns] if self.drafter else [0] * len(turns)
        plan = self.planner.plan(limits) if self.planner and any(limits) else NO_DRAFTS
        return Rows(
            seats=tuple(seats),
            roots=tuple(turn.stem[-1] for turn in turns),
            root_positions=tuple(r.length - 1 for r in requests),
            depths=tuple(min(limit, plan.depth) for limit in limits),
            plan=plan,
            sampling=self._sampling_of(requests),
            vocab=self.target.vocab,
            noise_rule=self.rule.noise,
            history=self.history,
        )

    def _depth_limit(self, turn: Turn) -> int:
        """A round emits one token more than the deepest kept draft. Rows still in their prompt, be it of one token or forked
        but for the last, do not draft: the drafter has not heard of their root."""
        return turn.request.left - 1 if turn.request.output and turn.request.drafts else 0

    def _sampling_of(self, requests: Sequence[Request]) -> SamplingTensors:
        key = tuple(request.id for request in requests)
        if self._sampling is None or self._sampling[0] != key:
            params, seeds = [request.params for request in requests], [request.seed for request in requests]
            sampling = SamplingTensors.of(params, seeds, self.target.device)
            self._sampling = key, sampling
        return self._sampling[1]

    def _draft(self, rows: Rows) -> Drafts:
        if not rows.drafting or self.drafter is None or self.planner is None:
            return Drafts.none(self.target.device)
        drafts = self.drafter.propose(rows)
        return self.planner.prune(drafts, rows.plan, len(rows))

    def _follow(self, turns: Sequence[Turn], forest: Forest, scored: Scored, verdict: Verdict) -> None:
        """Tell the drafter what became certain, of the rows for which it drafts."""
        if self.drafter is None:
            return
        kept = _kept(turns, forest, scored, verdict)
        if kept.seats:
            self.drafter.extend(kept)

    # -- what comes out --

    def _emit(self, turns: Sequence[Turn], scored: Scored, verdict: Verdict) -> list[int]:
        """Hand every row its tokens. Returns how many each was given."""
        emitted: list[int] = []
        for row, turn in enumerate(turns):
            request, tokens = turn.request, verdict.emitted[row]
            request.scored += len(turn.stem) + len(verdict.kept[row])
            if not tokens:
                emitted.append(0)
                continue
            try:
                kept, reason, text, request.stream = _said(request, tokens)
            except Exception as error:  # of its own text: the other rows have nothing to do with it
                emitted.append(0)
                self._finish(request, "error")
                self._tell(Event(request, finish_reason="error", error=error))
                continue
            guessed = tuple(place < len(tokens) - 1 for place in range(len(kept)))
            request.output += kept
            request.guessed += guessed
            if request.params.logprobs is not None:
                asked = verdict.asked[row][: len(kept)]
                request.logprobs += _logprobs(scored.logits, asked, kept, request.params.logprobs)
            if request.params.has_penalties and self.history is not None and request.seat is not None:
                self.history.write(request.seat, kept)
            if reason is not None:
                self._finish(request, reason)
            self._tell(Event(request, kept, guessed, text, reason))
            emitted.append(len(kept))
        return emitted

    def _tell(self, event: Event) -> None:
        """Put an event where its reader finds it once the round counts."""
        queue = event.request.queue or self._unread
        self._touched.append(queue)
        queue.events.append(event)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if request.seat is not None:
            self.cache.free(request.seat)
            if self.drafter and request.drafts:
                self.drafter.free(request.seat)
                self._strangers.discard(request.seat)
            elif self.drafter:
                self._strangers.add(request.seat)
        self.scheduler.leave(request)

    def _note(
        self, turns: Sequence[Turn], forest: Forest, verdict: Verdict, emitted: Sequence[int], seconds: dict[str, float]
    ) -> None:
        """Statistics of a round: the engine's, and each request's own."""
        whole = Stats(rounds=1, nodes=len(forest), drafts=sum(forest.counts), seconds=seconds)
        share = seconds if len(turns) == 1 else {name: spent / len(turns) for name, spent in seconds.items()}
        for row, turn in enumerate(turns):
            tried, held, drafts = verdict.tried[row], len(verdict.kept[row]), forest.counts[row]
            if emitted[row]:
                whole.count(tried, held, emitted[row])
            turn.request.rounds.append(Part(forest.stems[row] + drafts, drafts, tried, held, emitted[row], share))
        self.stats += whole


@contextmanager
def _clock(seconds: dict[str, float], share: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[share] += time.perf_counter() - began


def _slots(longest: int, max_rows: int, memory: int | None, slot_bytes: int) -> int:
    if memory is None:
        return max(1, min(longest * max_rows, max(2**30 // slot_bytes, min(longest, 4096))))
    if memory < slot_bytes:
        raise ValueError(f"memory of {memory} bytes holds no token; one takes {slot_bytes} bytes")
    return memory // slot_bytes


def _way_out(prompt: int, limit: int) -> str:
    return f"lower max_tokens to {limit - prompt}" if prompt < limit else f"shorten the prompt to less than {limit} tokens"


def _until_stop(tokens: tuple[int, ...], request: Request) -> tuple[int, ...]:
    """The tokens up to the first stop token, and no more than may be emitted."""
    for place, token in enumerate(tokens[: request.left]):
        if token in request.stop_ids:
            return tokens[: place + 1]
    return tokens[: request.left]


def _said(request: Request, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], str | None, str, Stream | None]:
    """What becomes of decided tokens: those that are emitted, why the answer ends with them (None: it goes on), the text that
    became final, and the text stream after it."""
    tokens, stopped, text = _until_stop(tokens, request), None, ""
    stream = request.stream and request.stream.copy()
    if stream is not None:
        piece = stream.push(tokens)
        tokens, stopped, text = tokens[: piece.num_tokens_used], piece.stopped, piece.text
    reason = None
    if stopped is not None or tokens[-1] in request.stop_ids:
        reason = "stop"
    elif len(tokens) == request.left:
        reason = "length"
    if stream is not None and stopped is None and reason is not None:
        rest = stream.flush()
        text += rest.text
        reason = reason if rest.stopped is None else "stop"
    return tokens, reason, text, stream


def _kept(turns: Sequence[Turn], forest: Forest, scored: Scored, verdict: Verdict) -> Kept:
    """What became certain, for the drafter: each row's stem, its kept drafts, and the token after them."""
    chosen = [row for row, turn in enumerate(turns) if turn.request.drafts]
    texts: list[tuple[int, ...]] = []
    places: list[int] = []
    first = 0
    for row, turn in enumerate(turns):
        size, kept = len(turn.stem), verdict.kept[row]
        after = turn.request.scored + size
        if turn.request.drafts:
            texts.append((*turn.stem, *(verdict.emitted[row] or turn.request.known(after, after + 1))))
            places += [*range(first, first + size), *(first + size + place for place in kept)]
        first += size + forest.counts[row]
    features = scored.features
    if features is not None:
        features = features[torch.tensor(places, dtype=torch.int64).to(features.device, non_blocking=True)]
    requests = [turns[row].request for row in chosen]
    return Kept(
        seats=tuple(request.seat for request in requests if request.seat is not None),
        texts=tuple(texts),
        starts=tuple(request.scored for request in requests),
        tried=tuple(verdict.tried[row] for row in chosen),
        held=tuple(len(verdict.kept[row]) for row in chosen),
        features=features,
        device=forest.tokens.device,
    )


def _logprobs(
    logits: Tensor, asked: Sequence[int], tokens: Sequence[int], alternatives: int
) -> list[tuple[float, dict[int, float]]]:
    """Per token its raw target log-probability (before temperature), and those of the best alternatives."""
    places = torch.tensor([asked, tokens]).to(logits.device, non_blocking=True)
    lines = torch.log_softmax(logits[places[0]].double(), -1)
    own = lines.gather(-1, places[1][:, None]).squeeze(-1).tolist()
    best = lines.topk(alternatives, -1)
    tables = [dict(zip(ids, values, strict=True)) for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return list(zip(own, tables, strict=True))
