"""Speculative decoding beside llama.cpp's plain decoding and `model.generate`, on one padded target with its own heads.

    python benchmarks/peers/headline.py TARGET HEADS... --work WORK [--planners own best:nodes=5] [--rounds 5] [--json FILE]

Milliseconds per token after the first one, medians over rounds; a round runs all prompts through every run in turn, and
llama-bench. Answers end where they begin to repeat themselves. llama-bench feeds single tokens behind as many as there are in the
middle of an answer, and samples nothing. All run with the same number of threads, and all weights may lie in 2 MiB pages unless
`--pages default` is given. The planner `own` is that of the heads. TARGET and HEADS are made by `pad_target.py` and `pad_heads.py`
in the folder above, from the embedded model; the README beside this file has the commands.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from answers import GENERATE
from gguf_files import ensure_gguf
from llama_bench import BIN, DECODED, Bench, Others, best, merged
from llama_cpp_build import ensure_built
from rich.console import Console
from rich.table import Table
from worker import Worker

from headstart.bench.report import short
from headstart.bench.runner import PLAIN
from headstart.engine.machine import cpu_name

PEER = "llama.cpp, plain"


@dataclass(frozen=True)
class Row:
    """The figures of a run at a temperature.

    median, least: milliseconds per token, over rounds.
    tau: acceptance length; None where nothing is drafted or it is not known.
    others: the most processors that other processes used in a round; None where that is not known.
    """

    run: str
    temperature: float
    median: float
    least: float
    tau: float | None = None
    others: float | None = None


def specs_of(heads: Sequence[str], planners: Sequence[str]) -> list[str]:
    """The runs: every heads with every planner."""
    return [one if planner == "own" else f"{one}@{planner}" for one in heads for planner in planners]


def depth_of(prompts: Sequence[int], answers: Sequence[int]) -> int:
    """Tokens before those of llama-bench, so that its tokens lie around the middle of an average answer."""
    return max(0, round(mean(prompts) + mean(answers) / 2 - DECODED / 2))


def rows_of(temperature: float, rounds: Sequence[Mapping[str, Any]], answers: Sequence[int]) -> list[Row]:
    """Figures from the seconds of every round. answers: lengths; the first token of each is not in the time."""
    num_tokens = sum(length - 1 for length in answers)
    others = max((one["others"] for one in rounds if one["others"] is not None), default=None)
    rows = []
    for run in rounds[0]["seconds"]:
        times = [1000 * one["seconds"][run] / num_tokens for one in rounds]
        tau = rounds[0]["tau"].get(run)
        rows.append(Row(run, temperature, median(times), min(times), tau, others))
    return rows


def speed_up(row: Row, rows: Sequence[Row], peer: str) -> float | None:
    """How many times as fast as another run at the same temperature; None where there is no such run."""
    found = [one for one in rows if (one.run, one.temperature) == (peer, row.temperature)]
    return found[0].median / row.median if found else None


def measure(temperature: float, sources: Path, arguments: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The figures at a temperature, and what qualifies them."""
    words = [arguments.target, "--temperature", str(temperature), "--threads", str(arguments.threads)]
    words += ["--drafters", *specs_of(arguments.heads, arguments.planners), "--max-tokens", str(arguments.max_tokens)]
    words += ["--prompts", *arguments.prompts, *(["--limit", str(arguments.limit)] if arguments.limit else [])]
    gguf = ensure_gguf(Path(arguments.target), "bf16", sources / "gguf-py")
    worker = Worker("answers.py", words, arguments.threads, arguments.pages)
    answers, labels = worker.greeting["answer"], worker.greeting["labels"]
    depth = depth_of(worker.greeting["prompt"], answers)
    bench = Bench(sources / BIN / "llama-bench", arguments.threads, arguments.pages, depth)
    rounds, times, busy = [], [], []
    try:
        for _ in range(arguments.rounds):
            rounds.append(worker.round())
            with Others() as others:
                times.append(bench.run(gguf, [1]))
            busy.append(others.cores or 0.0)
    finally:
        worker.close()
    _, middle, least = best(merged(times), 1, True)
    peer = Row(PEER, temperature, middle, least, None, max(busy))
    return [peer, *rows_of(temperature, rounds, answers)], [*labels, f"{sum(answers)} tokens of {len(answers)} answers"]


def table(rows: Sequence[Row], title: str) -> Table:
    """One row per temperature and run."""
    result = Table(title=title, title_justify="left")
    peers = (PEER, GENERATE, PLAIN)
    headings = ["ms/token", "tau (acceptance length)", *(f"speed-up over\n{peer}" for peer in peers), "others"]
    for column in ("T", "run", *headings):
        result.add_column(column, justify="left" if column == "run" else "right")
    before = None
    for row in rows:
        if before not in (None, row.temperature):
            result.add_section()
        before = row.temperature
        numbers = [row.tau, *(speed_up(row, rows, peer) for peer in peers), row.others]
        cells = ["-" if number is None else f"{number:.2f}" for number in numbers]
        result.add_row(f"{row.temperature:g}", short(row.run), f"{row.median:.1f} ({row.least:.1f})", *cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("heads", nargs="+")
    parser.add_argument("--work", type=Path, required=True, help="folder with llama.cpp; see llama_cpp_build.py")
    parser.add_argument("--planners", nargs="+", default=["own", "best:nodes=5"])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--prompts", nargs="+", default=["stories", "questions"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pages", choices=["huge", "default"], default="huge")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = []
    labels: list[str] = []
    try:
        sources = ensure_built(arguments.work)
        for temperature in arguments.temperatures:
            more, said = measure(temperature, sources, arguments)
            rows += more
            labels.append(f"T={temperature:g}: {', '.join(said)}")
    except ValueError as error:
        sys.exit(str(error))
    machine = f"{cpu_name()}, {arguments.threads} threads, pages {arguments.pages}, torch {torch.__version__}"
    Console(width=170).print(table(rows, f"{Path(arguments.target).name}, bf16; {'; '.join(labels)}; {machine}"))
    if arguments.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        result = {"machine": machine, "labels": labels, "arguments": settings, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
