"""Runs that are slower than plain decoding, in words, with what would help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headstart.bench.concurrency import Load
from headstart.bench.results import Row
from headstart.bench.samples import PLAIN
from headstart.bench.tables import short

FEW = 0.35  # acceptance rate of the first draft below which a drafter rarely pays
MUCH = 0.25  # share of the time


def advice(rows: Sequence[Row], num_rows: int = 1) -> Iterator[str]:
    """One sentence for each run of this package below 1.0x. num_rows: requests that ran at once."""
    for row in rows:
        if not row.is_peer and row.speed_up < 1:
            yield f"{_slower(row)} {'; '.join(_remedies(row, num_rows))}"


def advice_on_loads(loads: Sequence[Load]) -> Iterator[str]:
    """One sentence for each run that is slower than plain decoding at some number of rows. loads: plain decoding's too."""
    plain = {(load.temperature, load.rows): load.tokens_per_second for load in loads if load.run == PLAIN}
    slow: dict[tuple[str, float], list[str]] = {}
    for load in loads:
        ratio = load.tokens_per_second / plain[load.temperature, load.rows]
        if ratio < 1:
            slow.setdefault((load.run, load.temperature), []).append(f"{load.rows} rows ({ratio:.2f}x)")
    for (run, temperature), where in slow.items():
        yield (
            f"{short(run)} at temperature {temperature:g} is slower than plain decoding at {', '.join(where)}: draft fewer nodes "
            "there, or nothing"
        )


def _slower(row: Row) -> str:
    where = f"{short(row.run)} at temperature {row.temperature:g}"
    if row.interval[1] >= 1:
        return f"{where} is slower than plain decoding in this measurement ({row.speed_up:.2f}x), but not beyond doubt:"
    return f"{where} is slower than plain decoding ({row.speed_up:.2f}x):"


def _remedies(row: Row, num_rows: int) -> list[str]:
    """What costs the time and what to do about it; at least one."""
    first, drafting = row.acceptance[0] if row.acceptance else 0.0, row.shares.get("draft", 0.0)
    applies_by_remedy = {
        f"only {first:.0%} of the first drafts are kept, so use heads that were trained on this model's own answers, or another "
        "drafter for such prompts": first < FEW,
        f"drafting takes {drafting:.0%} of the time, so draft less deep, such as @chain:2, or with a smaller drafter": (
            drafting > MUCH
        ),
        f"a forward of the drafts costs {row.forward:.2f} times that of one token and gives {row.tau:.2f} tokens, so draft fewer "
        "nodes, such as @best:nodes=4": row.forward > row.tau,
        f"{num_rows} rows fill the processor already, so draft fewer nodes, or nothing": num_rows > 1,
    }
    otherwise = (
        f"{row.tau:.2f} tokens per forward do not pay for drafting and verification on this machine, so draft fewer nodes, such as "
        "@chain:2, or nothing"
    )
    return [remedy for remedy, applies in applies_by_remedy.items() if applies] or [otherwise]
