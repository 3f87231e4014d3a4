"""The speed that is achieved: several settings decode the same prompts in turn, with a number of rows at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headstart.bench.calibrate import DecodeTrial
from headstart.drafters import Drafter
from headstart.engine.engine import Engine
from headstart.engine.memory import headroom_slots, slot_bytes
from headstart.engine.waiting import waiting_seconds
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Planner
from headstart.speculation.reliability import Reliability

_FEW_ROWS = 4
CLEAN = 0.05  # fraction of its time that a round may have waited for a processor


@dataclass
class Speed:
    """Rounds in which all rows decoded.

    rows: of each round.
    rounds: (tokens, seconds, whether the process hardly waited for a processor) of each.
    reliability: of the chances of all drafts.
    """

    rows: int
    rounds: list[tuple[int, float, bool]] = field(default_factory=list)
    reliability: Reliability = field(default_factory=Reliability)

    @property
    def tokens_per_second(self) -> float:
        """Mean tokens of all rounds over mean seconds of the undisturbed ones, or of all where none is; 0 without rounds."""
        times = [seconds for _, seconds, is_clean in self.rounds if is_clean] or [seconds for _, seconds, _ in self.rounds]
        return sum(tokens for tokens, _, _ in self.rounds) / len(self.rounds) * len(times) / sum(times) if times else 0.0

    @property
    def tau(self) -> float:
        """Acceptance length: tokens per target forward and row."""
        return sum(tokens for tokens, _, _ in self.rounds) / (self.rows * len(self.rounds)) if self.rounds else 0.0


def num_turns(num_prompts: int, rows: int) -> int:
    """How often each setting decodes a batch: every prompt at least once, and few requests at once at least twice."""
    return max(2 if rows <= _FEW_ROWS else 1, -(-num_prompts // _batch(rows)))


def _batch(rows: int) -> int:
    """Requests of a turn: enough that most rounds have all rows."""
    return 1 if rows == 1 else 2 * rows


def measure_speeds(
    trial: DecodeTrial,
    settings: Mapping[str, tuple[Drafter | None, Planner | None]],
    temperature: float,
    rows: int,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Speed]:
    """The speed of each setting, interleaved: in each turn, every one decodes the same requests.

    settings: drafter and planner, by name; plain decoding has neither.
    rows: requests that decode at once.
    on_progress: called after each turn, `num_turns` times.
    """
    speeds = {name: Speed(rows) for name in settings}
    for turn in range(num_turns(len(trial.prompts), rows)):
        requests = range(turn * _batch(rows), (turn + 1) * _batch(rows))
        for name, (drafter, planner) in settings.items():
            _decode(trial, drafter, planner, temperature, requests, speeds[name])
        on_progress()
    return speeds


def _decode(
    trial: DecodeTrial, drafter: Drafter | None, planner: Planner | None, temperature: float, requests: Iterable[int], speed: Speed
) -> None:
    """Decode requests, and add the rounds in which every row decodes. requests: their numbers; prompts repeat with other seeds."""
    engine = _engine(trial, drafter, planner, speed.rows)
    for index in requests:
        params = SamplingParams(max_tokens=trial.max_tokens, temperature=temperature, seed=mix(trial.seed, index))
        engine.add(trial.prompts[index % len(trial.prompts)], params, stop_ids=trial.stop_ids)
    while not engine.is_idle:
        running = engine.scheduler.running
        is_steady = len(running) == speed.rows and all(request.output for request in running)
        before, waited, began = engine.stats.tokens, waiting_seconds(), time.perf_counter()
        engine.step()
        seconds, now = time.perf_counter() - began, waiting_seconds()
        is_clean = waited is None or now is None or now - waited <= CLEAN * seconds
        if is_steady:
            speed.rounds.append((engine.stats.tokens - before, seconds, is_clean))
    speed.reliability = sum(engine.learning.reliability.values(), speed.reliability)


def _engine(trial: DecodeTrial, drafter: Drafter | None, planner: Planner | None, rows: int) -> Engine:
    longest = max(map(len, trial.prompts)) + trial.max_tokens + headroom_slots(trial.target, drafter, planner, rows)
    return Engine(trial.target, drafter, planner, max_rows=rows, memory=rows * longest * slot_bytes(trial.target, drafter))


def split(prompts: Sequence[tuple[int, ...]]) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Prompts to measure with, and every fourth, at least one, held out; a single prompt is in both."""
    if len(prompts) == 1:
        return tuple(prompts), tuple(prompts)
    held_out = set(range(min(3, len(prompts) - 1), len(prompts), 4))
    return (
        tuple(prompt for index, prompt in enumerate(prompts) if index not in held_out),
        tuple(prompt for index, prompt in enumerate(prompts) if index in held_out),
    )
