"""The round, over and over: draft a forest, score it in one target forward, keep a path per row, commit.

Plain decoding is the round without drafts, a prompt is a longer stem, several requests are several rows. There is no other loop.
This file knows the order of things. It refuses to know any method, any model and any character.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.cache import Seating
from headstart.drafters import Drafter
from headstart.noise import draw_seed
from headstart.planner import Plan, Planner
from headstart.sampling import History, Laws, Rows, SamplingParams
from headstart.scheduler import Request, Scheduler, Stream, Turn
from headstart.stats import Stats
from headstart.target import Scored, Target
from headstart.tree import Drafts, Forest, Kept, merge
from headstart.verify import Rule, Verdict, parse_rule, verify


@dataclass(frozen=True)
class Event:
    """What a round gave a request: new tokens, which of them had been guessed, and the text that became final with them."""

    request: Request
    tokens: tuple[int, ...]
    guessed: tuple[bool, ...]
    text: str


class Engine:
    """Runs requests through rounds on one target, with one drafter (or none) and one planner (None: the drafter's own).

    max_rows: requests that run at once. memory: bytes for keys and values, the drafter's included; None: enough for `max_rows`
    requests of the target's full context, but at most 1 GiB. accept: the rule, as `parse_rule` reads it, or one of your own.
    chunk: prompt tokens per round. Raises ValueError for settings that cannot be honoured.
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
        self.stats = Stats()
        self._laws: tuple[tuple[int, ...], Laws] | None = None
        self._next_id = 0

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
    ) -> Request:
        """Queue a prompt of token ids. Raises ValueError if it can never run.

        stop_ids: the model's own stop tokens (dropped with `ignore_eos`). stream: turns tokens into text and looks for stop
        strings, which cut a kept path before anything of it is emitted. leader: a request with the same prompt to fork from.
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
        request = Request(self._next_id, tuple(prompt), params, seed, stops, stream, leader)
        self.scheduler.add(request)
        self._next_id += 1
        return request

    def abort(self, request: Request) -> None:
        """End a request now; its tokens so far stay."""
        if request.finish_reason is None:
            self._finish(request, "abort")

    def run(self) -> Iterator[Event]:
        """Rounds until nothing is left to do."""
        while not self.scheduler.is_idle:
            yield from self.step()

    # -- the round --

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One round over all running requests."""
        began = time.perf_counter()
        before = sum(self.stats.seconds.values())
        self._seat_newcomers()
        turns = self.scheduler.turns()
        if not turns:
            return []
        seats = [turn.request.seat for turn in turns if turn.request.seat is not None]
        rows, plan = self._rows(turns, seats)
        with self._clock("draft"):
            drafts = self._draft(rows, plan)
        with self._clock("host"):
            forest = merge(
                [turn.stem for turn in turns],
                [turn.request.scored for turn in turns],
                [turn.is_whole for turn in turns],
                drafts,
                self.target.min_nodes,
                self.target.device,
            )
        with self._clock("score"):
            scored = self.target.score(forest, self.cache, seats, self.drafter.taps if self.drafter else ())
        with self._clock("verify"):
            verdict = verify(forest, scored.logits, rows, self.rule)
        with self._clock("commit"):
            self.cache.commit(seats, forest.stems, verdict.kept)
        if self.drafter:
            with self._clock("draft"):
                self.drafter.extend(_follow(turns, seats, forest, scored, verdict))
        events = self._emit(turns, forest, scored, verdict)
        self.stats.rounds += 1
        self.stats.nodes += len(forest)
        self.stats.drafts += len(drafts)
        self.stats.seconds["host"] += time.perf_counter() - began - (sum(self.stats.seconds.values()) - before)
        return events

    def _seat_newcomers(self) -> None:
        for request in self.scheduler.admit():
            assert request.seat is not None
            self.cache.free(request.seat)
            leader, length = request.leader, len(request.prompt) - 1
            if leader is not None and leader.seat is not None and length:
                self.cache.fork(leader.seat, request.seat, length)
                request.scored = length
                if self.drafter:
                    self.drafter.fork(leader.seat, request.seat, length)
            if request.params.has_penalties:
                if self.history is None:
                    self.history = History(self.seating.num_seats, self.target.vocab, self.target.device)
                self.history.start(request.seat, request.prompt)

    def _rows(self, turns: Sequence[Turn], seats: Sequence[int]) -> tuple[Rows, Plan | None]:
        requests = [turn.request for turn in turns]
        limits = [self._depth_limit(turn) for turn in turns] if self.drafter else [0] * len(turns)
        plan = self.planner.plan(limits) if self.planner and any(limits) else None
        rows = Rows(
            seats=tuple(seats),
            roots=tuple(turn.stem[-1] for turn in turns),
            places=tuple(r.length - 1 for r in requests),
            depths=tuple(min(limit, plan.depth) if plan else 0 for limit in limits),
            width=plan.width if plan else 0,
            beam=plan.beam if plan else 0,
            nodes=plan.nodes if plan else 0,
            parents=plan.parents if plan else frozenset(),
            worth=plan.worth if plan else 0.0,
            laws=self._laws_of(requests),
            vocab=self.target.vocab,
            noise_rule=self.rule.noise,
            history=self.history,
        )
        return rows, plan

    def _depth_limit(self, turn: Turn) -> int:
        """A round emits one token more than the deepest kept draft. Rows still in their prompt, be it of one token or forked
        but for the last, do not draft: the drafter has not heard of their root."""
        return turn.request.left - 1 if turn.request.output else 0

    def _laws_of(self, requests: Sequence[Request]) -> Laws:
        key = tuple(request.id for request in requests)
        if self._laws is None or self._laws[0] != key:
            params, seeds = [request.params for request in requests], [request.seed for request in requests]
            laws = Laws.of(params, seeds, self.target.device)
            self._laws = key, laws
        return self._laws[1]

    def _draft(self, rows: Rows, plan: Plan | None) -> Drafts:
        if plan is None or self.drafter is None or self.planner is None:
            return Drafts.none(self.target.device)
        drafts = self.drafter.propose(rows)
        return self.planner.prune(drafts, plan, len(rows))

    # -- what comes out --

    def _emit(self, turns: Sequence[Turn], forest: Forest, scored: Scored, verdict: Verdict) -> list[Event]:
        events: list[Event] = []
        for row, turn in enumerate(turns):
            request, tokens = turn.request, verdict.emitted[row]
            request.scored += len(turn.stem) + len(verdict.kept[row])
            if not tokens:
                continue
            kept, stop = _until_stop(tokens, request), None
            text = ""
            if request.stream is not None:
                piece = request.stream.push(kept)
                kept, stop, text = kept[: piece.num_tokens_used], piece.stopped, piece.text
            self.stats.count(verdict.tried[row], len(verdict.kept[row]), len(kept))
            guessed = tuple(place < len(tokens) - 1 for place in range(len(kept)))
            request.output += kept
            request.guessed += guessed
            if request.params.logprobs is not None:
                asked = verdict.asked[row][: len(kept)]
                request.logprobs += _logprobs(scored.logits, asked, kept, request.params.logprobs)
            if request.params.has_penalties and self.history is not None and request.seat is not None:
                self.history.write(request.seat, kept)
            if stop is not None or kept[-1] in request.stop_ids:
                self._finish(request, "stop")
            elif request.left == 0:
                self._finish(request, "length")
            if request.stream is not None and stop is None and request.finish_reason is not None:
                rest = request.stream.flush()
                text += rest.text
                if rest.stopped is not None:
                    request.finish_reason = "stop"
            events.append(Event(request, kept, guessed, text))
        return events

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if request.seat is not None:
            self.cache.free(request.seat)
            if self.drafter:
                self.drafter.free(request.seat)
        self.scheduler.leave(request)

    @contextmanager
    def _clock(self, share: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stats.seconds[share] += time.perf_counter() - began


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


def _follow(turns: Sequence[Turn], seats: Sequence[int], forest: Forest, scored: Scored, verdict: Verdict) -> Kept:
    """What became certain, for the drafter: each row's stem, its kept drafts, and the token after them."""
    texts: list[tuple[int, ...]] = []
    places: list[int] = []
    first = 0
    for row, turn in enumerate(turns):
        size, kept = len(turn.stem), verdict.kept[row]
        after = turn.request.scored + size
        rest = verdict.emitted[row] or turn.request.known(after, after + 1)
        texts.append((*turn.stem, *rest))
        places += [*range(first, first + size), *(first + size + place for place in kept)]
        first += size + forest.counts[row]
    features = scored.features
    if features is not None:
        features = features[torch.tensor(places).to(features.device, non_blocking=True)]
    return Kept(
        seats=tuple(seats),
        texts=tuple(texts),
        starts=tuple(turn.request.scored for turn in turns),
        tried=verdict.tried,
        held=tuple(map(len, verdict.kept)),
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
