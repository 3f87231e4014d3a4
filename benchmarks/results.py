"""Measure every table of docs/results.md, and write them into the page.

    python benchmarks/results.py WORK                       # all pieces that WORK has no measurement of, then the page
    python benchmarks/results.py WORK --only embedded       # one piece, anew
    python benchmarks/results.py WORK --only                # only the page, of what was measured

A piece is one `headstart bench` or `headstart tune`, whose JSON is kept as WORK/PIECE.json; delete it to measure again. The padded
target and its heads are made first, from the model that comes with the package, and take 2 GB of disk. A table in the page stands
between `<!-- PIECE -->` and `<!-- end -->`. All pieces take about an hour of two cores that nobody else uses.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.bench.tables import as_markdown
from headstart.drafters.registry import METHODS
from headstart.target.loading import embedded

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
SIZES = ("--hidden", "1024", "--mlp", "2816", "--layers", "36")
HEADS = [name for name in METHODS if (embedded("target").parent / name).is_dir()]
TUNED = ("mtp", "eagle3", "hydra")


def _bench(prompts: Sequence[str], runs: Sequence[str], *more: str) -> list[str]:
    named = [part for run in runs for part in ("--run", run)]
    return ["bench", *(part for suite in prompts for part in ("--prompts", suite)), *named, *more]


_PADDED = ("--model", "{work}/padded")
_FIXED = ("auto", "best:nodes=16,depth=4,width=4,beam=6", "best:nodes=4,depth=4,width=4,beam=6", "chain:4")
_PEERS = ("transformers", "transformers:lookup")
_JOINED = ("lookup", "{work}/mtp", "lookup+{work}/mtp")
_FEW = ("--max-tokens", "48", "--repeat", "1", "--temperature", "0.7")
PIECES: dict[str, list[str]] = {
    "drafters": _bench(
        ["questions"], ["lookup", *(f"{{work}}/{name}" for name in HEADS), "lookup+{work}/mtp", *_PEERS],
        *_PADDED, "--limit", "3", *_FEW,
    ),
    "edits": _bench(["edits"], _JOINED, *_PADDED, "--replay", "--limit", "3", "--max-tokens", "96", "--repeat", "1"),
    "planner": _bench(
        ["questions"], [f"{{work}}/mtp@{planner}" for planner in _FIXED], *_PADDED, "--limit", "4", *_FEW, "--concurrency", "4"
    ),
    "embedded": _bench(["questions", "stories"], ["lookup", *HEADS], "--limit", "4", *_FEW),
}  # fmt: skip
for _heads in TUNED:
    _measured = ["--temperature", "0.7", "--rows", "1", "--rows", "4"]
    PIECES[f"tune-{_heads}"] = ["tune", "{work}/tuned/" + _heads, *_measured]
    PIECES[f"tune-padded-{_heads}"] = ["tune", "{work}/" + _heads, *_PADDED, *_measured]


def prepare(work: Path) -> None:
    """Make the padded target, padded heads, and copies of the heads that `tune` writes plans into."""
    here = Path(__file__).parent
    if not (work / "padded").is_dir():
        _run(sys.executable, here / "pad_target.py", embedded("target"), work / "padded", *SIZES)
    for name in HEADS:
        source = embedded("target").parent / name
        if not (work / name).is_dir():
            _run(sys.executable, here / "pad_heads.py", source, work / "padded", work / name)
        if name in TUNED and not (work / "tuned" / name).is_dir():
            (work / "tuned" / name).mkdir(parents=True)
            for path in source.iterdir():
                (work / "tuned" / name / path.name).write_bytes(path.read_bytes())


def measure(work: Path, piece: str) -> None:
    """Run the command of a piece, and keep its JSON."""
    arguments = [argument.format(work=work) for argument in PIECES[piece]]
    printed = _run(sys.executable, "-m", "headstart", *arguments, "--json")
    (work / f"{piece}.json").write_text(printed, encoding="utf-8")


def _run(*command: object) -> str:
    print(*command, file=sys.stderr)
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


# -- the page ---------------------------------------------------------------------------------------------------------------


def table(piece: str, result: Mapping[str, Any]) -> str:
    """The Markdown of a piece."""
    return _tuned(result) if piece.startswith("tune-") else as_markdown(result, result["machine"]["cpu"]).strip()


def _tuned(result: Mapping[str, Any]) -> str:
    """Expected and achieved speed-ups by number of requests."""
    lines = [
        "| requests | tree | speed-up expected, achieved | tokens/s expected, achieved | tau expected, achieved |",
        "| --- " * 5 + "|",
    ]
    lines += [" | ".join(cells) for cells in _cells(result)]
    return "\n".join(lines)


def _cells(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for achieved in result["achieved"]:
        wanted = achieved["rows"], achieved["temperature"]
        expected = next(one for one in result["expected"] if (one["rows"], one["temperature"]) == wanted)
        best, plain = achieved.get("tree", achieved["plain"]), achieved["plain"]
        ratio = best["tokens_per_second"] / plain["tokens_per_second"]
        drafts = f"{len(expected['paths'])} drafts" if expected["paths"] else "none"
        pairs = (
            f"{expected['speed_up']:.2f}x, {ratio:.2f}x",
            f"{expected['tokens_per_second']:.1f}, {best['tokens_per_second']:.1f}",
            f"{expected['tau']:.2f}, {best['tau']:.2f}",
        )
        yield (f"| {achieved['rows']}", drafts, *pairs[:-1], f"{pairs[-1]} |")


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """The page with these tables in their places."""
    for piece, text in tables.items():
        place = rf"(<!-- {re.escape(piece)} -->\n).*?(?=<!-- end -->)"
        page = re.sub(place, lambda match, text=text: f"{match[1]}\n{text}\n\n", page, flags=re.DOTALL)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models and measurements")
    parser.add_argument(
        "--only", nargs="*", choices=[*PIECES], help="pieces to measure, even those measured before; none: only the page"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    missing = [piece for piece in PIECES if not (options.work / f"{piece}.json").is_file()]
    wanted = missing if options.only is None else options.only
    if wanted:
        prepare(options.work)
    for piece in wanted:
        measure(options.work, piece)
    files = {piece: options.work / f"{piece}.json" for piece in PIECES}
    tables = {piece: table(piece, json.loads(path.read_text(encoding="utf-8"))) for piece, path in files.items() if path.is_file()}
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
