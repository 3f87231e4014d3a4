"""Checks the engine on a device, GPU or CPU, measures its speed, and says what falls short.

    python benchmarks/gpu_check.py                          # the embedded model; on a GPU the speed of a Llama of 7B, too
    python benchmarks/gpu_check.py --model PATH --draft PATH    # both with another model
    python benchmarks/gpu_check.py --random 32x4096 --only speed

Correctness: every drafter against plain decoding of one row at a time. In fp32 texts may differ at near ties only; in bf16
differences are counted. Then all rows in one attention call (padded, with FlexAttention, as graphs) against row by row, host
synchronisations per round, and memory. Speed: see `gpu_speed.py`. Prints a table, what falls short, and one line of JSON. The exit
code is 1 where a check fails or a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import gpu_speed
import torch
from gpu_models import targets
from rich.console import Console
from rich.table import Table

from headstart.bench.identity import find_split
from headstart.bench.report import machine
from headstart.drafters import Drafter
from headstart.drafters.draft_model import ModelDrafter
from headstart.drafters.lookup import Lookup
from headstart.drafters.registry import METHODS, method
from headstart.engine.drafter_loading import folder_of, make
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best
from headstart.speculation.tree import ROOT, Drafts, merge
from headstart.target.cache import Seating
from headstart.target.target import Target

DISTRIBUTIONS = {
    "greedy": SamplingParams(),
    "T=0.7": SamplingParams(temperature=0.7),
    "T=1 top-p 0.9": SamplingParams(temperature=1.0, top_p=0.9),
}
LENGTHS = (5, 40, 1, 17, 90, 9, 33, 3)  # of the prompts
MEMORY = 2**29  # bytes of an engine's caches

Line = tuple[str, str, bool]  # the check, its result, whether it passed


def main() -> int:
    options = read_options()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu")
    result: dict[str, Any] = {}
    lines: list[Line] = []
    if options.only != "speed":
        correctness(options, device, result, lines)
    if options.only != "correctness":
        speed(options, device, result, lines)
    show(lines, result)
    print(json.dumps(result))
    return 0 if all(is_right for _, _, is_right in lines) else 1


def correctness(options: argparse.Namespace, device: torch.device, result: dict[str, Any], lines: list[Line]) -> None:
    """All checks of answers, in fp32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        target, draft = targets(options, dtype, device)
        describe(target, result)
        name = str(dtype).removeprefix("torch.")
        result[name] = {"identity": identity(target, draft, options.tokens, lines), "together": together(target, lines)}
        if dtype == torch.bfloat16:
            result[name] |= {"waits": waits(target, draft, lines), "memory": memory(target, draft, lines)}
        del target, draft


def speed(options: argparse.Namespace, device: torch.device, result: dict[str, Any], lines: list[Line]) -> None:
    """The speed in bf16: of the model that is given, else of a Llama with random weights."""
    if not options.model and not options.random:
        options.random = "32x4096" if device.type == "cuda" else "2x256"
    target, draft = targets(options, torch.bfloat16, device)
    describe(target, result)
    report = gpu_speed.measure(target, draft, options.tokens)
    lines += [(f"{target.name} {options.random or ''} {check}", finding, is_right) for check, finding, is_right in report.lines]
    result["speed"] = report.numbers | {"falls_short": report.short}


def describe(target: Target, result: dict[str, Any]) -> None:
    """Write the machine and the model into the result."""
    result["machine"] = machine(target) | {"command": " ".join(["python", *sys.argv])}
    result["model"] = {"name": target.name, "parameters": sum(p.numel() for p in target.model.parameters())}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the embedded model)")
    parser.add_argument("--draft", help="a smaller model with the same tokens (default: the target's first two layers)")
    parser.add_argument("--random", metavar="LAYERSxHIDDEN", help="a Llama with random weights instead of a model")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--only", choices=["correctness", "speed"], help="half of the checks")
    return parser.parse_args()


# -- correctness --------------------------------------------------------------------------------------------------------------


