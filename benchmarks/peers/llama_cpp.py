"""Passes of 1, 8 and 16 tokens behind 256: transformers, ours and llama.cpp in turn, in the same minutes.

    python benchmarks/peers/llama_cpp.py --work WORK [--shapes 111M 430M deep] [--dtypes bf16 f32] [--rounds 5] [--json FILE]
    python benchmarks/peers/llama_cpp.py --work WORK --models FOLDER... --dtypes bf16

WORK holds llama.cpp (built on the first call, which takes up to an hour; see `llama_cpp_build.py`), the targets with random weights
and their GGUF files. Every round times one engine after the other; each has a process, and the same number of threads, of its own,
and all weights may lie in 2 MiB pages unless `--pages default` is given. Figures are medians over all samples of all rounds, with
the least in brackets. llama.cpp's are of the better setting of flash attention, for each figure by itself. Its passes of several
tokens are timed twice: `llama.cpp` gives the logits of the last token only, `llama.cpp, all logits` those of every token, as a tree
needs them and as the other engines do it. q8_0 has no counterpart of ours and stands alone. `others` are the processors that other
processes used meanwhile: above .1, measure again.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gguf_files import DTYPES, ensure_gguf
from llama_bench import BIN, Bench, Others, Pass, best, merged
from llama_cpp_build import ensure_built
from rich.console import Console
from rich.table import Table
from targets import SHAPES, write_target
from worker import Worker

from headstart.engine.machine import cpu_name

TORCH_DTYPES = {"bf16": "bfloat16", "f32": "float32"}
ENGINES = ("transformers", "ours, torch's kernels", "ours", "ours, int8", "llama.cpp")
NODES = (1, 8, 16)
PEER = "llama.cpp"  # what ratios are to


@dataclass(frozen=True)
class Figure:
    """Milliseconds of a pass.

    median, least: over all samples.
    note: the setting that was the best.
    """

    median: float
    least: float
    note: str = ""


@dataclass(frozen=True)
class Line:
    """The figures of an engine on a target.

    figures: by number of nodes; `decode`: a token of plain decoding, host included.
    others: processors that other processes used meanwhile, on average; None where that is not known.
    """

    target: str
    dtype: str
    engine: str
    figures: dict[str, Figure]
    others: float | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)


# -- measuring, processes ---------------------------------------------------------------------------------------------------


def worker_of(engine: str, folder: Path, dtype: str, arguments: argparse.Namespace) -> Worker:
    """The process that times an engine's passes."""
    name, _, variant = engine.partition(", ")
    words = [name, str(folder), "--dtype", TORCH_DTYPES[dtype], "--threads", str(arguments.threads)]
    words += ["--weights", "int8"] if variant == "int8" else ["--torch"] if variant else []
    words += ["--context", str(arguments.context), "--repetitions", str(arguments.repetitions)]
    words += ["--nodes", *map(str, arguments.nodes)]
    return Worker("passes.py", words, arguments.threads, arguments.pages)


