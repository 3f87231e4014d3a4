"""What the time of a plain pass consists of, and what it becomes beside another busy process.

    python benchmarks/plain_pass.py MODEL [--dtype bfloat16] [--nodes 1 16] [--context 256] [--passes 40]

A pass scores a root, or a root and a tree of drafts, behind `--context` committed tokens. It is measured with the compiled kernels
and then, in a process of its own, with torch's (`HEADSTART_KERNELS=torch`). Where `HEADSTART_KERNELS` is set, only with those.

The parts are milliseconds inside the functions of the compiled library; `rest` is transformers' Python, operations of torch and the
forest. A fused attention layer is one call, so its parts are not seen from outside: further passes make its two products alone,
and what is missing then is attention, with the rotary embedding and the writing of the cache. Other passes run attention layers as
modules of transformers, and leave torch its own threads. All kinds of passes run in turn. `read` is the time in which torch adds up
as many bytes as the packed weights have. Where other processes used more than a tenth of a processor, measure again.

Beside a busy process: passes alone and beside a Python process that only counts, in turn; ratios are to the median alone.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import torch

sys.path.append(str(Path(__file__).parent / "peers"))
from llama_bench import Others
from passes import filled, forest_of, milliseconds

from headstart.bench.report import cpu_name
from headstart.target.cache import KVCache
from headstart.target.kernels import fused_attention
from headstart.target.kernels.library import SWITCH, Library, library
from headstart.target.kernels.linear import packed_bytes
from headstart.target.kernels.memory import huge_pages
from headstart.target.target import Target

PART_OF = {
    "linear": "products",
    "mlp": "products",
    "norm": "norms",
    "attention": "attention",
    "attention_layer": "attention layers",
}
PARTS = (*dict.fromkeys(PART_OF.values()), "rest", "whole")
TURNS = 4  # alone, then beside the busy process, and so on
WARM_UP = 3

Times = dict[str, float]  # milliseconds of a pass, by part


# -- parts ------------------------------------------------------------------------------------------------------------------


@contextmanager
def clocked(lib: Library, times: Times) -> Iterator[None]:
    """A context that adds the milliseconds inside the library's functions to `times`."""

    def timed(part: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            began = time.perf_counter()
            function(*arguments)
            times[part] = times.get(part, 0.0) + 1000 * (time.perf_counter() - began)

        return call

    with ExitStack() as stack:
        for name, part in PART_OF.items():
            stack.enter_context(patch.object(lib, name, timed(part, getattr(lib, name))))
        yield


def products_alone(lib: Library) -> AbstractContextManager[object]:
    """A context in which an attention layer is its two products."""

    def call(layer: int, _call: int, x: int, nodes: int, _cos: int, _sin: int, products: int, y: int) -> None:
        first, last = (ctypes.c_void_p * 2).from_address(layer)  # `input` and `output` of `AttentionLayer` in cpp/kernels.hpp
        lib.linear(first, x, nodes, products)
        lib.linear(last, products, nodes, y)

    return patch.object(lib, "attention_layer", call)


def variants(lib: Library) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """The kinds of passes: what each runs in. The last ones leave no thread of torch awake."""
    return {
        "attention layers as modules": lambda: patch.object(fused_attention, "is_compiled", lambda metadata: False),
        "torch with threads of its own": lambda: patch.object(Target, "working", lambda target: nullcontext()),
        "products alone": lambda: products_alone(lib),
        "as it is": nullcontext,
    }


def one_pass(lib: Library, job: Callable[[], object], variant: Callable[[], AbstractContextManager[object]]) -> Times:
    """The parts of one pass."""
    times: Times = {}
    with clocked(lib, times), variant():
        whole = milliseconds(job)
    return times | {"rest": whole - sum(times.values()), "whole": whole}


def medians(passes: Sequence[Times]) -> Times:
    """The median of each part."""
    return {part: median(one.get(part, 0.0) for one in passes) for part in PARTS}


def split(times: Times, products: float) -> Times:
    """Parts of a pass whose attention layers are calls: with the time of all products, the rest of these calls is attention."""
    inside = times["attention layers"] + times["products"] + times["attention"]
    return {**times, "products": products, "attention": inside - products, "attention layers": 0.0}


def parts(target: Target, lib: Library, job: Callable[[], object], count: int) -> dict[str, Times]:
    """Medians of the parts of each kind of pass."""
    kinds = variants(lib)
    every: dict[str, list[Times]] = {name: [] for name in kinds}
    for turn in range(WARM_UP + count):
        for name, variant in kinds.items():
            every[name].append(one_pass(lib, job, variant))
        if turn < WARM_UP:
            every = {name: [] for name in every}
    found = {name: medians(passes) for name, passes in every.items()}
    products = found.pop("products alone")["products"]
    return {name: split(times, products) if times["attention layers"] else times for name, times in found.items()}


# -- beside a busy process --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Milliseconds of passes."""

    mean: float
    median: float
    worst: float

    @classmethod
    def of(cls, times: Sequence[float]) -> "Summary":
        """Of the times of passes."""
        return cls(mean(times), median(times), max(times))


@contextmanager
def busy_process() -> Iterator[None]:
    """A context in which another process computes."""
    code = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it runs
            yield
        finally:
            process.kill()


def beside_another(job: Callable[[], object], count: int) -> tuple[Summary, Summary]:
    """Passes alone, and beside a busy process."""
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(TURNS):
        for times, context in ((alone, nullcontext()), (beside, busy_process())):
            with context:
                milliseconds(job)
                times.extend(milliseconds(job) for _ in range(-(-count // TURNS)))
    return Summary.of(alone), Summary.of(beside)


# -- printing ---------------------------------------------------------------------------------------------------------------


def reading(num_bytes: int, count: int) -> float:
    """Milliseconds in which torch adds up this many bytes of float32, the median."""
    weights = huge_pages(num_bytes // 4, torch.float32).fill_(1.0)
    return median(milliseconds(weights.sum) for _ in range(count))


def show_parts(nodes: int, found: dict[str, Times]) -> None:
    """Print the parts as a Markdown table."""
    shown = [part for part in PARTS if part != "attention layers"]
    print(f"\n| {nodes} node{'s' * (nodes > 1)}, ms | {' | '.join(shown)} |\n|---{'|---' * len(shown)}|")
    for name, times in found.items():
        print(f"| {name} | {' | '.join(f'{times[part]:.1f}' for part in shown)} |")


def show_busy(rows: Sequence[tuple[int, Summary, Summary]]) -> None:
    """Print times alone and beside a busy process as a Markdown table."""
    print("\n| nodes | alone, ms: mean, median, worst | beside a busy process | ratios to the median alone |\n|---|---|---|---|")
    for nodes, alone, beside in rows:
        figures = [[one.mean, one.median, one.worst] for one in (alone, beside)]
        figures.append([figure / alone.median for figure in figures[1]])
        cells = [", ".join(f"{figure:.{digits}f}" for figure in cell) for cell, digits in zip(figures, (1, 1, 2), strict=True)]
        print(f"| {nodes} | {' | '.join(cells)} |")


def repeat(kernels: str) -> None:
    """Run this command again in a process with other kernels."""
    sys.stdout.flush()
    subprocess.run([sys.executable, *sys.argv], env={**os.environ, SWITCH: kernels}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--passes", type=int, default=40, help="of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        target = Target.load(arguments.model, dtype=arguments.dtype, device="cpu")
    except ValueError as error:
        sys.exit(str(error))
    measure(target, arguments)
    if target.instructions and SWITCH not in os.environ:
        repeat("torch")


def job_of(target: Target, cache: KVCache, seat: int, nodes: int, context: int) -> Callable[[], object]:
    """One pass; nothing is committed."""
    return lambda: target.score(forest_of(target, nodes, context), cache, [seat])


def measure(target: Target, arguments: argparse.Namespace) -> None:
    """Measure and print parts, and times beside a busy process, with the kernels of this process."""
    lib = library() if target.instructions else None
    kernels = f"compiled kernels ({target.instructions})" if lib else "torch's kernels"
    print(f"\n{Path(arguments.model).name}, {arguments.dtype}, {kernels}, {arguments.context} tokens before; {cpu_name()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    cache, seat = filled(target, arguments.context, max(arguments.nodes))
    jobs = {nodes: job_of(target, cache, seat, nodes, arguments.context) for nodes in arguments.nodes}
    with Others() as others:
        for nodes, job in jobs.items():
            if lib:
                show_parts(nodes, parts(target, lib, job, arguments.passes))
        if lib:
            num_bytes, read = packed_bytes(target.model), reading(packed_bytes(target.model), 9)
            print(f"\nread: {num_bytes / 1e6:.0f} MB in {read:.1f} ms, {num_bytes / read / 1e6:.0f} GB/s")
        show_busy([(nodes, *beside_another(job, arguments.passes)) for nodes, job in jobs.items()])
    print(f"\nother processes used {others.cores or 0:.2f} processors meanwhile")


if __name__ == "__main__":
    main()
