"""The tables of endpoints for a terminal, and the sentences below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.table import Table

from headstart.bench.endpoints.measure import Measured
from headstart.bench.endpoints.results import EndpointRow
from headstart.bench.tables import filled, interval_text, lengths_text, percentiles, rates_text, tau_text

Column = tuple[str, Callable[[EndpointRow], str]]
_RUN: Column = ("run", lambda row: row.run)
_TEMPERATURE: Column = ("T", lambda row: f"{row.temperature:g}")
_COMPARED: tuple[Column, ...] = (
    ("speed-up", lambda row: f"{row.speed_up:.2f}x"),
    ("95 % over\nprompts", lambda row: interval_text(row.interval)),
    ("after first\ntoken", lambda row: f"{row.decode_speed_up:.2f}x"),
)
_IDENTICAL: Column = ("identical", lambda row: row.identical)
_SPECULATION: tuple[Column, ...] = (
    ("tau\n(acceptance\nlength)", lambda row: tau_text(row.tau)),
    ("acceptance rate\nby depth", lambda row: rates_text(row.acceptance) or "-"),
    ("loops", lambda row: f"{row.loops:.0%}"),
)
_TIMES: tuple[Column, ...] = (
    ("first token, ms\nP50 / P90 / P99", lambda row: " / ".join(percentiles(row.first_token_ms))),
    ("ms per token\nP50 / P90 / P99", lambda row: " / ".join(percentiles(row.token_ms))),
    ("tokens of a chunk: share of\nchunks with 1, 2, ... in %", lambda row: lengths_text(row.lengths) or "-"),
    ("tau, 95 %", lambda row: interval_text(row.tau_interval)),
)


def table(rows: Sequence[EndpointRow], title: str) -> Table:
    """One line per endpoint and temperature; with several endpoints also the speed-up over the first."""
    compared, identical = (_COMPARED, (_IDENTICAL,)) if len({row.run for row in rows}) > 1 else ((), ())
    columns = (("tokens/s", lambda row: f"{row.tokens_per_second:.1f}"), *compared, *_SPECULATION, *identical)
    return _table(rows, title, columns)


def table_of_times(rows: Sequence[EndpointRow]) -> Table:
    """Times to and between tokens: one line per endpoint and temperature."""
    return _table(rows, "latency", _TIMES)


def _table(rows: Sequence[EndpointRow], title: str, columns: Sequence[Column]) -> Table:
    columns = (_RUN, *([_TEMPERATURE] if len({row.temperature for row in rows}) > 1 else []), *columns)
    return filled(title, [name for name, _ in columns], [[write(row) for _, write in columns] for row in rows])


def notes(measured: Sequence[Measured], rows: Sequence[EndpointRow]) -> Iterator[str]:
    """What the tables do not say: where figures are from, what is missing, and what disturbed the measurement."""
    runs = list(dict.fromkeys(row.run for row in rows))
    for run in runs:
        yield from _about(run, measured)
    for row in rows:
        for split in row.splits:
            yield f"{row.run} differs from {rows[0].run} at {split}"
    for one in measured:
        if one.skipped:
            max_tokens = one.setup.params.max_tokens
            yield f"{len(one.skipped)} prompts are left out: with max_tokens={max_tokens} they exceed the context of an endpoint"


def _about(run: str, measured: Sequence[Measured]) -> Iterator[str]:
    replies = [sample.reply for one in measured for sample in one.samples if sample.run == run]
    sources = {one.speculation[run].source for one in measured if run in one.speculation}
    if sources:
        yield f"{run}: tau and acceptance rates are {' and '.join(sorted(sources))}, over this measurement"
    else:
        yield f"{run} publishes no speculation: it does not speculate, or its /metrics is off (SGLang needs --enable-metrics)"
    if not all(reply.is_counted for reply in replies):
        yield f"{run} does not count the tokens of each chunk, so every token is given the mean time of its answer"
    if repeated := sum(reply.num_attempts - 1 for reply in replies):
        yield f"{run}: {repeated} requests were refused or broke, and were sent again; their times are of the last attempt"
    others = sum(one.others.get(run, 0) for one in measured)
    if others > 0:
        yield f"{run} generated {others} tokens for others meanwhile, so speed and speculation are not of these prompts alone"
