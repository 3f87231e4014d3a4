"""Checks the engine on a device, GPU or CPU, and measures the cost of a forward.

    python benchmarks/gpu_check.py                          # the embedded model
    python benchmarks/gpu_check.py --model PATH --draft PATH
    python benchmarks/gpu_check.py --random 16x2048         # a Llama of that size with random weights: for timings

Identity: every drafter against plain decoding of one row at a time. In fp32 texts may differ at near ties only; in bf16 differences
are counted. Then: all rows in one attention call against row by row, the cost of a forward, the engine against `model.generate`,
host synchronisations per round, and memory. Prints a table and one line of JSON. The exit code is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

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
from headstart.target.loading import embedded
from headstart.target.target import Target, load_model

DISTRIBUTIONS = {
    "greedy": SamplingParams(),
    "T=0.7": SamplingParams(temperature=0.7),
    "T=1 top-p 0.9": SamplingParams(temperature=1.0, top_p=0.9),
}
LENGTHS = (5, 40, 1, 17, 90, 9, 33, 3)  # of the prompts
NODES = (1, 2, 8, 16, 64)
CONTEXTS = (256, 1024)
MEMORY = 2**29  # bytes of an engine's caches

Line = tuple[str, str, bool]  # the check, its result, whether it passed


def main() -> int:
    options = read_options()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu")
    result: dict[str, Any] = {}
    lines: list[Line] = []
    for dtype in (torch.float32, torch.bfloat16):
        target, draft = targets(options, dtype, device)
        result["machine"] = machine(target) | {"command": " ".join(["python", *sys.argv])}
        result["model"] = {"name": target.name, "parameters": sum(p.numel() for p in target.model.parameters())}
        name = str(dtype).removeprefix("torch.")
        result[name] = {"identity": identity(target, draft, options.tokens, lines), "together": together(target, lines)}
        if dtype == torch.bfloat16 or options.both:
            result[name] |= {
                "pass_ms": forwards(target, lines),
                "generate": against_generate(target, options.tokens, lines),
                "waits": waits(target, draft, lines),
                "memory": memory(target, draft, lines),
            }
        del target, draft
    show(lines, result)
    print(json.dumps(result))
    return 0 if all(is_right for _, _, is_right in lines) else 1


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the embedded model)")
    parser.add_argument("--draft", help="a smaller model with the same tokens (default: the target's first two layers)")
    parser.add_argument("--random", metavar="LAYERSxHIDDEN", help="a Llama with random weights instead of a model")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--both", action="store_true", help="time fp32 too, not only bf16")
    return parser.parse_args()


def targets(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> tuple[Target, Target]:
    """The model under test and a smaller draft model, with plain torch operations, so that all devices run the same ones."""
    if options.random:
        layers, hidden = map(int, options.random.split("x"))
        model = random_llama(layers, hidden, dtype, device)
    else:
        model = load_model(options.model or embedded("target"), dtype, str(device))
    draft = options.draft or (None if options.model or options.random else embedded("draft"))
    if draft is None:
        return Target(model), Target(first_layers(model, 2))
    return Target(model), Target(load_model(draft, dtype, str(device)))


def random_llama(layers: int, hidden: int, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A Llama with random weights."""
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        max_position_embeddings=4096,
        initializer_range=0.05,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def first_layers(model: Any, layers: int) -> Any:
    """A draft model that is often right: the first layers of the same model. The weights are shared."""
    config = type(model.config).from_dict(model.config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        cut = type(model)(config)
    cut.load_state_dict(model.state_dict(), strict=False, assign=True)
    cut.tie_weights()
    cut.model.rotary_emb = model.model.rotary_emb  # its buffers are computed, not loaded
    return cut


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


def together(target: Target, lines: list[Line]) -> float:
    """The largest difference between all rows in one attention call and row by row, in standard deviations of the logits."""
    scored = []
    before = target.pad_rows
    for target.pad_rows in (True, False):
        cache, seats, forest = trees(target, (7, 40, 3), 6)
        scored.append(target.score(forest, cache, seats).logits.double())
    target.pad_rows = before
    gap = float((scored[0] - scored[1]).abs().max() / scored[1].std())
    is_right = gap < (2e-3 if target.dtype == torch.float32 else 0.25)  # as at load
    lines.append((f"{dtype_name(target)} rows together, row by row", f"{gap:.1g} sd", is_right))
    return gap


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


# -- speed --------------------------------------------------------------------------------------------------------------


def seconds(target: Target, work: Callable[[], object], repeat: int = 9) -> float:
    """Median seconds of some work, after two warm-up runs."""
    times = []
    for _ in range(repeat + 2):
        synchronise(target)
        began = time.perf_counter()
        work()
        synchronise(target)
        times.append(time.perf_counter() - began)
    return median(times[2:])


def synchronise(target: Target) -> None:
    """Wait until the device is idle."""
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)


@torch.inference_mode()
def forwards(target: Target, lines: list[Line]) -> dict[str, float]:
    """Milliseconds of a forward by nodes and context."""
    times = {}
    for behind in dict.fromkeys(min(context, target.context - max(NODES) - 1) for context in CONTEXTS):
        for nodes in NODES:
            cache, seats, forest = trees(target, (behind,), nodes - 1)
            times[f"{nodes}@{behind}"] = 1000 * seconds(target, lambda c=cache, s=seats, f=forest: target.score(f, c, s))
        row = [times[f"{nodes}@{behind}"] for nodes in NODES]
        finding = "  ".join(f"{nodes}: {ms:.2f} (x{ms / row[0]:.2f})" for nodes, ms in zip(NODES, row, strict=True))
        lines.append((f"{dtype_name(target)} ms of a forward, nodes after a context of {behind}", finding, True))
    return times


def against_generate(target: Target, tokens: int, lines: list[Line]) -> dict[str, float]:
    """Tokens/s of one greedy row without a drafter: this engine and `model.generate`."""
    prompt = prompts(target)[1]
    tokens = min(tokens, target.context - len(prompt))
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    engine = Engine(target, max_rows=1, memory=(len(prompt) + tokens + 1) * target.slot_bytes)

    def answer() -> None:
        engine.add(prompt, params)
        list(engine.run())

    ours = seconds(target, answer, 3)
    ids = torch.tensor([prompt], device=target.device)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    theirs = seconds(target, lambda: target.model.generate(ids, attention_mask=torch.ones_like(ids), **settings), 3)
    finding = f"{tokens / ours:.1f} against {tokens / theirs:.1f} tokens/s (x{theirs / ours:.2f})"
    lines.append((f"{dtype_name(target)} engine, model.generate", finding, True))
    return {"engine": tokens / ours, "generate": tokens / theirs}


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
    lines.append(
        (f"{dtype_name(target)} host synchronisations per round", "  ".join(f"{name}: {n:.1f}" for name, n in counts.items()), True)
    )
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
    """Print a line per check."""
    machine_info = result["machine"]
    title = f"{result['model']['name']} on {machine_info['device']} ({machine_info['cpu']}), torch {machine_info['torch']}"
    table = Table(title=title, title_justify="left")
    for heading in ("check", "result", ""):
        table.add_column(heading, overflow="fold")
    for check, finding, is_right in lines:
        table.add_row(check, finding, "ok" if is_right else "WRONG")
    Console(width=160).print(table)


if __name__ == "__main__":
    sys.exit(main())
