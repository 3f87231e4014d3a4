"""The results of tuning for people and machines: the cost by nodes, the trees by rows, and the words of other engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from headstart.bench.achieved import Speed
from headstart.bench.expected import Expected
from headstart.bench.tuning import AUTO, PLAIN, TREE, Choice, Tuning
from headstart.formats.exports.engine_options import SGLANG, VLLM, ranges, sglang_adaptive, sglang_options, vllm_option
from headstart.speculation.cost import CostModel

DRIFT = 0.1  # a difference of speeds that is told


def as_json(tuning: Tuning) -> dict[str, Any]:
    """The machine, its cost, and what is chosen for it and for the other machine."""
    achieved = [
        {"rows": rows, "temperature": tuning.temperature} | {name: _achieved(speed) for name, speed in speeds.items()}
        for rows, speeds in tuning.achieved.items()
    ]
    here = {"machine": {**tuning.measured.machine}, "cost": tuning.choice.cost.as_dict(), **_choice(tuning.choice)}
    if tuning.hardware is None or tuning.forecast is None:
        return here | {"achieved": achieved}
    other = {"hardware": tuning.hardware.model_dump(), "cost": tuning.forecast.cost.as_dict(), **_choice(tuning.forecast)}
    return here | {"achieved": achieved, "forecast": other}


def _achieved(speed: Speed) -> dict[str, Any]:
    return {"tokens_per_second": speed.tokens_per_second, "tau": speed.tau, "reliability": speed.reliability.as_dict()}


def _choice(choice: Choice) -> dict[str, Any]:
    expected = [
        {
            "temperature": temperature,
            "rows": one.rows,
            "paths": one.paths,
            "tau": one.tau,
            "tokens_per_second": one.tokens_per_second,
            "speed_up": one.speed_up,
        }
        for temperature, by_rows in choice.fastest.items()
        for one in by_rows.values()
    ]
    chains = [
        {"temperature": temperature, "first_rows": first, "last_rows": last, "length": length}
        for temperature, lengths in choice.chains.items()
        for first, last, length in ranges(lengths)
    ]
    return {"expected": expected, "chains": chains}


# -- tables -----------------------------------------------------------------------------------------------------------------


def tables(tuning: Tuning) -> tuple[Table, ...]:
    """The cost by nodes, and the fastest trees by rows; the same for another machine where there is a forecast."""
    here = _cost_table(tuning.choice.cost, "cost of rounds on this machine"), _speed_table(tuning)
    if tuning.hardware is None or tuning.forecast is None:
        return here
    name = tuning.hardware.name
    other = _cost_table(tuning.forecast.cost, f"forecast for {name}: cost of rounds, from its datasheet"), _forecast_table(tuning)
    return *here, *other


def _cost_table(cost: CostModel, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("part of a round", "ms", "ratio to one node"):
        table.add_column(name, justify="left" if name == "part of a round" else "right")
    for nodes, seconds in zip(cost.nodes, cost.seconds, strict=True):
        if nodes & (nodes - 1) == 0:  # powers of two are enough
            table.add_row(f"forward of {_counted(nodes, 'node')}", _ms(seconds), f"{seconds / cost.seconds[0]:.2f}")
    if cost.draft is not None:
        table.add_row("first level of drafting", _ms(cost.draft.first), f"{cost.draft.first / cost.seconds[0]:.2f}")
        for width, seconds in zip(cost.draft.widths, cost.draft.seconds, strict=True):
            if width in (1, 4, 8, 16):
                table.add_row(f"further level of {_counted(width, 'node')}", _ms(seconds), f"{seconds / cost.seconds[0]:.2f}")
    table.add_row("rest of a round", _ms(cost.host_seconds), "")
    table.add_row("rest of a round, more per request", _ms(cost.host_row_seconds), "")
    table.add_row("rest of a round, more per node", _ms(cost.host_node_seconds), "")
    table.add_row("1,000 tokens of context", _ms(1000 * cost.context_seconds), "")
    return table


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"


def _speed_table(tuning: Tuning) -> Table:
    """The fastest tree by temperature and rows, expected and achieved, and how true the chances of the planner's drafts were."""
    more = "achieved", "chosen by itself", "calibration error"
    table = _table("fastest tree for each number of requests at once", tuning.choice, more)
    for temperature, by_rows in tuning.choice.fastest.items():
        for one in by_rows.values():
            speeds = tuning.achieved.get(one.rows, {}) if temperature == tuning.temperature else {}
            plain = speeds[PLAIN].tokens_per_second if speeds else 0.0
            ratios = [f"{speeds[name].tokens_per_second / plain:.2f}x" if plain and name in speeds else "" for name in (TREE, AUTO)]
            error = speeds[AUTO].reliability.error if speeds else None
            table.add_row(*_cells(temperature, one), *ratios, "" if error is None else f"{error:.3f}")
        table.add_section()
    return table


