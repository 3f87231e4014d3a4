"""The cost and gain of the CPU kernels: one forward of a model, and attention layers, each beside plain torch.

    python benchmarks/kernels.py path/to/model [--dtype bfloat16] [--context 256] [--repeats 40]

Measurements are interleaved. A sample during which this process waited for a processor for more than 2 % of the time is left out.
Prints the median of the other samples in milliseconds, their number, and the ratio to plain torch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from headstart.target import attention
from headstart.target.attention import AttentionParams, Kernel
from headstart.target.cache import Seating
from headstart.target.kernels.attention import ordered, wide
from headstart.target.kernels.fuse import fuse
from headstart.target.kernels.linear import packed_bytes, prepack
from headstart.target.loading import load_model
from headstart.target.row_mask import RowMask, Window
from headstart.target.target import Target

NODES = (1, 2, 8, 16)


def waited() -> float:
    """Seconds that this process's threads have waited for a processor since they started; Linux only."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        total += int(file.read_text().split()[1])
    return total / 1e9


def measure(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, int]]:
    """Median milliseconds of the clean samples of each job, and their number; of all samples where none was clean."""
    clean: dict[str, list[float]] = {name: [] for name in jobs}
    every: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 3):
        for name, job in jobs.items():
            before, start = waited(), time.perf_counter()
            job()
            took = time.perf_counter() - start
            if repeat < 3:
                continue
            every[name].append(took * 1e3)
            if waited() - before <= 0.02 * took:
                clean[name].append(took * 1e3)
    return {name: (statistics.median(clean[name] or every[name]), len(clean[name])) for name in jobs}


def row_mask(nodes: int, context: int) -> RowMask:
    """The mask of a row with `context` committed slots, whose nodes are a root and random drafts."""
    generator = torch.Generator().manual_seed(nodes)
    tree_mask, depths = torch.eye(nodes, dtype=torch.bool), [0] * nodes
    for node in range(1, nodes):
        parent = int(torch.randint(0, node, (), generator=generator))
        tree_mask[node] |= tree_mask[parent]
        depths[node] = depths[parent] + 1
    return RowMask(0, nodes, 0, context, None if nodes == 1 else tree_mask, torch.tensor(depths) + context)


def one_forward(target: Target, kernel: Kernel, nodes: int, context: int) -> Callable[[], object]:
    """A job: one forward of a model over `nodes` nodes."""
    seating = Seating(1, context + nodes)
    seating.take(context + nodes)
    cache = target.new_cache(seating)
    tokens, asked = torch.arange(nodes) % target.vocab, torch.arange(nodes)

    def run() -> Tensor:
        target.kernel = kernel
        row = masks[nodes]
        fresh = RowMask(0, nodes, 0, context, row.tree_mask, row.positions)  # masks are made anew in every forward
        return target.forward(tokens, row.positions, [fresh], cache, asked).logits

    masks = {nodes: row_mask(nodes, context)}
    return run


def one_layer(
    kernel: Kernel, dtype: torch.dtype, nodes: int, context: int, heads: int = 16, width: int = 64
) -> Callable[[], object]:
    """A job: eight attention layers over `nodes` nodes."""
    query, row = torch.randn(heads, nodes, width).to(dtype), row_mask(nodes, context)
    stores = [torch.randn(2, heads, context + nodes, width).to(dtype) for _ in range(8)]
    return lambda: [kernel(query, keys, values, row, AttentionParams(width**-0.5, Window())) for keys, values in stores]


def show(title: str, columns: list[str], rows: list[tuple[str, dict[str, tuple[float, int]]]]) -> None:
    """Print a Markdown table; ratios are to the first row."""
    print(f"\n{title}\n| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, cells in rows:
        plain = rows[0][1]
        text = [f"{cells[c][0]:.2f} ({cells[c][0] / plain[c][0]:.2f}x, {cells[c][1]} clean)" for c in columns]
        print(f"| {name} | " + " | ".join(text) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    with torch.inference_mode():
        layers(dtype, arguments.repeats)
        forwards(arguments.model, dtype, arguments.context, arguments.repeats)


def layers(dtype: torch.dtype, repeats: int) -> None:
    """Measure attention layers."""
    kernels: dict[str, Kernel] = {"torch sdpa": attention.torch_attention, "ordered": ordered, "fp64": wide}
    for context in (64, 256, 1024):
        jobs = {f"{name} {nodes}": one_layer(kernel, dtype, nodes, context) for nodes in NODES for name, kernel in kernels.items()}
        times = measure(jobs, repeats)
        table = [(name, {str(nodes): times[f"{name} {nodes}"] for nodes in NODES}) for name in kernels]
        show(f"attention, 8 layers of 16 heads x 64, {dtype}, {context} slots; ms by nodes", [str(n) for n in NODES], table)


def forwards(path: str, dtype: torch.dtype, context: int, repeats: int) -> None:
    """Measure forwards of a model."""
    models = [load_model(path, dtype, "cpu") for _ in range(3)]
    fused = fuse(models[2])
    counts = [prepack(model) for model in models[1:]]
    print(f"\nlinears packed: {counts[0]}; modules fused: {fused}; packed weights {packed_bytes(models[2]) / 1e6:.0f} MB")
    targets = [Target(model, check=False) for model in models]
    variants = {
        "plain": (targets[0], attention.torch_attention),
        "packed": (targets[1], attention.torch_attention),
        "packed, fused": (targets[2], attention.torch_attention),
        "packed, fused, exact": (targets[2], ordered),
        "packed, fused, exact by fp64": (targets[2], wide),
    }
    jobs = {f"{name} {n}": one_forward(*variant, n, context) for n in NODES for name, variant in variants.items()}
    times = measure(jobs, repeats)
    table = [(name, {str(n): times[f"{name} {n}"] for n in NODES}) for name in variants]
    show(f"one forward of {path}, {dtype}, {context} slots; ms by nodes", [str(n) for n in NODES], table)


if __name__ == "__main__":
    main()
