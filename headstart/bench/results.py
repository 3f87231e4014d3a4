"""From samples to results: the numbers of each run, over all prompts and by prompt set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from typing import Any

from headstart.bench import peers
from headstart.bench.identity import Split, find_split
from headstart.bench.intervals import interval, ratio
from headstart.bench.latency import Burst, lengths, token_ms
from headstart.bench.loops import loop_share
from headstart.bench.samples import PLAIN, Sample, Setup, by_task
from headstart.engine.stats import Stats
from headstart.speculation.rules import parse_rule

Samples = list[list[Sample]]  # of each task


@dataclass(frozen=True)
class Row:
    """The numbers of one run at one temperature.

    run: its name; temperature: of sampling.
    tokens, seconds: totals over all prompts, of median samples.
    tokens_per_second: throughput, over all rows.
    speed_up: ratio of tokens/s to plain decoding's.
    interval: its 95 % confidence interval over prompts, [low, high].
    median_speed_up: median of that ratio over prompts.
    decode_speed_up: the ratio without the time to first token.
    tau: acceptance length: tokens per target forward.
    tau_interval: its 95 % confidence interval over prompts.
    acceptance: acceptance rate by depth.
    lengths: how many rounds of a row emitted 1 token, 2 tokens, and so on; those after the first token.
    forward: time of a target forward relative to plain decoding's: the cost of verification.
    nodes: scored per forward.
    shares: fraction of the time after the first token, by part of a round.
    time_to_first_token: median over answers, in seconds.
    token_ms: percentiles of the time per token in milliseconds, see `headstart.bench.latency`.
    loops: fraction of the output that repeats itself, see `loop_share`.
    differing: answers that differ from plain decoding's; None where the acceptance rule does not promise the same text.
    near_ties: those of them that rounding explains; None likewise.
    splits: where they differ, in words.
    is_lossy: whether even the distribution differs.
    is_peer: whether it is another library's decoding.
    memory: bytes of weights ("heads") and of keys and values ("cache"); of a peer, "copy": its own copy of the target.
    kinds: by prompt set, where there are several: speed_up, interval, tau, tau_interval, tokens_per_second, acceptance, lengths,
        token_ms, time_to_first_token, num_prompts.
    """

    run: str
    temperature: float
    tokens: int
    seconds: float
    tokens_per_second: float
    speed_up: float
    interval: list[float]
    median_speed_up: float
    decode_speed_up: float
    tau: float
    tau_interval: list[float]
    acceptance: list[float]
    lengths: list[int]
    forward: float
    nodes: float
    shares: dict[str, float]
    time_to_first_token: float
    token_ms: dict[str, float]
    loops: float
    differing: int | None
    near_ties: int | None
    splits: list[str]
    is_lossy: bool = False
    is_peer: bool = False
    memory: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def identical(self) -> str:
        """Whether the text is plain decoding's, in words."""
        if self.differing is None:
            return "n/a" if self.is_peer else "lossy" if self.is_lossy else "in distribution"
        return "yes" if not self.differing else f"{self.differing} differ, {self.near_ties} near-ties"


def rows(setup: Setup, samples: Sequence[Sample], memory: Mapping[str, Mapping[str, int]] | None = None) -> list[Row]:
    """One row per run, plain decoding first and peers last. memory: of each run, in bytes, as in `Row`; None: not known."""
    names = list(dict.fromkeys(sample.run for sample in samples))
    per_task = {name: by_task([sample for sample in samples if sample.run == name]) for name in names}
    known = memory or {}
    return [_row(setup, name, per_task[name], per_task[PLAIN], known.get(name, {})) for name in names]