@contextmanager
def workers(engines: Sequence[str], folder: Path, dtype: str, arguments: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """The processes of the engines that run in one, until the end of the block."""
    with ExitStack() as stack:
        running: dict[str, Worker] = {}
        for engine in engines:
            if engine != PEER and dtype in TORCH_DTYPES and (dtype == "bf16" or "int8" not in engine):
                running[engine] = worker_of(engine, folder, dtype, arguments)
                stack.callback(running[engine].close)
        yield running


# -- figures ----------------------------------------------------------------------------------------------------------------


def figures_of(samples: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    """Figures by name. Of several settings of a pass, `8 dynamic` and `8 static`, the one with the lower median."""
    figures: dict[str, Figure] = {}
    for key, times in samples.items():
        name, _, note = key.partition(" ")
        figure = Figure(median(times), min(times), note)
        if name not in figures or figure.median < figures[name].median:
            figures[name] = figure
    return figures


def llama_figures(times: Mapping[Pass, Sequence[float]], nodes: Sequence[int], all_logits: bool) -> dict[str, Figure]:
    """llama.cpp's figures, by number of nodes."""
    figures = {}
    for count in nodes:
        chosen, middle, least = best(times, count, all_logits)
        note = "flash" if chosen.flash else "no flash"
        figures[str(count)] = Figure(middle, least, note if chosen.repack else f"{note}, no repack")
    return figures


def ratio(line: Line, lines: Sequence[Line], name: str) -> float | None:
    """A figure relative to llama.cpp's of the same target and dtype; None where either is missing.

    Whole decoding is compared with llama.cpp's pass of one token, which is all that its decoding does there.
    """
    peers = [one for one in lines if (one.target, one.dtype, one.engine) == (line.target, line.dtype, PEER)]
    peer = peers[0].figures.get("1" if name == "decode" else name) if peers else None
    own = line.figures.get(name)
    return own.median / peer.median if own and peer else None


def growth(line: Line, name: str) -> float | None:
    """T(n) / T(1) of an engine; None where one of them is missing."""
    one, several = line.figures.get("1"), line.figures.get(name)
    return several.median / one.median if one and several else None


def worst(others: Sequence[float | None]) -> float | None:
    """The most that others used in any round; None where it is not known."""
    return max((one for one in others if one is not None), default=None)


# -- measuring --------------------------------------------------------------------------------------------------------------


def measure(folder: Path, dtype: str, sources: Path, arguments: argparse.Namespace) -> list[Line]:
    """The lines of a target: rounds of every engine in turn."""
    gguf = ensure_gguf(folder, dtype, sources / "gguf-py")
    bench = Bench(sources / BIN / "llama-bench", arguments.threads, arguments.pages, arguments.context)
    llama_rounds: list[dict[Pass, list[float]]] = []
    said: dict[str, list[dict[str, Any]]] = {}
    busy: list[float | None] = []
    with workers(arguments.engines, folder, dtype, arguments) as running:
        for _ in range(arguments.rounds):
            for engine, worker in running.items():
                said.setdefault(engine, []).append(worker.round())
            if PEER in arguments.engines:
                with Others() as others:
                    llama_rounds.append(bench.run(gguf, arguments.nodes, arguments.repetitions))
                busy.append(others.cores)
    lines = [own_line(folder.name, dtype, engine, rounds) for engine, rounds in said.items()]
    if llama_rounds:
        times = merged(llama_rounds)
        for name, all_logits in ((PEER, False), (f"{PEER}, all logits", True)):
            lines.append(Line(folder.name, dtype, name, llama_figures(times, arguments.nodes, all_logits), worst(busy)))
    return lines


def own_line(target: str, dtype: str, engine: str, rounds: Sequence[Mapping[str, Any]]) -> Line:
    """The line of an engine with a process of its own."""
    samples = merged([one["ms"] for one in rounds])
    return Line(target, dtype, engine, figures_of(samples), worst([one["others"] for one in rounds]), samples)


# -- printing ---------------------------------------------------------------------------------------------------------------


def table(lines: Sequence[Line], nodes: Sequence[int], title: str) -> Table:
    """One row per target, dtype and engine."""
    result = Table(title=title, title_justify="left")
    names = [*map(str, nodes), "decode"]
    growing = [str(count) for count in nodes if count > 1]
    headings = [f"ms, {count}" for count in nodes] + ["ms/token"]
    headings += [f"/ {PEER}, {count}" for count in nodes] + ["ms/token\n/ llama.cpp"]
    for column in ("target", "dtype", "engine", *headings, *(f"T({name})/T(1)" for name in growing), "others"):
        result.add_column(column, justify="left" if column in ("target", "dtype", "engine") else "right")
    before = None
    for line in lines:
        if before not in (None, (line.target, line.dtype)):
            result.add_section()
        before = line.target, line.dtype
        cells = [f"{figure.median:.1f} ({figure.least:.1f})" if (figure := line.figures.get(name)) else "-" for name in names]
        ratios = [ratio(line, lines, name) for name in names] + [growth(line, name) for name in growing] + [line.others]
        cells += ["-" if number is None else f"{number:.2f}" for number in ratios]
        result.add_row(line.target, line.dtype, line.engine, *cells)
    return result


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for llama.cpp, targets and GGUF files")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--models", type=Path, nargs="+", help="folders of Llama models, instead of the shapes")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "f32"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["transformers", "ours", "llama.cpp"])
    parser.add_argument("--nodes", nargs="+", type=int, default=list(NODES))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pages", choices=["huge", "default"], default="huge")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=4, help="samples per round")
    parser.add_argument("--minutes", type=float, default=60, help="for building llama.cpp")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def folders_of(arguments: argparse.Namespace) -> list[Path]:
    """The folders of the targets; missing ones of the shapes are written."""
    if arguments.models:
        return list(arguments.models)
    folders = [arguments.work / "models" / name for name in arguments.shapes]
    for folder in folders:
        if not (folder / "config.json").exists():
            write_target(folder, *SHAPES[folder.name])
    return folders


def main() -> None:
    arguments = parse()
    machine = f"{cpu_name()}, {arguments.threads} threads, pages {arguments.pages}, torch {torch.__version__}"
    lines: list[Line] = []
    try:
        sources = ensure_built(arguments.work, arguments.minutes)
        for folder in folders_of(arguments):
            for dtype in arguments.dtypes:
                lines += measure(folder, dtype, sources, arguments)
    except ValueError as error:
        sys.exit(str(error))
    Console(width=200).print(table(lines, arguments.nodes, f"passes behind {arguments.context} tokens; {machine}"))
    if arguments.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        result = {"machine": machine, "arguments": settings, "lines": [asdict(line) for line in lines]}
        arguments.json.write_text(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main()
