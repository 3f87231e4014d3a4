"""From answers of endpoints to the numbers of each, over all prompts and by prompt set. The first endpoint is the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from typing import Any

import numpy as np

from headstart.bench.endpoints.counters import of_histograms
from headstart.bench.endpoints.measure import EndpointSample, EndpointSetup, Measured
from headstart.bench.intervals import interval, ratio
from headstart.bench.latency import PERCENTILES, lengths, token_ms
from headstart.bench.loops import loop_share

Samples = list[list[EndpointSample]]  # of each task


@dataclass(frozen=True)
class EndpointRow:
    """The numbers of one endpoint at one temperature.

    run: name of the endpoint; temperature: of sampling.
    tokens, seconds: totals over all prompts, of median samples.
    tokens_per_second: throughput, over all rows.
    speed_up: ratio of tokens/s to the baseline's; interval: its 95 % confidence interval over prompts, [low, high].
    decode_speed_up: the ratio without the time to first token.
    tau: acceptance length: tokens per target forward of a request, by the engine's own count; None where it publishes none.
    tau_interval: its 95 % confidence interval over prompts, where the engine reports each answer; else without width.
    acceptance: acceptance rate by depth, as the engine publishes it.
    lengths: how many chunks brought 1 token, 2 tokens, and so on, after the first token; empty where they are not counted.
    time_to_first_token: median over answers, in seconds; first_token_ms: percentiles over answers, in milliseconds.
    token_ms: percentiles of the time per token in milliseconds, see `headstart.bench.latency`.
    loops: fraction of the words of the output that repeat themselves, see `loop_share`.
    differing: answers whose text differs from the baseline's; None at temperatures above 0.
    splits: where they differ, in words.
    kinds: by prompt set, where there are several: the numbers of each.
    """

    run: str
    temperature: float
    tokens: int
    seconds: float
    tokens_per_second: float
    speed_up: float
    interval: list[float]
    decode_speed_up: float
    tau: float | None
    tau_interval: list[float]
    acceptance: list[float]
    lengths: list[int]
    time_to_first_token: float
    first_token_ms: dict[str, float]
    token_ms: dict[str, float]
    loops: float
    differing: int | None
    splits: list[str]
    kinds: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def identical(self) -> str:
        """Whether the text is the baseline's, in words."""
        if self.differing is None:
            return "n/a"
        return f"{self.differing} differ" if self.differing else "yes"


def rows(measured: Measured, names: Sequence[str]) -> list[EndpointRow]:
    """One row per endpoint, the baseline first. names: of the endpoints; each has answered some prompt that all have answered."""
    usable = measured.usable(names)
    per_run = {name: _by_task([sample for sample in usable if sample.run == name]) for name in names}
    return [_row(measured, name, per_run[name], per_run[names[0]]) for name in names]


def _by_task(samples: Sequence[EndpointSample]) -> Samples:
    tasks: dict[int, list[EndpointSample]] = {}
    for sample in samples:
        tasks.setdefault(sample.task, []).append(sample)
    return [some for _, some in sorted(tasks.items())]


def _row(measured: Measured, name: str, own: Samples, base: Samples) -> EndpointRow:
    setup, speculation = measured.setup, measured.speculation.get(name)
    numbers = _numbers(own, base)
    del numbers["num_prompts"]
    published = {"tau": speculation.tau, "acceptance": list(speculation.acceptance)} if speculation else {}
    splits = None if setup.params.temperature > 0 else _splits(setup, own, base)
    base_decoding = _rate(base, is_decoding=True)
    return EndpointRow(
        run=name,
        temperature=setup.params.temperature,
        tokens=sum(_tokens(own)),
        seconds=sum(_seconds(own)),
        decode_speed_up=_rate(own, is_decoding=True) / base_decoding if base_decoding else 0.0,
        loops=_loops(own),
        differing=None if splits is None else len(splits),
        splits=splits or [],
        kinds=_kinds(setup, own, base),
        **(numbers | published),
    )


def _kinds(setup: EndpointSetup, own: Samples, base: Samples) -> dict[str, dict[str, Any]]:
    kinds = list(dict.fromkeys(setup.tasks[samples[0].task].kind for samples in own))
    if len(kinds) == 1:
        return {}
    return {kind: _numbers(_of_kind(setup, own, kind), _of_kind(setup, base, kind)) for kind in kinds}