def _forecast_table(tuning: Tuning) -> Table:
    assert tuning.forecast is not None, "there is a forecast"
    name = tuning.hardware.name if tuning.hardware else ""
    table = _table(f"forecast for {name}: fastest tree for each number of requests at once", tuning.forecast, ())
    for temperature, by_rows in tuning.forecast.fastest.items():
        for one in by_rows.values():
            table.add_row(*_cells(temperature, one))
        table.add_section()
    return table


def _table(title: str, choice: Choice, more: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("T", "requests", "tree", "tau, expected", "tokens/s", "speed-up, expected", *more):
        table.add_column(name, justify="left" if name == "tree" else "right")
    return table


def _cells(temperature: float, one: Expected) -> tuple[str, ...]:
    tree = f"{_counted(len(one.paths), 'draft')}, depth {one.depth}" if one.paths else "plain decoding"
    return f"{temperature:g}", str(one.rows), tree, f"{one.tau:.2f}", f"{one.tokens_per_second:.1f}", f"{one.speed_up:.2f}x"


# -- other engines ----------------------------------------------------------------------------------------------------------


def lines(tuning: Tuning, heads: Path) -> Iterator[str]:
    """How much the machine's speed moved, and what to tell other engines about chains, as lines. heads: their folder."""
    yield from _drift(tuning)
    yield from _engine_lines(tuning.method, tuning.choice, "measured on this machine with this engine", heads)
    if tuning.hardware is not None and tuning.forecast is not None:
        yield from _engine_lines(tuning.method, tuning.forecast, f"forecast for {tuning.hardware.name}", heads)


def _drift(tuning: Tuning) -> Iterator[str]:
    """Where plain decoding was another time faster or slower than by the cost that was measured before."""
    for rows, speeds in tuning.achieved.items():
        measured, expected = speeds[PLAIN].tokens_per_second, tuning.choice.fastest[tuning.temperature][rows]
        ratio = measured * expected.plain_seconds / rows
        if ratio and abs(ratio - 1) > DRIFT:
            yield (
                f"plain decoding of {_counted(rows, 'request')} at once ran at {ratio:.2f} times the speed that its measured cost "
                "means: the machine's speed moved meanwhile, so expected and achieved figures are of different moments"
            )


def _engine_lines(method: str, choice: Choice, source: str, heads: Path) -> Iterator[str]:
    exported = f"EXPORTED/{heads.resolve().name}"
    yield f"best chain by batch size ({source}):"
    for temperature, lengths in choice.chains.items():
        spans = ", ".join(f"{_span(first, last)}: {length or 'none'}" for first, last, length in ranges(lengths))
        yield f"  T = {temperature:g}: {spans}"
        if (option := vllm_option(method, lengths, exported)) is not None:
            yield f"    vLLM: {option}"
        for first, last, length in ranges(lengths):
            if (options := sglang_options(method, length, exported)) is not None:
                yield f"    SGLang, {_span(first, last)}: {options}"
        if method in SGLANG and (content := sglang_adaptive(lengths)) is not None:
            yield f"    SGLang, all: --speculative-adaptive --speculative-adaptive-config FILE, with {content} in the file"
    if method not in VLLM:
        yield f"  neither vLLM nor SGLang runs {method} heads"


def _span(first: int, last: int) -> str:
    return f"batch {first}" if first == last else f"batch {first}-{last}"
