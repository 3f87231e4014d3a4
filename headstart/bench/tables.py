"""Results as tables: for a terminal, as CSV, and as Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from headstart.bench.concurrency import Load
from headstart.bench.results import Row

if TYPE_CHECKING:
    from headstart.bench.endpoints.results import EndpointRow

NAME = 24  # characters of a run that are kept in one line
NUM_DEPTHS = 6  # acceptance rates and lengths of rounds that are shown


def short(run: str) -> str:
    """The name of a run without the parents of its folder: `model:a/b@chain:4` becomes `model:b@chain:4`, `a/b` becomes `b`,
    `lookup+a/b` becomes `lookup+b`."""
    return re.sub(r"^((?:\w+\+)*(?:\w+:)*)(?:.*/)?([^/@]+)/*(?=@|$)", r"\1\2", run)


def interval_text(interval: Sequence[float]) -> str:
    """An interval in words; empty where it has no width."""
    low, high = interval
    return f"{low:.2f}-{high:.2f}" if high > low else ""


def tau_text(tau: float | None) -> str:
    """An acceptance length; `-` where it is not known."""
    return "-" if tau is None else f"{tau:.2f}"


def rates_text(acceptance: Sequence[float]) -> str:
    """Acceptance rates by depth: `.61 .35`."""
    return " ".join(f"{share:.2f}"[1:] if share < 1 else "1.0" for share in acceptance[:NUM_DEPTHS])


def lengths_text(counts: Sequence[int]) -> str:
    """The share of rounds of each length, the last ones together, in %."""
    shown = [*counts[: NUM_DEPTHS - 1], sum(counts[NUM_DEPTHS - 1 :])] if len(counts) > NUM_DEPTHS else counts
    return " ".join(f"{100 * count / (sum(counts) or 1):.0f}" for count in shown)


def _megabytes(memory: Mapping[str, int]) -> str:
    parts = [memory["heads"], memory["cache"], *([memory["copy"]] if "copy" in memory else [])]
    return " + ".join(f"{part / 1e6:.1f}" for part in parts)


def percentiles(times: Mapping[str, float]) -> list[str]:
    """P50, P90 and P99."""
    return [f"{times[name]:.2f}" for name in ("p50", "p90", "p99")]


# -- for a terminal -----------------------------------------------------------------------------------------------------------

Column = tuple[str, Callable[[Row], str]]
_SHORT: tuple[Column, ...] = (
    ("run", lambda row: short(row.run)),
    ("tokens/s", lambda row: f"{row.tokens_per_second:.1f}"),
    ("speed-up", lambda row: f"{row.speed_up:.2f}x"),
    ("tau\n(acceptance\nlength)", lambda row: f"{row.tau:.2f}"),
    ("identical", lambda row: row.identical),
)
_LONG: tuple[Column, ...] = (
    *_SHORT[:3],
    ("95 % over\nprompts", lambda row: interval_text(row.interval)),
    ("after first\ntoken", lambda row: f"{row.decode_speed_up:.2f}x"),
    _SHORT[3],
    ("acceptance rate\nby depth", lambda row: rates_text(row.acceptance)),
    ("nodes per\nforward", lambda row: f"{row.nodes:.1f}"),
    ("forward\ntime", lambda row: f"{row.forward:.2f}x"),
    ("draft/score/verify/\ncommit/host %", lambda row: "/".join(f"{100 * share:.0f}" for share in row.shares.values())),
    ("loops", lambda row: f"{row.loops:.0%}"),
    _SHORT[4],
)
_TIMES: tuple[Column, ...] = (
    _SHORT[0],
    ("first token\nms", lambda row: f"{1000 * row.time_to_first_token:.1f}"),
    ("ms per token\nP50 / P90 / P99", lambda row: " / ".join(percentiles(row.token_ms))),
    ("tokens of a round: share of\nrounds with 1, 2, ... in %", lambda row: lengths_text(row.lengths)),
    ("tau, 95 %", lambda row: interval_text(row.tau_interval)),
    ("memory in MB: heads + KV cache\n(+ copy of the target)", lambda row: _megabytes(row.memory)),
)
_TEMPERATURE: Column = ("T", lambda row: f"{row.temperature:g}")
_LEFT = ("run", "identical", "prompts")


def table(rows: Sequence[Row], title: str, is_short: bool = False) -> Table:
    """One line per run, and per temperature where there are several. is_short: leave out all but speed, tau and identity."""
    return _table(rows, title, _SHORT if is_short else _LONG)


def table_of_times(rows: Sequence[Row]) -> Table:
    """Times to and between tokens, lengths of rounds, and memory: one line per run and temperature."""
    return _table(rows, "latency and memory", _TIMES)


def _table(rows: Sequence[Row], title: str, columns: Sequence[Column]) -> Table:
    run, *rest = columns
    columns = (run, *([_TEMPERATURE] if len({row.temperature for row in rows}) > 1 else []), *rest)
    return filled(title, [name for name, _ in columns], [[write(row) for _, write in columns] for row in rows])


def filled(title: str, names: Sequence[str], lines: Sequence[list[str]]) -> Table:
    """A table. names: of the columns; lines: their cells, the name of the run first."""
    result = Table(title=title, title_justify="left")
    for name in names:
        width = min(NAME, max(len(line[0]) for line in lines)) if name == "run" and lines else None
        result.add_column(name, justify="left" if name in _LEFT else "right", overflow="fold", min_width=width)
    for line in lines:
        result.add_row(*line)
    return result


def table_by_kind(rows: Sequence[Row | EndpointRow]) -> Table:
    """One line per run, temperature and prompt set."""
    names = ("run", "prompts", "T", "tokens/s", "speed-up", "95 % over\nprompts", "tau (acceptance\nlength)", "tau, 95 %")
    lines = [
        [short(row.run), f"{kind} ({numbers['num_prompts']})", f"{row.temperature:g}", f"{numbers['tokens_per_second']:.1f}",
         f"{numbers['speed_up']:.2f}x", interval_text(numbers["interval"]), tau_text(numbers["tau"]),
         interval_text(numbers["tau_interval"])]
        for row in rows
        for kind, numbers in row.kinds.items()
    ]  # fmt: skip
    return filled("by prompt set", names, lines)


def table_of_loads(loads: Sequence[Load]) -> Table:
    """One line per run, temperature and number of rows."""
    names = ("run", "T", "rows", "tokens/s", "speed-up", "ms per token\nP50", "P90", "P99")
    plain = {(load.temperature, load.rows): load.tokens_per_second for load in reversed(loads)}  # the first run is plain decoding
    lines = [
        [short(load.run), f"{load.temperature:g}", str(load.rows), f"{load.tokens_per_second:.1f}",
         f"{load.tokens_per_second / plain[load.temperature, load.rows]:.2f}x", *percentiles(load.token_ms)]
        for load in loads
    ]  # fmt: skip
    return filled("throughput by the number of requests at once", names, lines)


# -- as text ------------------------------------------------------------------------------------------------------------------


def _records(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One flat record per run, temperature and prompt set; the set of all prompts is called `all`."""
    for row in result["runs"]:
        whole = row | {"num_prompts": result["settings"]["num_prompts"]}
        for prompts, numbers in {"all": whole, **row["kinds"]}.items():
            yield {
                "run": row["run"],
                "temperature": row["temperature"],
                "prompts": prompts,
                "num_prompts": numbers["num_prompts"],
                "tokens_per_second": numbers["tokens_per_second"],
                "speed_up": numbers["speed_up"],
                "speed_up_low": numbers["interval"][0],
                "speed_up_high": numbers["interval"][1],
                "tau": numbers["tau"],
                "tau_low": numbers["tau_interval"][0],
                "tau_high": numbers["tau_interval"][1],
                "time_to_first_token": numbers["time_to_first_token"],
                **{f"token_ms_{name}": value for name, value in numbers["token_ms"].items()},
                **({"forward": row["forward"]} if "forward" in row else {}),
                **{f"{name}_bytes": row["memory"][name] for name in ("heads", "cache") if name in row.get("memory", {})},
                "loops": row["loops"],
                "identical": row["identical"],
            }


