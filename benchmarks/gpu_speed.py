"""How fast a device runs forwards, rounds and answers, against what its memory bandwidth allows. `gpu_check.py` calls `measure`.

On a GPU it ends in a verdict. On a CPU the same measurements run, and no verdict is given: `pad_rows` is not how a CPU runs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from headstart.drafters import Drafter
from headstart.drafters.draft_model import ModelDrafter
from headstart.drafters.lookup import Lookup
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best
from headstart.speculation.tree import ROOT, Drafts, Forest, merge
from headstart.target.cache import KVCache, Seating
from headstart.target.flex import flex_kernel
from headstart.target.graphs import FlatRunner, cuda_graphs
from headstart.target.target import Target

NODES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (256, 1024)  # slots
MOST_OF_BANDWIDTH, MOST_OF_ONE = 1.15, 1.05  # what T(1) may take of bytes / bandwidth, and T(64) of T(1)
ROUNDS = 20


@dataclass
class Report:
    """What was measured. lines: for the printed table. short: what falls short, in words. numbers: for the JSON."""

    lines: list[tuple[str, str, bool]] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, check: str, finding: str, is_right: bool = True) -> None:
        """Add a line."""
        self.lines.append((check, finding, is_right))
        if not is_right:
            self.short.append(f"{check}: {finding}")


def measure(target: Target, draft: Target, tokens: int) -> Report:
    """Everything, for one model on one device. draft: a smaller model of the same vocabulary. tokens: of each answer."""
    report = Report()
    is_gpu = target.device.type == "cuda"
    bandwidth = report.numbers["bandwidth_gb_s"] = measured_bandwidth(target.device)
    size = report.numbers["read_bytes"] = read_bytes(target)
    floor = report.numbers["floor_ms"] = size / bandwidth / 1e6
    report.add("memory bandwidth, measured", f"{bandwidth:.0f} GB/s; a forward reads {size / 1e9:.2f} GB, so {floor:.3f} ms")
    times: dict[str, dict[str, float]] = {}
    report.numbers["forward_ms"] = times
    for name, runner in runners(target).items():
        with running(target, draft, runner):
            times[name] = forwards(target)
            say_forwards(report, name, times[name], floor)
            report.numbers.setdefault("answers", {})[name] = answers(report, name, target, draft, tokens)
            if is_gpu:
                report.numbers.setdefault("gaps", {})[name] = gaps(report, name, target, draft)
    report.numbers["generate"] = against_generate(report, target, tokens)
    if is_gpu:
        verdict(report, times, floor)
    else:
        report.add("verdict", "none: no GPU here, and the limits are for a GPU")
    return report


def runners(target: Target) -> dict[str, FlatRunner | None]:
    """The ways to run forwards on this device. None: row by row."""
    ways: dict[str, FlatRunner | None] = {"row by row": None, "padded": FlatRunner()}
    if target.device.type == "cuda":
        ways["padded, graphs"] = FlatRunner(new_graph=cuda_graphs())
        ways["flex, graphs"] = FlatRunner(flex_kernel, cuda_graphs(), reads_all_slots=True)
    return ways


@contextmanager
def running(target: Target, draft: Target, runner: FlatRunner | None) -> Iterator[None]:
    """Both targets run their forwards this way within the block."""
    before = [(each, each.pad_rows, each.flat_runner) for each in (target, draft)]
    for each in (target, draft):
        each.pad_rows = runner is not None
        each.flat_runner = runner or each.flat_runner
    try:
        yield
    finally:
        for each, pad_rows, flat_runner in before:
            each.pad_rows, each.flat_runner = pad_rows, flat_runner
        if runner is not None:
            runner.clear()
        gc.collect()


# -- the floor ----------------------------------------------------------------------------------------------------------------


def measured_bandwidth(device: torch.device) -> float:
    """GB/s of the device's memory: the better of copying a large buffer (read and written) and summing it (read)."""
    buffer = torch.ones(2**29 if device.type == "cuda" else 2**24, dtype=torch.float32, device=device)
    other = torch.empty_like(buffer)
    copying, summing = seconds(device, lambda: other.copy_(buffer)), seconds(device, lambda: buffer.sum())
    return max(2 * buffer.nbytes / copying, buffer.nbytes / summing) / 1e9


def read_bytes(target: Target) -> int:
    """Bytes of the weights that a forward of one token reads: all but an embedding that is not the LM head, too."""
    weights = {weight.data_ptr(): weight for weight in target.model.parameters()}
    embedding, head = target.model.get_input_embeddings().weight, target.model.get_output_embeddings()
    unread = embedding.nbytes if head is not None and head.weight.data_ptr() != embedding.data_ptr() else 0
    return sum(weight.nbytes for weight in weights.values()) - unread


def seconds(device: torch.device, work: Callable[[], object], repeat: int = 9) -> float:
    """Median seconds of some work, after three warm-up runs."""
    times = []
    for _ in range(repeat + 3):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return median(times[3:])