def _of_kind(setup: EndpointSetup, tasks: Samples, kind: str) -> Samples:
    return [samples for samples in tasks if setup.tasks[samples[0].task].kind == kind]


def _numbers(own: Samples, base: Samples) -> dict[str, Any]:
    """What is known of every prompt set and of all of them together."""
    replies = [sample.reply for samples in own for sample in samples]
    bursts = list(chain.from_iterable(reply.bursts for reply in replies))
    firsts = [sample.first_token_seconds for samples in own for sample in samples]
    return {
        "tokens_per_second": _rate(own),
        "speed_up": _rate(own) / (_rate(base) or 1.0),
        "interval": _speed_up_interval(own, base),
        **_speculation(own),
        "lengths": lengths(bursts) if all(reply.is_counted for reply in replies) else [],
        "token_ms": token_ms(bursts),
        "time_to_first_token": median(firsts),
        "first_token_ms": {name: 1000 * float(np.percentile(firsts, share)) for name, share in PERCENTILES.items()},
        "num_prompts": len(own),
    }


def _speculation(own: Samples) -> dict[str, Any]:
    """tau of answers that report their rounds one by one; without them it is not known."""
    speculation = of_histograms(sample.reply.histogram for samples in own for sample in samples)
    if speculation is None:
        return {"tau": None, "tau_interval": [0.0, 0.0], "acceptance": []}
    rounds = [sum(sum(sample.reply.histogram) for sample in samples) for samples in own]
    tokens = [sum((kept + 1) * n for sample in samples for kept, n in enumerate(sample.reply.histogram)) for samples in own]
    return {"tau": speculation.tau, "tau_interval": interval(ratio, tokens, rounds), "acceptance": list(speculation.acceptance)}


def _speed_up_interval(own: Samples, base: Samples) -> list[float]:
    """The confidence interval of the ratio of total tokens per total time, over prompts."""
    columns = _tokens(own), _seconds(own), _tokens(base), _seconds(base)
    return interval(lambda mine, spent, theirs, past: ratio(mine * past, spent * theirs), *columns)


def _tokens(tasks: Samples) -> list[int]:
    """The number of tokens of each task's answer; where repetitions differ, the median."""
    return [round(median(sample.reply.num_tokens for sample in samples)) for samples in tasks]


def _seconds(tasks: Samples, is_decoding: bool = False) -> list[float]:
    """The median time of each task, in total or after the first token."""
    return [median(s.seconds - s.prompt_seconds if is_decoding else s.seconds for s in samples) for samples in tasks]


def _rate(tasks: Samples, is_decoding: bool = False) -> float:
    """Total tokens over total time."""
    return (sum(_tokens(tasks)) - is_decoding * len(tasks)) / (sum(_seconds(tasks, is_decoding)) or 1.0)


def _loops(tasks: Samples) -> float:
    words = [samples[0].reply.text.split() for samples in tasks]
    return sum(loop_share(some) * len(some) for some in words) / max(1, sum(map(len, words)))


def _splits(setup: EndpointSetup, own: Samples, base: Samples) -> list[str]:
    """Where the texts of the first repetition differ from the baseline's."""
    splits: list[str] = []
    for mine, theirs in zip(own, base, strict=True):
        text, expected = mine[0].reply.text, theirs[0].reply.text
        if text != expected:
            index = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), min(len(text), len(expected)))
            splits.append(
                f"prompt {mine[0].task + 1}, character {index}: {text[index : index + 12]!r}, not {expected[index : index + 12]!r}"
            )
    return splits


def as_lines(setup: EndpointSetup, samples: Sequence[EndpointSample]) -> list[Mapping[str, Any]]:
    """The samples for a JSONL file."""
    return [
        {
            "prompt": setup.tasks[sample.task].prompt,
            "category": setup.tasks[sample.task].kind,
            "task": sample.task,
            "run": sample.run,
            "repeat": sample.repeat,
            "temperature": setup.params.temperature,
            "rows": setup.rows,
            "seed": (setup.params_of(sample.task).seed or 0) % 2**31,
            "num_tokens": sample.reply.num_tokens,
            "seconds": sample.seconds,
            "time_to_first_token": sample.first_token_seconds,
            "bursts": sample.reply.bursts,
            "text": sample.reply.text,
        }
        for sample in samples
    ]