def as_csv(result: Mapping[str, Any]) -> str:
    """One line per run, temperature and prompt set, each with the machine, the versions, the seed and the command."""
    common = {
        "rows": result["settings"]["rows"],
        "seed": result["settings"]["seed"],
        "labels": " ".join(result["labels"]),
        "model": result["model"]["name"],
        "dtype": result["model"]["dtype"],
        **result["machine"],
    }
    records = [record | common for record in _records(result)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def as_markdown(result: Mapping[str, Any], title: str) -> str:
    """A table of all runs, one of the numbers of rows where they were measured, and what both depend on."""
    parts = [f"**{title}**", _piped(map(_shortened, _records(result)))]
    if result["concurrency"]:
        parts.append(_piped({name: _cell(value) for name, value in _flat(load).items()} for load in result["concurrency"]))
    machine = [f"{name} {value}" for name, value in result["machine"].items() if name != "command"]
    parts.append(f"{', '.join(machine)}, seed {result['settings']['seed']}\n\n`{result['machine']['command']}`")
    return "\n\n".join(parts) + "\n"


def _shortened(record: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a record that fit a page."""
    return {
        "run": short(record["run"]),
        "T": f"{record['temperature']:g}",
        "prompts": f"{record['prompts']} ({record['num_prompts']})",
        "tokens/s": f"{record['tokens_per_second']:.1f}",
        "speed-up": f"{record['speed_up']:.2f}x",
        "95 %": interval_text((record["speed_up_low"], record["speed_up_high"])),
        "tau": tau_text(record["tau"]),
        "first token, ms": f"{1000 * record['time_to_first_token']:.1f}",
        "P50 / P90 / P99, ms per token": " / ".join(f"{record[f'token_ms_{name}']:.2f}" for name in ("p50", "p90", "p99")),
        "identical": record["identical"],
    }


def _flat(load: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: value for name, value in load.items() if name != "token_ms"}
    return named | {f"{name}, ms": value for name, value in load["token_ms"].items()}


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _piped(lines: Any) -> str:
    """A Markdown table of dictionaries with the same keys."""
    records = list(lines)
    rows = [list(records[0]), ["---"] * len(records[0]), *(list(record.values()) for record in records)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