def synchronise(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- forwards -----------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def forwards(target: Target) -> dict[str, float]:
    """Milliseconds of a forward by nodes and context, as "nodes@context"."""
    times = {}
    for context in dict.fromkeys(min(context, target.context - max(NODES) - 1) for context in CONTEXTS):
        for nodes in NODES:
            cache, seats, forest = tree_behind(target, context, nodes - 1)
            work = seconds(target.device, lambda c=cache, s=seats, f=forest: target.score(f, c, s))  # type: ignore[misc]
            times[f"{nodes}@{context}"] = 1000 * work
    return times


def tree_behind(target: Target, context: int, size: int) -> tuple[KVCache, list[int], Forest]:
    """Cache, seat and forest of one row: `size` drafts in two branches, behind `context` committed slots of zeros."""
    seating = Seating(1, context + size + 1)
    cache, seats = target.new_cache(seating), [seating.take(seating.num_slots) or 0]
    cache.lengths[0] = context
    parents, depths = [ROOT, ROOT, *range(max(0, size - 2))][:size], [1 + node // 2 for node in range(size)]
    tokens = [(node + 1) % target.vocab for node in range(size)]
    drafts = Drafts.of(tokens, parents, [0] * size, depths, [0.5] * size, device=target.device)
    return cache, seats, merge([[1]], [context], [True], drafts)


def say_forwards(report: Report, name: str, times: dict[str, float], floor: float) -> None:
    """One line per context: T(n), T(n) / T(1) and T(1) against the floor."""
    for context in dict.fromkeys(key.partition("@")[2] for key in times):
        row = [times[f"{nodes}@{context}"] for nodes in NODES]
        finding = "  ".join(f"{nodes}: {ms:.2f} (x{ms / row[0]:.2f})" for nodes, ms in zip(NODES, row, strict=True))
        report.add(f"{name}: ms of a forward by nodes, context {context}", f"{finding}; T(1) is {row[0] / floor:.2f} of the floor")


# -- rounds and answers -------------------------------------------------------------------------------------------------------


def drafters(draft: Target) -> dict[str, tuple[Drafter | None, Best | None]]:
    """Plain decoding and two drafters that need no training."""
    return {
        "plain": (None, None),
        "lookup": (Lookup(floor=0.02, min_gain=0.02), None),
        "draft model": (ModelDrafter(draft), Best(nodes=15, depth=4, width=3, beam=2)),
    }


def one_row(target: Target, drafter: Drafter | None, planner: Best | None, tokens: int) -> Engine:
    """An engine with one greedy request."""
    engine = Engine(target, drafter, planner, max_rows=1)
    engine.add([1 + index % 50 for index in range(40)], SamplingParams(max_tokens=tokens, ignore_eos=True))
    return engine


def answers(report: Report, name: str, target: Target, draft: Target, tokens: int) -> dict[str, float]:
    """Tokens/s of one greedy row, plain and drafted. The second answer is timed: the first captures and compiles."""
    speeds = {}
    for what, (drafter, planner) in drafters(draft).items():
        for _ in range(2):
            engine = one_row(target, drafter, planner, tokens)
            synchronise(target.device)
            began = time.perf_counter()
            list(engine.run())
            spent = time.perf_counter() - began
        speeds[what] = engine.stats.tokens / spent
        report.add(f"{name}: tokens/s, {what}", f"{speeds[what]:.1f}, tau {engine.stats.tau:.2f}")
    return speeds


def gaps(report: Report, name: str, target: Target, draft: Target) -> dict[str, dict[str, float]]:
    """Milliseconds of a round: wall clock, the device's kernels (by torch's profiler), and the difference: the device is idle."""
    results = {}
    for what, (drafter, planner) in drafters(draft).items():
        engine = one_row(target, drafter, planner, 64 * ROUNDS)
        for _ in range(ROUNDS):
            engine.step()
        wall = seconds(target.device, engine.step, ROUNDS)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(ROUNDS):
                engine.step()
            synchronise(target.device)
        busy = sum(event.self_device_time_total for event in profile.key_averages()) / ROUNDS / 1e6
        results[what] = {"wall_ms": 1000 * wall, "busy_ms": 1000 * busy, "gap_ms": 1000 * (wall - busy)}
        finding = f"{1000 * wall:.2f} ms, kernels {1000 * busy:.2f}, idle {1000 * (wall - busy):.2f} ({1 - busy / wall:.0%})"
        report.add(f"{name}: a round, {what}", finding)
    return results


def against_generate(report: Report, target: Target, tokens: int) -> dict[str, float | str]:
    """Tokens/s of `model.generate` for one greedy row: as it comes, and on a GPU compiled with a static cache."""
    results: dict[str, float | str] = {}
    ids = torch.tensor([[1 + index % 50 for index in range(40)]], device=target.device)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    more: dict[str, dict[str, Any]] = {"eager": {}}
    if target.device.type == "cuda":
        more["compiled"] = {"cache_implementation": "static"}
    model = target.model
    for name, options in more.items():
        try:
            if name == "compiled":
                model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
            spent = seconds(
                target.device, lambda o=options: model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **o), 3
            )  # type: ignore[misc]
            results[name] = tokens / spent
        except Exception as error:
            results[name] = f"not measured: {str(error).partition(chr(10))[0][:200]}"
        finally:
            vars(model).pop("forward", None)
    for name, speed in results.items():
        report.add(f"transformers' generate, {name}: tokens/s", speed if isinstance(speed, str) else f"{speed:.1f}")
    return results


def verdict(report: Report, times: dict[str, dict[str, float]], floor: float) -> None:
    """What the best way to run forwards reaches, against the limits."""
    context = next(iter(times["padded"])).partition("@")[2]
    name = min(times, key=lambda way: times[way][f"1@{context}"])
    one, most = times[name][f"1@{context}"], times[name][f"{NODES[-1]}@{context}"]
    is_right = one <= MOST_OF_BANDWIDTH * floor
    report.add("verdict: T(1)", f"{one:.3f} ms ({name}), {one / floor:.2f} of the floor, at most {MOST_OF_BANDWIDTH}", is_right)
    flat = most <= MOST_OF_ONE * one
    report.add("verdict: T(64) / T(1)", f"{most / one:.3f} ({name}), at most {MOST_OF_ONE}", flat)
    report.numbers["verdict"] = {"way": name, "of_floor": one / floor, "of_one": most / one, "reached": is_right and flat}
