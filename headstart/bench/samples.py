"""What is measured: tasks, what all runs share, and the samples that come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from headstart.engine.stats import Stats
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams
from headstart.target.target import Target

PLAIN = "plain"
CLEAN = 0.02  # fraction of its time that a clean sample may have waited for a processor


@dataclass(frozen=True)
class Task:
    """A prompt to answer.

    prompt: token ids.
    reference: token ids of the answer to replay, or None.
    kind: name of the prompt set, or of the prompt's category.
    text: the prompt as its author wrote it; the last message of a conversation.
    """

    prompt: tuple[int, ...]
    reference: tuple[int, ...] | None = None
    kind: str = ""
    text: str = ""


@dataclass(frozen=True)
class Setup:
    """What all runs share.

    params: sampling and max_tokens; the seed of task `i` is `mix(seed, i)`.
    stop_ids: tokens that end an answer.
    accept: acceptance rule, as `parse_rule` reads it.
    is_replay: whether the references replace the target's tokens.
    rows: requests that run at once.
    """

    target: Target
    tasks: tuple[Task, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    accept: str = "coupled"
    is_replay: bool = False
    rows: int = 1

    def params_of(self, task: int) -> SamplingParams:
        """The sampling parameters of a task, with its seed. A replay ends where its reference ends."""
        params = replace(self.params, seed=mix(self.params.seed or 0, task))
        if not self.is_replay:
            return params
        reference = self.tasks[task].reference or ()
        return replace(params, max_tokens=min(params.max_tokens, len(reference)), ignore_eos=True)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return max(len(task.prompt) + self.params_of(index).max_tokens for index, task in enumerate(self.tasks))


@dataclass(frozen=True)
class Sample:
    """One answer by one run.

    Where several requests run at once, each has an equal share of the time of every round, so that the samples' times sum to the
    time that passed.

    run: name of the run.
    task: index of the task.
    tokens: token ids of the answer.
    seconds: total time, its share.
    prompt_seconds: the part of `seconds` until the first token.
    stats: of the rounds after the first token.
    delay: fraction of the time that the process waited for a processor; None where the system does not count it.
    first_token_seconds: time that passed from the request to its first token.
    bursts: of each round after the first token that emitted something: (tokens, seconds that passed since the tokens before).
    repeat: number of the measurement, from 0.
    """

    run: str
    task: int
    tokens: tuple[int, ...]
    seconds: float
    prompt_seconds: float
    stats: Stats
    delay: float | None
    first_token_seconds: float = 0.0
    bursts: tuple[tuple[int, float], ...] = ()
    repeat: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether the process hardly waited for a processor."""
        return self.delay is not None and self.delay <= CLEAN


def by_task(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The clean samples of each task, or all of them where none is clean."""
    tasks: dict[int, list[Sample]] = {}
    for sample in samples:
        tasks.setdefault(sample.task, []).append(sample)
    return [[sample for sample in every if sample.is_clean] or every for _, every in sorted(tasks.items())]


def as_line(setup: Setup, sample: Sample, text: str) -> dict[str, Any]:
    """A sample for a JSONL file. text: of its answer."""
    task = setup.tasks[sample.task]
    return {
        "prompt": task.text,
        "category": task.kind,
        "task": sample.task,
        "run": sample.run,
        "repeat": sample.repeat,
        "temperature": setup.params.temperature,
        "rows": setup.rows,
        "seed": setup.params_of(sample.task).seed,
        "tokens": sample.tokens,
        "seconds": sample.seconds,
        "time_to_first_token": sample.first_token_seconds,
        "delay": sample.delay,
        "text": text,
    }
