"""The options of `bench`: what is measured, on which prompts, how often, and where the numbers go.

Must not import torch or transformers at the top, so that `--help` is instant.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headstart.cli.options import MEASURING, Raw

if TYPE_CHECKING:
    from headstart.bench.suites import Case

MOST_ROWS = 32


def _option(help: str, default: str | bool = True) -> Any:
    """default: in words; True: the value itself."""
    return typer.Option(help=help, show_default=default, rich_help_panel=MEASURING)


@dataclass(frozen=True)
class MeasuringOptions:
    """What is measured, on which prompts, how often, and where the numbers go."""

    run: Annotated[
        list[str] | None,
        _option(
            "DRAFTER or DRAFTER@PLANNER to run, such as lookup@best:nodes=8, model:PATH@chain:4, HEADS@tree:32, or the generate of "
            "transformers: transformers, transformers:lookup, transformers:model:PATH; may be repeated.",
            default="all available",
        ),
    ] = None
    prompts: Annotated[
        list[str] | None,
        _option(
            "A JSONL file, or a suite: stories, questions, edits, mt-bench, gsm8k, humaneval, summaries, translation, qa, "
            "retrieval, or categories (those of Spec-Bench); may be repeated.",
            default="stories",
        ),
    ] = None
    by_kind: Annotated[
        bool, typer.Option("--by-kind", help="Print speed-up and tau per prompt set too.", rich_help_panel=MEASURING)
    ] = False
    limit: Annotated[int | None, _option("Use only the first N prompts of each set.", default="all")] = None
    temperatures: Annotated[
        str | None, _option("Sampling temperatures to measure at, such as 0,0.7,1.", default="--temperature")
    ] = None
    repeat: Annotated[int, _option("Number of measurements per prompt and run.")] = 3
    rows: Annotated[int, _option("Number of requests that run at once.")] = 1
    concurrency: Annotated[
        str | None,
        _option("Then measure throughput and time per token at these numbers of requests at once, such as 1,4,16.", default="none"),
    ] = None
    raw: Raw = None
    replay: Annotated[
        bool,
        typer.Option(
            "--replay", help="Run the target at full cost, but emit the prompts' reference answers.", rich_help_panel=MEASURING
        ),
    ] = False
    format: Annotated[Literal["table", "json", "csv", "markdown"], _option("How the numbers are printed.")] = "table"
    out: Annotated[Path | None, _option("File to write all measurements to, as JSON.", default="none")] = None
    save: Annotated[
        Path | None, _option("File to write every answer to, as JSONL: prompt, run, tokens, times, text.", default="none")
    ] = None
    html: Annotated[Path | None, _option("File to write a report with plots to: one HTML page.", default="none")] = None

    @property
    def sources(self) -> list[str]:
        """Suites and files of prompts."""
        return self.prompts or ["stories"]

    @property
    def levels(self) -> tuple[int, ...]:
        """The numbers of rows to measure throughput at. Raises ValueError for what is no such list."""
        from headstart.bench.concurrency import read_levels

        return () if self.concurrency is None else read_levels(self.concurrency)

    def check(self) -> None:
        """Raise ValueError for what can be refused before a model is loaded."""
        if not 1 <= self.rows <= MOST_ROWS:
            raise ValueError(f"rows is {self.rows}; it must be from 1 to {MOST_ROWS}")
        levels = self.levels
        if self.replay and (self.rows > 1 or levels):
            raise ValueError("--replay follows one text at a time; leave out --rows and --concurrency")
        files = {"--out": self.out, "--save": self.save, "--html": self.html}
        for name, path in files.items():
            if path is not None:
                check_file(name, path)
        if self.html is not None:
            from headstart.bench.html_report import check_html

            check_html(self.html)
        paths = [path.absolute() for path in files.values() if path is not None]
        if len({*paths}) < len(paths):
            raise ValueError(f"{paths[-1]} is named for two outputs; name a file for each of --out, --save and --html")

    def read_prompt_sets(self) -> "dict[str, list[Case]]":
        """The prompt sets by name, read before a model is loaded. Raises ValueError for one that cannot be read."""
        from headstart.bench.tasks import read_prompt_sets

        sets = read_prompt_sets(self.sources, self.limit, self.replay)
        if self.by_kind and len(sets) == 1:
            raise ValueError(
                f"--by-kind compares prompt sets, and {self.sources[0]} is the only one; give --prompts again, or leave it out"
            )
        return sets

    def all_temperatures(self, single: float | None) -> tuple[float, ...]:
        """The temperatures to measure at.

        single: the value of --temperature.
        Raises ValueError where both options are given, or a value is not a temperature.
        """
        if self.temperatures is None:
            return (single or 0.0,)
        if single is not None:
            raise ValueError("--temperature gives one and --temperatures several; leave one of the two out")
        try:
            temperatures = tuple(map(float, self.temperatures.split(",")))
        except ValueError:
            raise ValueError(
                f"temperatures is {self.temperatures!r}; write numbers with commas between them, such as 0,0.7,1"
            ) from None
        if len({*temperatures}) < len(temperatures) or not all(0 <= temperature < math.inf for temperature in temperatures):
            raise ValueError(f"temperatures is {self.temperatures!r}; each must be 0 or positive, and given once")
        return temperatures


def check_file(option: str, path: Path) -> None:
    """Raise ValueError where no file can be written, before anything is measured. option: that named it."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir():
        reason = "is a folder" if path.is_dir() else f"is in {path.parent}, which is no folder"
    elif (error := _refusal(path)) is not None:
        reason = f"cannot be written: {error.strerror or error}"
    else:
        return
    raise ValueError(f"{option} {path} {reason}; name a file to write the measurements to")


def _refusal(path: Path) -> OSError | None:
    """Why a file cannot be opened for writing. It is left as it was."""
    is_new = not path.exists()
    if not is_new and not path.is_file():
        return None  # a device or a pipe
    try:
        path.open("ab").close()
    except OSError as error:
        return error
    if is_new:
        path.unlink()
    return None
