"""Lanes: the engines of a server, one for each pair of a drafter and an acceptance rule, on one target. Loads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from headstart.drafters import Drafter
from headstart.engine.admission import check_prompt
from headstart.engine.engine import Engine
from headstart.engine.events import EventQueue
from headstart.engine.llm import named_drafter
from headstart.engine.memory import headroom_slots, num_slots, slot_bytes
from headstart.engine.pace import Pace
from headstart.engine.planning import cost_of, planner_for
from headstart.engine.scheduler import Request
from headstart.engine.stats import Stats
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Planner
from headstart.speculation.rules import parse_rule
from headstart.target.target import Target

if TYPE_CHECKING:
    from headstart.serve.jobs import Job

AHEAD = 64  # tokens of output for which a request has memory beforehand
NONE = "none"  # the drafter's name for plain decoding


@dataclass(eq=False)
class Lane:
    """An engine, and the jobs that run in it.

    drafter: its name for clients.
    accept: the acceptance rule's name.
    engine: of the pair.
    jobs: those that the engine has, by its requests.
    events: what its rounds gave and the worker has not read.
    num_failed: rounds that failed since the last one that counted.
    is_broken: whether even ending its requests failed; then it runs no more.
    stats: of the engine when the worker last looked.
    """

    drafter: str
    accept: str
    engine: Engine
    jobs: dict[Request, Job] = field(default_factory=dict)
    events: EventQueue = field(default_factory=EventQueue)
    num_failed: int = 0
    is_broken: bool = False
    stats: Stats = field(default_factory=Stats)

    def __repr__(self) -> str:
        return f"<Lane {self.drafter}, {self.accept}, {len(self.jobs)} jobs>"

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest text, prompt and answer, that one request may have."""
        scheduler = self.engine.scheduler
        return min(self.engine.target.context, scheduler.seating.num_slots - scheduler.headroom)

    @property
    def has_place(self) -> bool:
        """Whether the engine wants another request: its own waiting list has one at most."""
        scheduler = self.engine.scheduler
        return len(scheduler.running) + len(scheduler.waiting) <= scheduler.max_rows and len(scheduler.waiting) <= 1

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise ValueError for a request that the engine can never run."""
        check_prompt(self.engine.target, prompt, params, has_stream=True)
        self.engine.scheduler.check(Request(-1, tuple(prompt), params, 0))


@dataclass(frozen=True)
class Sizes:
    """How much runs at once, in how much memory and time. The fields are those of `Engine`; `memory` is that of all lanes.

    longest: seconds that a round may take; None: any.
    """

    max_rows: int = 8
    memory: int | None = None
    chunk: int = 256
    prefixes: int = 16
    ahead: int | None = AHEAD
    longest: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_rows", 1), ("chunk", 1), ("prefixes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def name_of(spec: str) -> str:
    """The name by which clients ask for a drafter: never a path."""
    path = Path(spec.removeprefix("model:"))
    return path.name if path.is_dir() else spec.rpartition("/")[2]


def open_lanes(
    target: Target,
    drafters: Sequence[str | None],
    rules: Sequence[str],
    sizes: Sizes,
    *,
    model: object = None,
    planner: Planner | None = None,
) -> list[Lane]:
    """The lanes of all pairs; requests that ask for none get the first.

    drafters: as `headstart.load` reads them.
    rules: as `parse_rule` reads them.
    model: as `headstart.load` takes it.
    planner: of all lanes; None: each drafter's, by measured costs where the rule allows it.
    Raises ValueError for two drafters with one name, for a time of a round in which no token can be made, and for what
    `headstart.load` refuses.
    """
    names = [NONE if spec is None else name_of(spec) for spec in drafters]
    doubles = [name for number, name in enumerate(names) if name in names[:number]]
    if doubles:
        raise ValueError(f"two drafters have the name {doubles[0]!r}, by which clients ask for them; rename a folder")
    pairs = [(number, rule) for number in range(len(drafters)) for rule in dict.fromkeys(rules)]
    lanes: list[Lane] = []
    pace = None if sizes.longest is None else Pace(cost_of(target, None), sizes.longest)
    for number, accept in pairs:
        spec, rule = drafters[number], parse_rule(accept)
        drafter = None if spec is None else named_drafter(spec, model, target, rule)
        longest = math.inf if sizes.longest is None else sizes.longest
        chosen = planner_for(target, drafter, planner if drafter else None, rule, longest)
        memory = _share(target, drafter, chosen, sizes, len(pairs))
        engine = Engine(
            target, drafter, chosen, max_rows=sizes.max_rows, memory=memory, accept=rule, chunk=sizes.chunk,
            prefixes=sizes.prefixes, ahead=sizes.ahead, pace=pace,
        )  # fmt: skip
        lanes.append(Lane(names[number], accept, engine))
    return lanes


def _share(target: Target, drafter: Drafter | None, planner: Planner | None, sizes: Sizes, num_lanes: int) -> int | None:
    """The bytes of one lane's keys and values: an equal share; None: the engine's default."""
    if num_lanes == 1:
        return sizes.memory
    if sizes.memory is not None:
        return sizes.memory // num_lanes
    size = slot_bytes(target, drafter)
    longest = target.context + headroom_slots(target, drafter, planner, sizes.max_rows)
    return size * num_slots(longest, sizes.max_rows, None, size) // num_lanes
