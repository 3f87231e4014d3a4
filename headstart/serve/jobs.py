"""Jobs: the answers that clients wait for, and the updates that they get. Must not import FastAPI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headstart.engine.drawn_tree import DrawnTree
from headstart.engine.scheduler import Request, Stream
from headstart.engine.stats import Part
from headstart.speculation.constraints import Constraint
from headstart.speculation.params import SamplingParams

if TYPE_CHECKING:
    from headstart.serve.lanes import Lane

Logprob = tuple[float, dict[int, float]]  # of a token, and of the best alternatives by token id


@dataclass(eq=False)
class Job:
    """One answer to be made.

    lane: where it runs.
    prompt: token ids.
    params: how to sample and where to stop.
    seed: of the noise.
    stream: turns its tokens into text.
    mailbox: where its updates go.
    index: its number in the client's request.
    user: whose turn in the queue it takes.
    stop_ids: tokens that end the answer.
    drafts: whether the lane's drafter drafts for it.
    leader: another job with the same prompt, which comes before it; or None.
    constraint: which tokens may follow its output; None: any.
    draws_trees: whether its updates have the trees of their rounds.
    arrived: when the client asked, by `time.perf_counter`.

    The rest is the worker's:
    request: of the engine; None while the job waits in the queue.
    seated: when it first had a row in a round; None before.
    num_cached: tokens of the prompt whose keys and values were copied from another text.
    spoke: when it last had new tokens; None before the first.
    num_tokens: number of tokens of its answer so far.
    failure: why it is ended, for an update; None: it is not, or nobody wants to know.
    """

    lane: Lane
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    stream: Stream
    mailbox: Mailbox
    index: int = 0
    user: str = ""
    stop_ids: tuple[int, ...] = ()
    drafts: bool = True
    leader: Job | None = None
    constraint: Constraint | None = None
    draws_trees: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    request: Request | None = None
    seated: float | None = None
    num_cached: int = 0
    spoke: float | None = None
    num_tokens: int = 0
    failure: Exception | None = None


@dataclass(frozen=True)
class Update:
    """What a round gave to a job.

    tokens: new token ids.
    guessed: per token, whether a drafter had proposed it.
    text: what became final with them.
    logprobs: per token its log-probability and those of the best alternatives; None if not asked for.
    finish_reason: set in the last update only: "stop", "length" or "error".
    error: why it ended with "error".
    rounds: in the last update, the job's part in each round.
    num_cached: tokens of the prompt whose keys and values were copied from another text.
    tree: of the round, where the job asked for it.
    """

    job: Job
    tokens: tuple[int, ...] = ()
    guessed: tuple[bool, ...] = ()
    text: str = ""
    logprobs: tuple[Logprob, ...] | None = None
    finish_reason: str | None = None
    error: Exception | None = None
    rounds: Sequence[Part] = ()
    num_cached: int = 0
    tree: DrawnTree | None = None


class Mailbox:
    """The updates of one client's jobs, in order. Only for the thread of the event loop."""

    def __init__(self) -> None:
        self._updates: asyncio.Queue[Update] = asyncio.Queue()

    def put(self, update: Update) -> None:
        """Add an update."""
        self._updates.put_nowait(update)

    async def take(self) -> list[Update]:
        """All updates that are there; waits for the first."""
        updates = [await self._updates.get()]
        while not self._updates.empty():
            updates.append(self._updates.get_nowait())
        return updates
