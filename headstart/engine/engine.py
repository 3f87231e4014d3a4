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

from headstart.drafters import Drafter
from headstart.engine.admission import check_prompt
from headstart.engine.drafter_state import DrafterState
from headstart.engine.emission import emission_of, token_logprobs
from headstart.engine.events import Event, EventQueue
from headstart.engine.exclusive import Exclusive
from headstart.engine.memory import headroom_slots, num_slots, slot_bytes
from headstart.engine.scheduler import Request, Scheduler, Stream, Turn
from headstart.engine.state import EngineState
from headstart.engine.stats import Part, Stats
from headstart.speculation.distribution import History, SamplingTensors
from headstart.speculation.noise import draw_seed
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import NO_DRAFTS, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.rules import parse_rule
from headstart.speculation.tree import Drafts, Forest, merge
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
        headroom = headroom_slots(target, drafter, planner, max_rows)
        self.slot_bytes = slot_bytes(target, drafter)
        self.seating = Seating(max_rows, num_slots(target.context + headroom, max_rows, memory, self.slot_bytes))
        self.scheduler = Scheduler(self.seating, headroom, chunk)
        self.cache = target.new_cache(self.seating)
        if drafter:
            drafter.attach(target, self.seating)
        self.state = EngineState(target, self.scheduler, self.cache, DrafterState(drafter, target.device, chunk))
        self.stats = Stats()  # of the rounds that counted; replaced after each, never changed
        self._sampling: tuple[tuple[int, ...], SamplingTensors] | None = None
        self._ids = count()
        self._exclusive = Exclusive()
        self._joining: deque[Request] = deque()  # added, and not yet with the scheduler
        self._leaving: deque[Request] = deque()  # to be ended before the next round

    @property
    def history(self) -> History | None:
        """Token counts of the seats, for penalties; None until a request uses penalties."""
        return self.state.history

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
        check_prompt(self.target, prompt, params)
        if params.stop and stream is None:
            raise ValueError("stop strings need a tokenizer; use headstart.load, or hand the engine a TextStream")
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
        while not self.is_idle or self.state.unread.num_published:
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
            events.extend(self.state.unread.take())

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
        self.state.transact(self._round)

    def _join(self) -> None:
        """Finish what an interrupted round left to do, and hand added requests to the scheduler."""
        self.state.finish_interrupted()
        while self._joining:
            if not self.scheduler.waiting or self.scheduler.waiting[-1] is not self._joining[0]:  # interrupted between the two
                self.scheduler.add(self._joining[0])
            self._joining.popleft()

    def _settle(self) -> None:
        """Do the same, and end the requests that leave."""
        self._join()
        while self._leaving:
            if self._leaving[0].finish_reason is None:
                self.state.transact(self._end_first)
            self._leaving.popleft()

    def _end_first(self) -> None:
        """End the first request that leaves."""
        request = self._leaving[0]
        self.state.finish(request, "abort")
        if request.queue is not None:
            self.state.put(Event(request, finish_reason="abort"))

    def _round(self) -> None:
        """One round over all running requests. Whatever it changes is in the savepoint or is garbage without it."""
        began = time.perf_counter()
        seconds = dict.fromkeys(("draft", "score", "verify", "commit", "host"), 0.0)
        for request in self.scheduler.admit():
            self.state.seat(request)
        turns = self.scheduler.turns()
        if not turns:
            return
        seats = [turn.request.seat for turn in turns if turn.request.seat is not None]
        rows = self._rows(turns, seats)
        with _clock(seconds, "draft"):
            self.state.drafter.remind(turns)
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
            self.state.drafter.follow(turns, forest, scored, verdict)
        emitted = self._emit(turns, scored, verdict)
        seconds["host"] += time.perf_counter() - began - sum(seconds.values())
        self._note(turns, forest, verdict, emitted, seconds)

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

    # -- what comes out --

    def _emit(self, turns: Sequence[Turn], scored: Scored, verdict: Verdict) -> list[int]:
        """Hand every row its tokens. Returns how many each was given."""
        emitted: list[int] = []
        for row, turn in enumerate(turns):
            turn.request.scored += len(turn.stem) + len(verdict.kept[row])
            tokens = verdict.emitted[row]
            emitted.append(self._emit_to(turn.request, tokens, scored.logits, verdict.asked[row]) if tokens else 0)
        return emitted

    def _emit_to(self, request: Request, decided: tuple[int, ...], logits: Tensor, asked: tuple[int, ...]) -> int:
        """Hand a request what it emits of the decided tokens. Returns how many."""
        try:
            emission = emission_of(request, decided)
        except Exception as error:  # of its own text stream: the other rows go on
            self.state.finish(request, "error")
            self.state.put(Event(request, finish_reason="error", error=error))
            return 0
        tokens = emission.tokens
        request.stream = emission.stream
        request.output += tokens
        request.guessed += emission.guessed
        if request.params.logprobs is not None:
            request.logprobs += token_logprobs(logits, asked[: len(tokens)], tokens, request.params.logprobs)
        self.state.write_history(request, tokens)
        if emission.finish_reason is not None:
            self.state.finish(request, emission.finish_reason)
        self.state.put(Event(request, tokens, emission.guessed, emission.text, emission.finish_reason))
        return len(tokens)

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
