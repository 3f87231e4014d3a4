"""From samples to numbers that can be claimed: one row per run, a table for people, a line of JSON for machines.

A number stands beside what it depends on: machine, versions, model, prompts, sampling, command, and how much of the output is a
loop, for loops flatter every drafter.
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
from headstart.bench.runner import PLAIN, Sample, Setup
from headstart.engine.stats import Stats
from headstart.speculation.rules import parse_rule
from headstart.target.target import Target

NGRAM = 8


@dataclass(frozen=True)
class Row:
    """One run's numbers at one temperature.

    speed_up: ratio of tokens/s; median_speed_up: median over prompts; decode_speed_up: without the time until the first token.
    forward: seconds of a target forward over those of plain decoding; nodes: scored in it. shares: of the time after the first
    token. differing: answers unlike plain's, near_ties: those of them that a rounding explains; both None where the rule does not
    promise the same text. is_lossy: nor even the same law. kinds: speed-up and tau by prompt set, where there are several.
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
        """For people."""
        if self.differing is None:
            return "lossy" if self.is_lossy else "in law"
        return "yes" if not self.differing else f"{self.differing} differ, {self.near_ties} near-ties"


def rows(setup: Setup, samples: Sequence[Sample]) -> list[Row]:
    """One row per run, plain first."""
    names = list(dict.fromkeys(sample.run for sample in samples))
    per_task = {name: _by_task([sample for sample in samples if sample.run == name]) for name in names}
    return [_row(setup, name, per_task[name], per_task[PLAIN]) for name in names]


def _by_task(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Per task the samples to be trusted: clean ones where there are some."""
    tasks: dict[int, list[Sample]] = {}
    for sample in samples:
        tasks.setdefault(sample.task, []).append(sample)
    return [[sample for sample in tried if sample.is_clean] or tried for _, tried in sorted(tasks.items())]


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
    found: dict[str, dict[str, float]] = {}
    for kind in kinds:
        mine, theirs = ([samples for samples in tasks if setup.tasks[samples[0].task].kind == kind] for tasks in (own, plain))
        found[kind] = {"speed_up": _rate(mine) / _rate(theirs), "tau": _total(mine).tau}
    return found


def _seconds(tasks: list[list[Sample]], is_decoding: bool = False) -> list[float]:
    """Per task the median time: of everything, or of what follows the first token."""
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
    """Where answers differ from plain's; None where the rule does not promise the same text."""
    if setup.accept != "coupled" and setup.params.temperature > 0:
        return None
    found: list[Split] = []
    for mine, theirs in zip(own, plain, strict=True):
        task = mine[0].task
        expected, got = theirs[0].tokens, mine[0].tokens
        split = find_split(setup.target, setup.tasks[task].prompt, setup.params_of(task), expected, got)
        found += [split] if split else []
    return found


def loop_share(tokens: Sequence[int], size: int = NGRAM) -> float:
    """Which share of a text lies inside runs of `size` tokens that stood in it before."""
    seen: set[tuple[int, ...]] = set()
    repeated: set[int] = set()
    for start in range(len(tokens) - size + 1):
        run = tuple(tokens[start : start + size])
        if run in seen:
            repeated.update(range(start, start + size))
        seen.add(run)
    return len(repeated) / len(tokens) if tokens else 0.0


# -- what it depends on -----------------------------------------------------------------------------------------------------


def machine(target: Target) -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "headstart": headstart.__version__,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def labels(setup: Setup) -> list[str]:
    """What a reader must know: equality to the bit, replayed answers, a padded target, a rule that changes the law."""
    found = {
        "exact": setup.target.is_exact,
        "replay": setup.is_replay,
        "padded": is_padded(setup.target),
        "lossy": parse_rule(setup.accept).is_lossy,
    }
    return [label for label, applies in found.items() if applies]


def is_padded(target: Target) -> bool:
    """Widened with zeros: the text of a small model at the cost of a large one."""
    weight: torch.Tensor = target.model.get_input_embeddings().weight  # type: ignore[assignment]
    return not bool(weight[:, -1].any())


def clean_share(samples: Sequence[Sample]) -> float | None:
    """How many samples hardly waited for a processor; None where the system does not say."""
    known = [sample.is_clean for sample in samples if sample.delay is not None]
    return sum(known) / len(known) if known else None


def as_json(setup: Setup, samples: Sequence[Sample], found: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything, for one line."""
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
        "runs": [vars(row) | {"identical": row.identical} for row in found],
    }


# -- for people -------------------------------------------------------------------------------------------------------------


def short(run: str) -> str:
    """A run's name with folders by their last name only: `model:a/b@chain:4` becomes `model:b@chain:4`, `a/b` becomes `b`."""
    return re.sub(r"^(\w+:)?(?:.*/)?([^/@]+)/*(?=@|$)", r"\1\2", run)


Column = tuple[str, Callable[[Row], str]]
_SHORT: tuple[Column, ...] = (
    ("run", lambda row: short(row.run)),
    ("tokens/s", lambda row: f"{row.tokens_per_second:.1f}"),
    ("speed-up", lambda row: f"{row.speed_up:.2f}x"),
    ("tau", lambda row: f"{row.tau:.2f}"),
    ("identical", lambda row: row.identical),
)
_LONG: tuple[Column, ...] = (
    *_SHORT[:3],
    ("median", lambda row: f"{row.median_speed_up:.2f}x"),
    ("after prompt", lambda row: f"{row.decode_speed_up:.2f}x"),
    _SHORT[3],
    ("accepted by depth", lambda row: " ".join(f"{share:.2f}"[1:] if share < 1 else "1.0" for share in row.acceptance[:6])),
    ("nodes", lambda row: f"{row.nodes:.1f}"),
    ("forward", lambda row: f"{row.forward:.2f}x"),
    ("draft/score/verify/\ncommit/host %", lambda row: "/".join(f"{100 * share:.0f}" for share in row.shares.values())),
    ("loops", lambda row: f"{row.loops:.0%}"),
    _SHORT[4],
)


_HEAT: Column = ("T", lambda row: f"{row.temperature:g}")


def table(found: Sequence[Row], title: str, is_short: bool = False) -> Table:
    """One line per run, and per temperature where there are several."""
    run, *rest = _SHORT if is_short else _LONG
    columns = (run, *([_HEAT] if len({row.temperature for row in found}) > 1 else []), *rest)
    result = Table(title=title, title_justify="left")
    for name, _ in columns:
        result.add_column(name, justify="left" if name in ("run", "identical") else "right", overflow="fold")
    for row in found:
        result.add_row(*(write(row) for _, write in columns))
    return result


def table_by_kind(found: Sequence[Row]) -> Table:
    """One line per run, temperature and prompt set."""
    result = Table(title="by prompt set", title_justify="left")
    for name in ("run", "prompts", "T", "speed-up", "tau"):
        result.add_column(name, justify="left" if name in ("run", "prompts") else "right", overflow="fold")
    for row in found:
        for kind, numbers in row.kinds.items():
            result.add_row(short(row.run), kind, f"{row.temperature:g}", f"{numbers['speed_up']:.2f}x", f"{numbers['tau']:.2f}")
    return result
