"""From samples to results: one row per run, as tables for people and as JSON for machines.

The results name what they depend on: machine, versions, model, prompts, sampling, command, and how much of the output repeats
itself, which flatters every drafter.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

import headstart
from headstart.bench.identity import Split, find_split
from headstart.bench.loops import loop_share
from headstart.bench.runner import PLAIN, Sample, Setup
from headstart.engine.machine import cpu_name
from headstart.engine.stats import Stats
from headstart.speculation.rules import parse_rule
from headstart.target.target import Target


@dataclass(frozen=True)
class Row:
    """The numbers of one run at one temperature.

    run: its name; temperature: of sampling.
    tokens, seconds: totals over all prompts, of median samples.
    tokens_per_second: throughput.
    speed_up: ratio of tokens/s to plain decoding's.
    median_speed_up: median of that ratio over prompts.
    decode_speed_up: the ratio without the time to first token.
    tau: acceptance length: tokens per target forward.
    acceptance: acceptance rate by depth.
    forward: time of a target forward relative to plain decoding's.
    nodes: scored per forward.
    shares: fraction of the time after the first token, by part of a round.
    loops: fraction of the output that repeats itself, see `loop_share`.
    differing: answers that differ from plain decoding's; None where the acceptance rule does not promise the same text.
    near_ties: those of them that rounding explains; None likewise.
    splits: where they differ, in words.
    is_lossy: whether even the distribution differs.
    kinds: speed-up and tau by prompt set, where there are several.
    """

    run: str
    temperature: float
    tokens: int
    seconds: float
    tokens_per_second: float
    speed_up: float
    median_speed_up: float
    decode_speed_up: float
    tau: float
    acceptance: list[float]
    forward: float
    nodes: float
    shares: dict[str, float]
    loops: float
    differing: int | None
    near_ties: int | None
    splits: list[str]
    is_lossy: bool = False
    kinds: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def identical(self) -> str:
        """Whether the text is plain decoding's, in words."""
        if self.differing is None:
            return "lossy" if self.is_lossy else "in distribution"
        return "yes" if not self.differing else f"{self.differing} differ, {self.near_ties} near-ties"


def rows(setup: Setup, samples: Sequence[Sample]) -> list[Row]:
    """One row per run, plain decoding first."""
    names = list(dict.fromkeys(sample.run for sample in samples))
    per_task = {name: _by_task([sample for sample in samples if sample.run == name]) for name in names}
    return [_row(setup, name, per_task[name], per_task[PLAIN]) for name in names]