def _row(setup: Setup, name: str, own: Samples, plain: Samples, memory: Mapping[str, int]) -> Row:
    total, reference = _total(own), _total(plain)
    tokens = sum(_tokens(own))
    plain_decoding = _rate(plain, is_decoding=True)
    splits = _splits(setup, own, plain)
    numbers = _numbers(own, plain)
    del numbers["num_prompts"]
    return Row(
        run=name,
        temperature=setup.params.temperature,
        tokens=tokens,
        seconds=sum(_seconds(own)),
        median_speed_up=median(_rate([mine]) / _rate([theirs]) for mine, theirs in zip(own, plain, strict=True)),
        decode_speed_up=_rate(own, is_decoding=True) / plain_decoding if plain_decoding else 0.0,
        forward=_per_round(total, "score") / (_per_round(reference, "score") or 1.0),
        nodes=total.nodes / max(1, total.rounds),
        shares={share: spent / (sum(total.seconds.values()) or 1.0) for share, spent in total.seconds.items()},
        loops=sum(loop_share(s[0].tokens) * len(s[0].tokens) for s in own) / max(1, tokens),
        differing=None if splits is None else len(splits),
        near_ties=None if splits is None else sum(split.is_near_tie for split in splits),
        splits=[str(split) for split in splits or ()],
        is_lossy=name != PLAIN and not peers.is_peer(name) and parse_rule(setup.accept).is_lossy,
        is_peer=peers.is_peer(name),
        memory={"heads": 0, "cache": 0, **memory},
        kinds=_kinds(setup, own, plain),
        **numbers,
    )


def _kinds(setup: Setup, own: Samples, plain: Samples) -> dict[str, dict[str, Any]]:
    kinds = list(dict.fromkeys(task.kind for task in setup.tasks))
    if len(kinds) == 1:
        return {}
    return {kind: _numbers(_of_kind(setup, own, kind), _of_kind(setup, plain, kind)) for kind in kinds}


def _of_kind(setup: Setup, tasks: Samples, kind: str) -> Samples:
    return [samples for samples in tasks if setup.tasks[samples[0].task].kind == kind]


def _numbers(own: Samples, plain: Samples) -> dict[str, Any]:
    """What is known of every prompt set and of all of them together."""
    total, bursts = _total(own), _bursts(own)
    return {
        "tokens_per_second": _rate(own),
        "speed_up": _rate(own) / _rate(plain),
        "interval": speed_up_interval(own, plain),
        "tau": total.tau,
        "tau_interval": _tau_interval(own),
        "acceptance": total.acceptance,
        "lengths": lengths(bursts),
        "token_ms": token_ms(bursts),
        "time_to_first_token": median(sample.first_token_seconds for samples in own for sample in samples),
        "num_prompts": len(own),
    }


def speed_up_interval(own: Samples, plain: Samples) -> list[float]:
    """The confidence interval of the ratio of total tokens per total time, over prompts."""
    columns = _tokens(own), _seconds(own), _tokens(plain), _seconds(plain)
    return interval(lambda mine, spent, theirs, base: ratio(mine * base, spent * theirs), *columns)


def _tau_interval(own: Samples) -> list[float]:
    """The confidence interval of tokens per row round, over prompts."""
    stats = [_total([samples]) for samples in own]
    return interval(ratio, [one.tokens for one in stats], [one.row_rounds for one in stats])


def _tokens(tasks: Samples) -> list[int]:
    return [len(samples[0].tokens) for samples in tasks]


def _seconds(tasks: Samples, is_decoding: bool = False) -> list[float]:
    """The median time of each task, in total or after the first token."""
    return [median(s.seconds - s.prompt_seconds if is_decoding else s.seconds for s in samples) for samples in tasks]


def _rate(tasks: Samples, is_decoding: bool = False) -> float:
    """Total tokens over total time."""
    return (sum(_tokens(tasks)) - is_decoding * len(tasks)) / (sum(_seconds(tasks, is_decoding)) or 1.0)


def _total(tasks: Samples) -> Stats:
    return Stats.total([sample.stats for samples in tasks for sample in samples])


def _bursts(tasks: Samples) -> list[Burst]:
    return list(chain.from_iterable(sample.bursts for samples in tasks for sample in samples))


def _per_round(stats: Stats, share: str) -> float:
    return stats.seconds[share] / max(1, stats.rounds)


def _splits(setup: Setup, own: Samples, plain: Samples) -> list[Split] | None:
    """The differences from plain decoding's answers; None where neither acceptance rule nor noise promise the same text."""
    is_other_noise = setup.accept != "coupled" or peers.is_peer(own[0][0].run)
    if is_other_noise and setup.params.temperature > 0:
        return None
    splits: list[Split] = []
    for mine, theirs in zip(own, plain, strict=True):
        task = mine[0].task
        expected, actual = theirs[0].tokens, mine[0].tokens
        split = find_split(setup.target, setup.tasks[task].prompt, setup.params_of(task), expected, actual)
        splits += [split] if split else []
    return splits
