"""The table of runs: a column for every quantity that at least one run has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from headstart.bench.html.series import Series
from headstart.bench.html.values import NONE, digits, factor, interval, megabytes, number, percent, span


@dataclass(frozen=True)
class Cell:
    """One value of one run.

    text: as shown.
    note: shown smaller below it, or empty.
    order: the number to sort by, or the text.
    is_best: whether no other run of this temperature is better.
    """

    text: str
    note: str = ""
    order: float | str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Column:
    """A quantity of the runs.

    group: heading above several columns.
    title: heading of this one.
    hint: what it is, in one sentence.
    cell: of one run, None where the run lacks it.
    best: max or min where one value is better than another.
    """

    group: str
    title: str
    hint: str
    cell: Callable[[Mapping[str, Any]], Cell | None]
    best: Callable[[Sequence[float]], float] | None = None

    @property
    def css_class(self) -> str:
        """The class of its cells."""
        return "words" if self.group == "text" else "number"


def _numeric(write: Callable[[float], str], *names: str) -> Callable[[Mapping[str, Any]], Cell | None]:
    def cell(row: Mapping[str, Any]) -> Cell | None:
        value = number(row, *names)
        return None if value is None else Cell(write(value), order=value)

    return cell


def _with_interval(write: Callable[[float], str], name: str, interval_name: str) -> Callable[[Mapping[str, Any]], Cell | None]:
    def cell(row: Mapping[str, Any]) -> Cell | None:
        value, ends = number(row, name), interval(row, interval_name)
        has_width = ends is not None and ends[0] < ends[1]
        return None if value is None else Cell(write(value), span(ends) if ends and has_width else "", value)

    return cell


def _identical(row: Mapping[str, Any]) -> Cell | None:
    words = row.get("identical")
    return None if words is None else Cell(str(words), order=str(words))


COLUMNS = (
    Column("speed", "tokens/s", "Tokens per second over all prompts.", _numeric(lambda v: f"{v:,.1f}", "tokens_per_second"), max),
    Column(
        "speed",
        "speed-up",
        "Over plain decoding, with its 95 % confidence interval.",
        _with_interval(factor, "speed_up", "interval"),
        max,
    ),
    Column("text", "identical", "Whether the text is plain decoding's.", _identical),
    Column(
        "speculation",
        "tau",
        "Acceptance length: tokens per forward of the target.",
        _with_interval(lambda value: f"{value:.2f}", "tau", "tau_interval"),
    ),
    Column(
        "speculation", "forward", "Verification cost: time of a forward over one of plain decoding.", _numeric(factor, "forward")
    ),
    Column("speculation", "drafting", "Share of the time that drafting takes.", _numeric(percent, "shares", "draft")),
    Column("ms per token", "P50", "Half of the tokens take at most this long.", _numeric(digits, "token_ms", "p50"), min),
    Column("ms per token", "P90", "90 of 100 tokens take at most this long.", _numeric(digits, "token_ms", "p90"), min),
    Column("ms per token", "P99", "99 of 100 tokens take at most this long.", _numeric(digits, "token_ms", "p99"), min),
    Column("ms to", "first token", "The median over answers.", _numeric(lambda value: digits(1000 * value), "time_to_first_token")),
    Column("memory in MB", "heads", "Of the drafter's weights.", _numeric(megabytes, "memory", "heads")),
    Column("memory in MB", "cache", "Of the KV cache.", _numeric(megabytes, "memory", "cache")),
)


@dataclass(frozen=True)
class Line:
    """One run. series: its look. cells: as many as there are columns."""

    series: Series
    cells: Sequence[Cell]


@dataclass(frozen=True)
class RunTable:
    """A table of runs.

    columns: those with a value.
    sections: headings with the runs below each; the heading is empty where there is one section only.
    """

    columns: Sequence[Column]
    sections: Sequence[tuple[str, Sequence[Line]]]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings with the number of columns below each."""
        return [(name, len([*some])) for name, some in groupby(self.columns, lambda column: column.group)]

    @property
    def firsts(self) -> list[Column]:
        """The first column of each group."""
        return [next(some) for _, some in groupby(self.columns, lambda column: column.group)]