def prompts(target: Target) -> list[list[int]]:
    """Random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(target.vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def answers(
    target: Target, drafter: Drafter | None, params: SamplingParams, max_rows: int, texts: list[list[int]]
) -> tuple[list[list[int]], float]:
    """The answers to some prompts, and their tau."""
    engine = Engine(target, drafter, max_rows=max_rows, memory=MEMORY)
    requests = [engine.add(prompt, replace(params, seed=index)) for index, prompt in enumerate(texts)]
    for _ in engine.run():
        pass
    return [request.output for request in requests], engine.stats.tau


def heads(name: str, target: Target) -> Drafter:
    """The embedded model's heads of a method where there are some, else untrained heads."""
    if folder_of(name, target.name) is not None:
        return make(name, target)
    kind = method(name)
    settings = kind.resolve_config(kind.config_type(), target.model.config)
    return (
        kind(settings, target.embed_head.hidden, target.embed_head.vocab)
        .to(target.dtype)
        .bind(target.embed_head)
        .init_from_target()
    )


def identity(target: Target, draft: Target, tokens: int, lines: list[Line]) -> list[dict[str, Any]]:
    """Every drafter under every distribution, one row at a time and eight ragged rows at once."""
    drafters: dict[str, Callable[[], Drafter | None]] = {
        "none": lambda: None, "lookup": lambda: Lookup(floor=0.02, min_gain=0.02), "model": lambda: ModelDrafter(draft),
        **{name: partial(heads, name, target) for name in METHODS},
    }  # fmt: skip
    texts, results = prompts(target), []
    tokens = min(tokens, target.context - max(LENGTHS))
    for distribution, base in DISTRIBUTIONS.items():
        params = replace(base, max_tokens=tokens, ignore_eos=True)
        plain, _ = answers(target, None, params, 1, texts)
        for name, make_drafter in drafters.items():
            for rows in (1, len(texts)):
                if (name, rows) == ("none", 1):
                    continue
                actual, tau = answers(target, make_drafter(), params, rows, texts)
                triples = enumerate(zip(texts, plain, actual, strict=True))
                splits = [find_split(target, text, replace(params, seed=i), old, new) for i, (text, old, new) in triples]
                gaps = [split.gap for split in splits if split]
                results.append(
                    {"drafter": name, "distribution": distribution, "rows": rows, "tau": tau, "differing": len(gaps), "gaps": gaps}
                )
                is_right = target.dtype != torch.float32 or all(split.is_near_tie for split in splits if split)
                finding = f"tau {tau:.2f}, {len(gaps)} of {len(actual)} differ" + (f", gap up to {max(gaps):.1g}" if gaps else "")
                lines.append((f"{dtype_name(target)} {distribution}, {name}, {rows} rows", finding, is_right))
    return results


def together(target: Target, lines: list[Line]) -> dict[str, float]:
    """The largest difference between all rows in one attention call, in every way, and row by row, in standard deviations."""
    scored = {}
    for name, runner in gpu_speed.runners(target).items():
        with gpu_speed.running(target, target, runner):
            cache, seats, forest = trees(target, (7, 40, 3), 6)
            scored[name] = target.score(forest, cache, seats).logits.double()
    expected, gaps = scored.pop("row by row"), {}
    for name, logits in scored.items():
        gaps[name] = float((logits - expected).abs().max() / expected.std())
        is_right = gaps[name] < (2e-3 if target.dtype == torch.float32 else 0.25)  # as at load
        lines.append((f"{dtype_name(target)} {name} against row by row", f"{gaps[name]:.1g} sd", is_right))
    return gaps


