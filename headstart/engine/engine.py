"""The engine: requests, and the round: draft a forest, score it in one target forward, keep a path per row, commit.

Plain decoding is a round without drafts, prefill has longer stems, several requests are several rows. Must not import the module
of any one drafter, or training.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count

import torch

from headstart.drafters import Drafter
from headstart.engine.admission import check_prompt, check_rule
from headstart.engine.drafter_state import DrafterState
from headstart.engine.drawn_tree import drawn_trees
from headstart.engine.events import Event, EventQueue
from headstart.engine.exclusive import Exclusive
from headstart.engine.learning import Learning
from headstart.engine.memory import headroom_slots, num_slots, slot_bytes
from headstart.engine.pace import Pace
from headstart.engine.prefixes import Prefixes
from headstart.engine.scheduler import Request, Scheduler, Stream, Turn
from headstart.engine.state import EngineState
from headstart.engine.stats import Stats, clock, parts_of
from headstart.speculation.constraints import Constraint, Constraints
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
    """Runs requests in rounds on one target.

    Threads may share an engine: rounds run one at a time. A round counts as a whole or not at all: whatever interrupts it (a
    signal, an error in a drafter, a lack of memory), the next round starts from the state before it.

    target: the model that decides every token.
    drafter: proposes tokens; None: plain decoding.
    planner: how much to draft; None: the drafter's own planner.
    max_rows: requests that run at once.
    memory: bytes for keys and values, the drafter's included; None: enough for `max_rows` requests of the target's full context,
        but at most 1 GiB.
    accept: the acceptance rule, by name as `parse_rule` reads it, or a `Rule`.
    chunk: prompt tokens per round (chunked prefill).
    prefixes: texts of ended requests whose keys and values are kept, as far as memory allows, for requests that begin likewise.
    ahead: tokens of output for which a request has memory beforehand. It gets more as it goes on; where there is none, the request
        that came last waits and goes on later, with the same tokens. None: a request waits for all the memory that it may need.
    pace: limits the prompt tokens of rounds in which other requests decode; None: `chunk` alone does.

    Raises ValueError for settings that cannot be honoured.
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
        prefixes: int = 0,
        ahead: int | None = None,
        pace: Pace | None = None,
    ) -> None:
        if max_rows < 1 or chunk < 1:
            raise ValueError(f"max_rows is {max_rows} and chunk is {chunk}; both must be at least 1")
        if prefixes < 0 or (ahead is not None and ahead < 1):
            raise ValueError(f"prefixes is {prefixes} and ahead is {ahead}; they must be at least 0 and 1, or ahead None")
        self.target = target
        self.drafter = drafter
        self.planner = planner or (drafter.planner if drafter else None)
        self.rule = accept if isinstance(accept, Rule) else parse_rule(accept)
        check_rule(drafter, self.rule)
        self.learning = Learning(self.planner, not getattr(drafter, "corrects_chances", False))
        headroom = headroom_slots(target, drafter, planner, max_rows)
        self.slot_bytes = slot_bytes(target, drafter)
        num_seats = max_rows + prefixes + (ahead is not None)  # one to move to
        self.seating = Seating(num_seats, num_slots(target.context + headroom, max_rows, memory, self.slot_bytes))
        self.scheduler = Scheduler(self.seating, headroom, chunk, max_rows, ahead)
        self.cache = target.new_cache(self.seating)
        if drafter:
            drafter.attach(target, self.seating)
        told = DrafterState(drafter, target.device, chunk)
        self.state = EngineState(target, self.scheduler, self.cache, told, Prefixes(prefixes))
        self.pace = pace
        self.stats = Stats()  # of the rounds that counted; replaced after each round, never changed in place
        self._sampling: tuple[tuple[int, ...], SamplingTensors] | None = None
        self._ids = count()
        self._exclusive = Exclusive()
        self._joining: deque[Request] = deque()  # added, but not yet in the scheduler
        self._leaving: deque[Request] = deque()  # to be ended before the next round

    @property
    def history(self) -> History | None:
        """Token counts of the seats, for penalties; None until a request uses penalties."""
        return self.state.history

    @property
    def memory(self) -> int:
        """Bytes of the KV cache, the drafter's included. All of it is allocated when the engine is made."""
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
        constraint: Constraint | None = None,
        draws_trees: bool = False,
    ) -> Request:
        """Queue a prompt. Does not wait for a round of another thread.

        prompt: token ids.
        params: how to sample and where to stop.
        seed: of the noise; None: `params.seed`, or a random one if that is None too.
        stop_ids: the model's own stop tokens, without effect with `ignore_eos`.
        stream: turns tokens into text and finds stop strings, which cut a kept path before any of it is emitted; None: no text.
        leader: a request with the same prompt, from which keys and values are copied.
        queue: where its events go; None: `step` returns them.
        constraint: which tokens may follow its output; None: any.
        draws_trees: whether its events have the trees of their rounds.

        Raises ValueError if the request can never run.
        """
        check_prompt(self.target, prompt, params, has_stream=stream is not None)
        if seed is None:
            seed = draw_seed() if params.seed is None else params.seed
        stops = frozenset([*(() if params.ignore_eos else stop_ids), *params.stop_token_ids])
        request = Request(next(self._ids), tuple(prompt), params, seed, stops, stream, leader, queue, constraint, draws_trees)
        self.scheduler.check(request)
        self._joining.append(request)
        self._exclusive.run_now(self._join)
        return request

    def abort(self, request: Request) -> None:
        """End a request now, or after the round that another thread runs. Tokens that it has emitted stay."""
        self._leaving.append(request)
        if not self._exclusive.is_mine:
            self._exclusive.run(self._join_and_end, lambda: request not in self._leaving)

    def leave(self, requests: Iterable[Request]) -> None:
        """End requests without waiting: now, or after the round that runs. For finalizers, which may be called at any statement."""
        self._leaving.extend(requests)
        self._exclusive.run_now(self._join_and_end)

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return self.scheduler.is_idle and not self._joining

    def run(self) -> Iterator[Event]:
        """Run rounds until no request is left. Yields the events that `step` returns."""
        while not self.is_idle or self.state.unread.num_published:
            yield from self.step()

    # -- rounds, one thread at a time --

    def step(self) -> list[Event]:
        """Run one round over all running requests. Returns the events of the requests without a queue of their own.

        Raises what the round raised; the state is then the one before the round. Where the text stream of a request raised, that
        request has ended and the others went on; its error is raised here if the request has no queue.
        """
        events: list[Event] = []

        def work() -> None:
            self._transact()
            events.extend(self.state.unread.take())

        self._alone(work)
        return events

    def advance(self, is_done: Callable[[], bool]) -> None:
        """Run one round, unless `is_done` becomes true before, by a round of another thread."""

        def work() -> None:
            self._transact()
            assert is_done() or not self.is_idle, "no request is left, but what the caller waits for has not come"

        self._alone(work, is_done)

    def _alone(self, work: Callable[[], object], unless: Callable[[], bool] | None = None) -> None:
        try:
            self._exclusive.run(work, unless)
        finally:
            if self._leaving:  # a finalizer ran meanwhile
                self._exclusive.run_now(self._join_and_end)

    @torch.inference_mode()
    def _transact(self) -> None:
        """A round that counts as a whole or not at all."""
        self._join_and_end()
        while (short := self.scheduler.short()) is not None:
            self.state.transact(partial(self.state.make_room, short))
        with self.target.working():
            self.state.transact(self._round)

    def _join(self) -> None:
        """Finish what an interrupted round left to do, and hand added requests to the scheduler."""
        self.state.finish_interrupted()
        while self._joining:
            if not self.scheduler.waiting or self.scheduler.waiting[-1] is not self._joining[0]:  # interrupted between the two
                self.scheduler.add(self._joining[0])
            self._joining.popleft()

    def _join_and_end(self) -> None:
        """As `_join`, and end the requests that leave."""
        self._join()
        while self._leaving:
            if self._leaving[0].finish_reason is None:
                self.state.transact(self._end_next, self._leaving[0])
            self._leaving.popleft()

    def _end_next(self) -> None:
        """End the next request that leaves."""
        request = self._leaving[0]
        self.state.finish(request, "abort")
        if request.queue is not None:
            self.state.put(Event(request, finish_reason="abort"))

    def _round(self) -> None:
        """One round over all running requests. All that it changes is covered by the savepoint of the transaction."""
        began = time.perf_counter()
        seconds = dict.fromkeys(("draft", "score", "verify", "commit", "host"), 0.0)
        for request in self.state.admit():
            self.learning.start(request)
        turns = self.scheduler.turns(self._chunk())
        if not turns:
            return
        seats = [turn.request.seat for turn in turns if turn.request.seat is not None]
        rows = self._rows(turns, seats)
        with clock(seconds, "draft"):
            drafts = self._draft(turns, rows)
        with clock(seconds, "host"):
            forest = merge(
                [turn.stem for turn in turns],
                [turn.request.scored for turn in turns],
                [turn.ends_at_root for turn in turns],
                drafts,
                self.target.min_nodes,
                self.target.device,
            )
        with clock(seconds, "score"):
            scored = self.target.score(forest, self.cache, seats, self.drafter.taps if self.drafter else ())
        with clock(seconds, "verify"):
            verdict = verify(forest, scored.logits, rows, self.rule)
        with clock(seconds, "commit"):
            self.cache.commit(seats, forest.stems, verdict.kept)
        with clock(seconds, "draft"):
            self.state.drafter.follow(turns, forest, scored, verdict)
        self.learning.learn(rows, drafts, verdict, seconds)
        if self.pace is not None and self.target.device.type == "cpu":  # elsewhere a clock on the host sees launches only
            self.pace.learn(len(forest), len(turns), sum(turn.request.scored for turn in turns), seconds["score"])
        emitted = self._emit(turns, forest, scored, verdict)
        seconds["host"] += time.perf_counter() - began - sum(seconds.values())
        for turn, part in zip(turns, parts_of(forest, verdict, emitted, seconds), strict=True):
            turn.request.rounds.append(part)
        self.stats += Stats.of_round(forest, verdict, emitted, seconds)

    def _chunk(self) -> int:
        """Prompt tokens that the next round may score."""
        decoding = [request for request in self.scheduler.running if request.length - request.scored == 1]
        if self.pace is None or not decoding:
            return self.scheduler.chunk
        context = sum(request.scored for request in decoding)
        return min(self.scheduler.chunk, self.pace.chunk(len(decoding), context))

    def _rows(self, turns: Sequence[Turn], seats: Sequence[int]) -> Rows:
        requests = [turn.request for turn in turns]
        self.learning.see(turns)
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
            odds=self.learning.odds(seats),
            chooser=self.target.chooser,
            constraints=_constraints(requests),
        )

    def _depth_limit(self, turn: Turn) -> int:
        """How deep a row may draft. A round emits one token more than the depth of its deepest kept draft.

        Rows whose stem is more than a root do not draft, nor do those without output: the drafter has no state for their root.
        """
        request = turn.request
        is_root = turn.ends_at_root and len(turn.stem) == 1
        return request.left - 1 if is_root and request.output and request.drafts else 0

    def _sampling_of(self, requests: Sequence[Request]) -> SamplingTensors:
        key = tuple(request.id for request in requests)
        if self._sampling is None or self._sampling[0] != key:
            params, seeds = [request.params for request in requests], [request.seed for request in requests]
            sampling = SamplingTensors.of(params, seeds, self.target.device)
            self._sampling = key, sampling
        return self._sampling[1]

    def _draft(self, turns: Sequence[Turn], rows: Rows) -> Drafts:
        if not rows.drafting or self.drafter is None or self.planner is None:
            return Drafts.none(self.target.device)
        self.state.drafter.remind(turns)
        drafts = self.drafter.propose(rows)
        if rows.constraints is not None and len(drafts):
            drafts = rows.constraints.without_forbidden(drafts, len(rows))
        return self.planner.prune(drafts, rows.plan, len(rows))

    # -- results of a round --

    def _emit(self, turns: Sequence[Turn], forest: Forest, scored: Scored, verdict: Verdict) -> list[int]:
        """Give every request its new tokens. Returns how many each got."""
        draws = any(turn.request.draws_trees for turn in turns)
        trees = drawn_trees(forest, verdict, [turn.stem[-1] for turn in turns]) if draws else []
        emitted: list[int] = []
        for row, turn in enumerate(turns):
            turn.request.scored += len(turn.stem) + len(verdict.kept[row])
            tokens, tree = verdict.emitted[row], trees[row] if turn.request.draws_trees else None
            emitted.append(self.state.emit(turn.request, tokens, scored.logits, verdict.asked[row], tree) if tokens else 0)
        return emitted


def _constraints(requests: Sequence[Request]) -> Constraints | None:
    """The constraints of these requests, which are the rows of a round; None where no request has one."""
    of_rows = {row: (r.constraint, tuple(r.output)) for row, r in enumerate(requests) if r.constraint is not None}
    return Constraints(of_rows) if of_rows else None