def run_table(result: Mapping[str, Any], looks: Mapping[str, Series]) -> RunTable:
    """The numbers over all prompts."""
    return _table([(row, row, "") for row in result["runs"]], looks)


def table_by_set(result: Mapping[str, Any], looks: Mapping[str, Series]) -> RunTable | None:
    """The numbers by prompt set; None where there is one set only."""
    rows = result["runs"]
    sets = list(dict.fromkeys(kind for row in rows for kind in row.get("kinds") or ()))
    parts = [(row, numbers, kind) for kind in sets for row in rows if (numbers := (row.get("kinds") or {}).get(kind))]
    return _table(parts, looks) if len(sets) > 1 else None


def _table(parts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], str]], looks: Mapping[str, Series]) -> RunTable:
    """parts: the run, its numbers, and the prompt set that they are of."""
    cells = [[None if _is_foreign(row, column) else column.cell(numbers) for column in COLUMNS] for row, numbers, _ in parts]
    known = [index for index in range(len(COLUMNS)) if any(line[index] is not None for line in cells)]
    columns = [COLUMNS[index] for index in known]
    keys = [(kind, row["temperature"]) for row, _, kind in parts]
    sections: dict[tuple[str, float], list[Line]] = {key: [] for key in keys}
    for line, (row, _, _) in enumerate(parts):
        sections[keys[line]].append(Line(looks[row["run"]], [_marked(cells, keys, line, index) for index in known]))
    has_temperatures = len({temperature for _, temperature in keys}) > 1
    return RunTable(columns, [(_heading(*key, has_temperatures), lines) for key, lines in sections.items()])


def _heading(prompt_set: str, temperature: float, has_temperatures: bool) -> str:
    return ", ".join(filter(None, (prompt_set, f"temperature {temperature:g}" if has_temperatures else "")))


def _is_foreign(row: Mapping[str, Any], column: Column) -> bool:
    """Whether a run is a peer, whose rounds are not timed, and the column is of such times."""
    return bool(row.get("is_peer")) and column.title in ("forward", "drafting")


def _marked(cells: Sequence[Sequence[Cell | None]], keys: Sequence[object], line: int, index: int) -> Cell:
    """A cell, marked where it is the best of its column among the runs of the same key."""
    cell, best = cells[line][index], COLUMNS[index].best
    if cell is None:
        return Cell(NONE)
    rivals = [
        other.order
        for some, key in zip(cells, keys, strict=True)
        if key == keys[line] and (other := some[index]) is not None and isinstance(other.order, float | int)
    ]
    is_best = best is not None and len(rivals) > 1 and cell.order == best(rivals)
    return Cell(cell.text, cell.note, cell.order, is_best)


HEADS_COLUMNS = ("heads", "method", "parameters", "MB", "training tokens", "minutes", "held-out top-1 by depth", "held-out tau")


def heads_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The texts of the table of heads, one list per folder, in the order of `HEADS_COLUMNS`."""
    writers: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("parameters", lambda value: f"{value:,.0f}"),
        ("megabytes", lambda value: megabytes(1e6 * value)),
        ("tokens", lambda value: f"{value:,.0f}"),
        ("minutes", lambda value: f"{value:.1f}"),
    )
    rows = []
    for heads in result.get("heads") or ():
        numbers = [NONE if (value := number(heads, name)) is None else write(value) for name, write in writers]
        top1 = "  ".join(f"{share:.2f}" for share in heads.get("top1") or ()) or NONE
        tau = number(heads, "tau")
        names = [Path(str(heads.get("folder", ""))).name, str(heads.get("method", ""))]
        rows.append([*names, *numbers, top1, NONE if tau is None else f"{tau:.2f}"])
    return rows