def trees(target: Target, behind: tuple[int, ...], size: int) -> tuple[Any, list[int], Any]:
    """Cache, seats and forest of rows with a tree each: two branches from the root.

    behind: committed tokens per row. size: drafts per tree.
    """
    texts = [[(7 * index + row) % target.vocab for index in range(length + 1)] for row, length in enumerate(behind)]
    slots = max(behind) + size + 2
    seating = Seating(len(behind), slots * len(behind))
    cache, seats = target.new_cache(seating), [seating.take(slots) or 0 for _ in behind]
    forest = merge([text[:-1] for text in texts], [0] * len(texts), [False] * len(texts), Drafts.none(target.device))
    target.score(forest, cache, seats)
    cache.commit(seats, forest.stems, [()] * len(seats))
    parents = [ROOT, ROOT, *range(size - 2)][:size]
    depths = [1 + node // 2 for node in range(size)]
    count = len(texts)
    drafts = Drafts.of(
        [(node + 1) % target.vocab for _ in texts for node in range(size)],
        [ROOT if parent == ROOT else parent + row * size for row in range(count) for parent in parents],
        [row for row in range(count) for _ in range(size)], depths * count, [0.5] * size * count, device=target.device,
    )  # fmt: skip
    return cache, seats, merge([text[-1:] for text in texts], list(behind), [True] * count, drafts)


# -- the host and memory ------------------------------------------------------------------------------------------------------


def waits(target: Target, draft: Target, lines: list[Line]) -> dict[str, float] | None:
    """Host synchronisations per round. A round with drafts should have one, to read the decisions."""
    if target.device.type != "cuda":
        return None
    counts = {}
    drafters: dict[str, Drafter | None] = {
        "none": None, "lookup": Lookup(floor=0.02, min_gain=0.02), "model": ModelDrafter(draft),
        **{name: heads(name, target) for name in METHODS},
    }  # fmt: skip
    for name, drafter in drafters.items():
        for rows in (1, 8):
            engine = Engine(target, drafter, max_rows=rows, memory=MEMORY)
            for prompt in prompts(target)[:rows]:
                engine.add(prompt, SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, top_p=0.9, seed=1))
            for _ in range(5):
                engine.step()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                for _ in range(5):
                    engine.step()
                torch.cuda.set_sync_debug_mode("default")
            counts[f"{name}, {rows} rows"] = sum("synchroniz" in str(w.message) for w in caught) / 5
    finding, most = "  ".join(f"{name}: {n:.1f}" for name, n in counts.items()), max(counts.values())
    lines.append((f"{dtype_name(target)} host synchronisations per round, at most 1.2", finding, most <= 1.2))  # rarely two
    return counts


def memory(target: Target, draft: Target, lines: list[Line]) -> dict[str, int | None]:
    """Announced and allocated bytes of the KV caches, and bytes that decoding leaves allocated."""
    before = torch.cuda.memory_allocated() if target.device.type == "cuda" else None
    drafter = ModelDrafter(draft)
    engine = Engine(target, drafter, Best(nodes=8, depth=4), max_rows=4, memory=2**27)
    held = engine.cache.bytes + drafter.cache.bytes
    allocated = None if before is None else torch.cuda.memory_allocated() - before
    for prompt in prompts(target):
        engine.add(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
    for _ in engine.run():
        pass
    engine.seating.check()
    is_right = held == engine.memory and (allocated is None or abs(allocated - held) <= 2**21)
    left = None if before is None or allocated is None else torch.cuda.memory_allocated() - before - allocated
    finding = f"announced {engine.memory:,}, caches {held:,}, allocated {allocated}, more after decoding {left}"
    lines.append((f"{dtype_name(target)} bytes", finding, is_right and (left or 0) < 2**24))
    return {"announced": engine.memory, "held": held, "allocated": allocated, "grown": left}


# -- printing ---------------------------------------------------------------------------------------------------------------


def dtype_name(target: Target) -> str:
    """fp32 or bf16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[target.dtype]


def show(lines: list[Line], result: dict[str, Any]) -> None:
    """Print a line per check, then what falls short."""
    machine_info = result["machine"]
    title = f"{machine_info['device']} ({machine_info['cpu']}), torch {machine_info['torch']}"
    table = Table(title=title, title_justify="left")
    for heading in ("check", "result", ""):
        table.add_column(heading, overflow="fold")
    for check, finding, is_right in lines:
        table.add_row(check, finding, "ok" if is_right else "FALLS SHORT")
    Console(width=160).print(table)
    short = [f"{check}: {finding}" for check, finding, is_right in lines if not is_right]
    print("\n".join(["falls short:", *short]) if short else "nothing falls short of what was checked here")


if __name__ == "__main__":
    sys.exit(main())
