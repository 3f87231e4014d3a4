"""Rounds of a real engine on a text of random tokens, of sizes that are asked for, timed one by one.

Some of each round's drafts are kept, as in rounds that pay: what is kept is moved in the cache, emitted, and read by the drafter.
Must not import the module of any one drafter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headstart.drafters import Drafter
from headstart.engine.engine import Engine
from headstart.engine.memory import headroom_slots, slot_bytes
from headstart.engine.waiting import Watch
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import NO_DRAFTS, Plan, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.rules import parse_rule
from headstart.speculation.tree import ROOT, Drafts, Forest, Kept
from headstart.speculation.verify import Asked, Decisions, Rule
from headstart.target.cache import Seating
from headstart.target.target import Target

_CLEAN = 0.05  # fraction of its time that a sample may have waited for a processor
_CERTAIN = 1e4  # a logit that no noise can beat
_TEMPERATURE = 0.7  # of the texts
_LAST = 16  # tokens at the end of a text in which no round is timed: drafts would not be as deep as asked for


@dataclass(frozen=True)
class Setting:
    """The size of a round to be measured. nodes: of the forest, over all rows. depth, beam: levels drafted; 0 for none."""

    nodes: int = 1
    depth: int = 0
    beam: int = 1


@dataclass
class _Scripted:
    """A planner that does what `setting` says."""

    setting: Setting = field(default_factory=Setting)
    most: int = 1

    def headroom(self, max_rows: int) -> int:
        return self.most

    def plan(self, depths: Sequence[int]) -> Plan:
        setting = self.setting
        if not setting.depth:
            return NO_DRAFTS
        return Plan(setting.depth, 8, setting.beam, self.most)

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        """Of every row, the first drafts, as many as the setting has."""
        wanted, rows = max(0, self.setting.nodes - num_rows), drafts.rows
        if len(drafts) > wanted:
            place = torch.tril(rows[:, None] == rows[None]).sum(1) - 1  # among the drafts of its row
            shares = torch.tensor([(wanted + row) // num_rows for row in range(num_rows)]).to(rows.device)
            chosen = torch.argsort((place >= shares[rows]).int(), stable=True)[:wanted]
            drafts = drafts.take(chosen.sort().values, num_rows)
        return drafts.by_row(num_rows)


class _Filler:
    """A drafter of tokens that no model chose, as many as the planner's setting has."""

    name = "filler"
    taps: tuple[int, ...] = ()
    slot_bytes = 0

    def __init__(self, planner: _Scripted) -> None:
        self.planner: Planner = planner
        self._scripted = planner

    def attach(self, target: Target, seating: Seating) -> None:
        """Nothing to allocate."""
        self._device, self._vocab = target.device, target.vocab

    def extend(self, kept: Kept) -> None:
        """Nothing to learn."""

    def propose(self, rows: Rows) -> Drafts:
        """Chains of equal depth in every row that drafts."""
        wanted = max(0, self._scripted.setting.nodes - len(rows))
        tokens: list[int] = []
        parents: list[int] = []
        row_ids: list[int] = []
        depths: list[int] = []
        for number, row in enumerate(rows.drafting):
            first, size = len(tokens), (wanted + number) // len(rows.drafting)
            num_chains = -(-size // rows.depths[row])
            for node in range(size):
                tokens.append((7 * node) % self._vocab)
                parents.append(first + node - num_chains if node >= num_chains else ROOT)
                row_ids.append(row)
                depths.append(node // num_chains + 1)
        return Drafts.of(tokens, parents, row_ids, depths, [0.5**depth for depth in depths], device=self._device)

    def fork(self, source: int, seat: int, length: int) -> None:
        """Nothing is known."""

    def free(self, seat: int) -> None:
        """Nothing is known."""


def keeping(inner: Rule, most: int) -> Rule:
    """`inner` on logits that make it keep the first child of the first child and so on, `most` deep."""

    def judge(forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
        drafts, parents = forest.drafts, asked.parents
        if not len(drafts):
            return inner.judge(forest, asked, logits, rows, in_full)
        is_first = ~(parents[:, None] == parents[None]).tril(-1).any(1)
        known = logits[parents, drafts.tokens]
        wanted = torch.where(is_first & (drafts.depths <= most), torch.full_like(known, _CERTAIN), known)
        return inner.judge(forest, asked, logits.index_put_((parents, drafts.tokens), wanted), rows, in_full)

    return Rule(judge, inner.noise)


@dataclass(frozen=True)
class Sample:
    """Seconds of one round. forward: of the target. draft: of drafting. host: of all the rest.

    context: tokens in the cache before it, over all rows.
    is_clean: whether the process hardly waited for a processor.
    """

    forward: float
    draft: float
    host: float
    context: float
    is_clean: bool


class EventClock:
    """Times the parts of rounds on a GPU, whose kernels run on after the host has launched them, with events between the kernels.

    new_event: makes an event; None: those of CUDA.
    wait: returns when all kernels have run.
    """

    def __init__(self, wait: Callable[[], None], new_event: Callable[[], Any] | None = None) -> None:
        self._wait = wait
        self._new_event = new_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, seconds: dict[str, float], share: str) -> Iterator[None]:
        """Take note of when the kernels of the block begin and end. seconds: unchanged; `take` has the times."""
        began, ended = self._new_event(), self._new_event()
        began.record()
        yield
        ended.record()
        self._spans.append((share, began, ended))

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call. Waits for the kernels."""
        self._wait()
        totals: dict[str, float] = {}
        for share, began, ended in self._spans:
            totals[share] = totals.get(share, 0.0) + began.elapsed_time(ended) / 1000
        self._spans.clear()
        return totals


class TimedRounds:
    """An engine whose rounds are timed one by one.

    drafter: None: forests are filled with tokens at no cost.
    rows: texts at once. prompt: tokens of each. growth: tokens by which a text may grow.
    nodes: of the largest forest. kept: drafts that a row keeps of a round, at most.
    """

    def __init__(self, target: Target, drafter: Drafter | None, rows: int, prompt: int, growth: int, nodes: int, kept: int) -> None:
        self.planner = _Scripted(most=max(nodes, target.min_nodes) + 8)
        self.target = target
        guesser: Drafter = drafter if drafter is not None else _Filler(self.planner)
        num_tokens = prompt + growth + headroom_slots(target, guesser, self.planner, rows)
        memory = rows * (min(num_tokens, target.context) + self.planner.most) * slot_bytes(target, guesser)
        rule = keeping(parse_rule("coupled"), kept)
        self.engine = Engine(target, guesser, self.planner, max_rows=rows, memory=memory, accept=rule)
        self.events = _events(target.device)
        if self.events is not None:
            self.engine.clock = self.events
        generator = torch.Generator().manual_seed(0)
        self.prompts = [torch.randint(target.vocab, (prompt,), generator=generator).tolist() for _ in range(rows)]
        self.growth = min(target.context - prompt, growth)
        self._start()

    def _start(self) -> None:
        """Begin the texts anew, and score their prompts."""
        for request in tuple(self.engine.scheduler.running):
            self.engine.abort(request)
        self.planner.setting = Setting()
        params = SamplingParams(max_tokens=self.growth, ignore_eos=True, temperature=_TEMPERATURE)
        requests = [self.engine.add(tokens, params, seed=row) for row, tokens in enumerate(self.prompts)]
        while any(not request.output for request in requests):
            self.engine.step()

    def _has_room(self) -> bool:
        running = self.engine.scheduler.running
        return len(running) == len(self.prompts) and all(request.left >= min(_LAST, self.growth // 2) for request in running)

    def sample(self, setting: Setting) -> Sample:
        """One round. A text that is full begins anew."""
        if not self._has_room():
            self._start()
        self.planner.setting = setting
        context = sum(request.scored for request in self.engine.scheduler.running)
        if self.events is not None:
            self.events.take()
        before, watch, began = self.engine.stats.copy(), Watch(), time.perf_counter()
        self.engine.step()
        spent = self.events.take() if self.events is not None else self.engine.stats.since(before).seconds
        seconds, is_clean = time.perf_counter() - began, (watch.delay() or 0.0) <= _CLEAN
        forward, draft = spent.get("score", 0.0), spent.get("draft", 0.0)
        return Sample(forward, draft, max(0.0, seconds - forward - draft), context, is_clean)


def _events(device: torch.device) -> EventClock | None:
    """What times rounds on a device; None: the engine's own clock."""
    return EventClock(lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