def _by_task(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The clean samples of each task, or all of them where none is clean."""
    tasks: dict[int, list[Sample]] = {}
    for sample in samples:
        tasks.setdefault(sample.task, []).append(sample)
    return [[sample for sample in every if sample.is_clean] or every for _, every in sorted(tasks.items())]


def _row(setup: Setup, name: str, own: list[list[Sample]], plain: list[list[Sample]]) -> Row:
    tokens = sum(len(samples[0].tokens) for samples in own)
    seconds = sum(_seconds(own))
    rate, base = _rate(own), _rate(plain)
    decoding, plain_decoding = _rate(own, is_decoding=True), _rate(plain, is_decoding=True)
    ratios = [_rate([mine]) / _rate([theirs]) for mine, theirs in zip(own, plain, strict=True)]
    total, reference = _total(own), _total(plain)
    splits = _splits(setup, own, plain)
    return Row(
        run=name,
        temperature=setup.params.temperature,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=rate,
        speed_up=rate / base,
        median_speed_up=median(ratios),
        decode_speed_up=decoding / plain_decoding if plain_decoding else 0.0,
        tau=total.tau,
        acceptance=total.acceptance,
        forward=_per_round(total, "score") / (_per_round(reference, "score") or 1.0),
        nodes=total.nodes / max(1, total.rounds),
        shares={share: spent / (sum(total.seconds.values()) or 1.0) for share, spent in total.seconds.items()},
        loops=sum(loop_share(s[0].tokens) * len(s[0].tokens) for s in own) / max(1, tokens),
        differing=None if splits is None else len(splits),
        near_ties=None if splits is None else sum(split.is_near_tie for split in splits),
        splits=[str(split) for split in splits or ()],
        is_lossy=name != PLAIN and parse_rule(setup.accept).is_lossy,
        kinds=_kinds(setup, own, plain),
    )


def _kinds(setup: Setup, own: list[list[Sample]], plain: list[list[Sample]]) -> dict[str, dict[str, float]]:
    kinds = list(dict.fromkeys(task.kind for task in setup.tasks))
    if len(kinds) == 1:
        return {}
    numbers: dict[str, dict[str, float]] = {}
    for kind in kinds:
        mine, theirs = ([samples for samples in tasks if setup.tasks[samples[0].task].kind == kind] for tasks in (own, plain))
        numbers[kind] = {"speed_up": _rate(mine) / _rate(theirs), "tau": _total(mine).tau}
    return numbers


def _seconds(tasks: list[list[Sample]], is_decoding: bool = False) -> list[float]:
    """The median time of each task, in total or after the first token."""
    return [median(s.seconds - s.prompt_seconds if is_decoding else s.seconds for s in samples) for samples in tasks]


def _rate(tasks: list[list[Sample]], is_decoding: bool = False) -> float:
    """Total tokens over total time."""
    tokens = sum(len(samples[0].tokens) - is_decoding for samples in tasks)
    return tokens / (sum(_seconds(tasks, is_decoding)) or 1.0)


def _total(tasks: list[list[Sample]]) -> Stats:
    return Stats.total([sample.stats for samples in tasks for sample in samples])


def _per_round(stats: Stats, share: str) -> float:
    return stats.seconds[share] / max(1, stats.rounds)


def _splits(setup: Setup, own: list[list[Sample]], plain: list[list[Sample]]) -> list[Split] | None:
    """The differences from plain decoding's answers; None where the acceptance rule does not promise the same text."""
    if setup.accept != "coupled" and setup.params.temperature > 0:
        return None
    splits: list[Split] = []
    for mine, theirs in zip(own, plain, strict=True):
        task = mine[0].task
        expected, actual = theirs[0].tokens, mine[0].tokens
        split = find_split(setup.target, setup.tasks[task].prompt, setup.params_of(task), expected, actual)
        splits += [split] if split else []
    return splits


# -- what it depends on -----------------------------------------------------------------------------------------------------


def machine(target: Target) -> dict[str, Any]:
    """Hardware, versions and the command."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else "cpu",
        "kernels": target.instructions or "torch",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "headstart": headstart.__version__,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def labels(setup: Setup) -> list[str]:
    """What qualifies the numbers: equality to the bit, replay, a padded target, a rule that changes the distribution."""
    applies_by_label = {
        "exact": setup.target.is_exact,
        "replay": setup.is_replay,
        "padded": is_padded(setup.target),
        "lossy": parse_rule(setup.accept).is_lossy,
    }
    return [label for label, applies in applies_by_label.items() if applies]


def is_padded(target: Target) -> bool:
    """Whether the target is widened with zeros: the text of a small model at the cost of a large one."""
    weight: torch.Tensor = target.model.get_input_embeddings().weight  # type: ignore[assignment]
    return not bool(weight[:, -1].any())


def clean_share(samples: Sequence[Sample]) -> float | None:
    """The fraction of samples that hardly waited for a processor; None where the system does not count it."""
    known = [sample.is_clean for sample in samples if sample.delay is not None]
    return sum(known) / len(known) if known else None


def as_json(setup: Setup, samples: Sequence[Sample], rows: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """All results and what they depend on. settings: of the command, added to the setup's."""
    target = setup.target
    return {
        "model": {
            "name": target.name,
            "dtype": str(target.dtype).removeprefix("torch."),
            "context": target.context,
            "exact": target.is_exact,
            "why_not_exact": target.kernel_choice.why_not if target.kernel_choice else None,
        },
        "machine": machine(target),
        "settings": settings | {"accept": setup.accept, "num_prompts": len(setup.tasks)},
        "labels": labels(setup),
        "num_samples": len(samples),
        "clean_share": clean_share(samples),
        "runs": [vars(row) | {"identical": row.identical} for row in rows],
    }


# -- for people -------------------------------------------------------------------------------------------------------------


def short(run: str) -> str:
    """The name of a run without the parents of its folder: `model:a/b@chain:4` becomes `model:b@chain:4`, `a/b` becomes `b`."""
    return re.sub(r"^(\w+:)?(?:.*/)?([^/@]+)/*(?=@|$)", r"\1\2", run)


Column = tuple[str, Callable[[Row], str]]
_SHORT: tuple[Column, ...] = (
    ("run", lambda row: short(row.run)),
    ("tokens/s", lambda row: f"{row.tokens_per_second:.1f}"),
    ("speed-up", lambda row: f"{row.speed_up:.2f}x"),
    ("tau\n(acceptance\nlength)", lambda row: f"{row.tau:.2f}"),
    ("identical", lambda row: row.identical),
)
_LONG: tuple[Column, ...] = (
    *_SHORT[:3],
    ("median over\nprompts", lambda row: f"{row.median_speed_up:.2f}x"),
    ("after first\ntoken", lambda row: f"{row.decode_speed_up:.2f}x"),
    _SHORT[3],
    ("acceptance rate\nby depth", lambda row: " ".join(f"{share:.2f}"[1:] if share < 1 else "1.0" for share in row.acceptance[:6])),
    ("nodes per\nforward", lambda row: f"{row.nodes:.1f}"),
    ("forward\ntime", lambda row: f"{row.forward:.2f}x"),
    ("draft/score/verify/\ncommit/host %", lambda row: "/".join(f"{100 * share:.0f}" for share in row.shares.values())),
    ("loops", lambda row: f"{row.loops:.0%}"),
    _SHORT[4],
)
_TEMPERATURE: Column = ("T", lambda row: f"{row.temperature:g}")


def table(rows: Sequence[Row], title: str, is_short: bool = False) -> Table:
    """One line per run, and per temperature where there are several. is_short: leave out all but speed, tau and identity."""
    run, *rest = _SHORT if is_short else _LONG
    columns = (run, *([_TEMPERATURE] if len({row.temperature for row in rows}) > 1 else []), *rest)
    result = Table(title=title, title_justify="left")
    for name, _ in columns:
        result.add_column(name, justify="left" if name in ("run", "identical") else "right", overflow="fold")
    for row in rows:
        result.add_row(*(write(row) for _, write in columns))
    return result


def table_by_kind(rows: Sequence[Row]) -> Table:
    """One line per run, temperature and prompt set."""
    result = Table(title="by prompt set", title_justify="left")
    for name in ("run", "prompts", "T", "speed-up", "tau (acceptance length)"):
        result.add_column(name, justify="left" if name in ("run", "prompts") else "right", overflow="fold")
    for row in rows:
        for kind, numbers in row.kinds.items():
            result.add_row(short(row.run), kind, f"{row.temperature:g}", f"{numbers['speed_up']:.2f}x", f"{numbers['tau']:.2f}")
    return result
