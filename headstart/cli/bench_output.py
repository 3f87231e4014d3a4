"""What `bench` prints and writes: tables and sentences, JSON, CSV or Markdown."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headstart.cli.bench_options import MeasuringOptions
from headstart.cli.terminal import console

if TYPE_CHECKING:
    from headstart.bench.results import Row


def show(format: str, title: str, rows: "Sequence[Row]", result: dict[str, Any], by_kind: bool) -> None:
    """Print all results. format: json, csv, markdown, or table."""
    if show_text(format, title, result):
        if format == "markdown":
            print("".join(f"\n- {sentence}" for sentence in _sentences(rows, result)).strip("\n"))
        return
    _print_tables(title, rows, result, by_kind)
    for sentence in _sentences(rows, result):
        print(sentence)


def show_text(format: str, title: str, result: Mapping[str, Any]) -> bool:
    """Print the results as JSON, CSV or Markdown; False for another format."""
    from headstart.bench import tables

    if format == "json":
        print(json.dumps(result))
    elif format == "csv":
        print(tables.as_csv(result), end="")
    elif format == "markdown":
        print(tables.as_markdown(result, title), end="")
    else:
        return False
    return True


def write(measuring: MeasuringOptions, result: dict[str, Any] | None, lines: Iterable[Mapping[str, Any]]) -> None:
    """The files that were asked for. Raises ValueError for one that cannot be written, with the measurements in the message.

    result: None: there are too few answers for results.
    lines: every answer, for --save.
    """
    try:
        if measuring.out is not None and result is not None:
            measuring.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
        if measuring.save is not None:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            measuring.save.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{error.filename} cannot be written: {error.strerror}; the measurements are {json.dumps(result)}"
        ) from None
    if measuring.html is not None and result is not None:
        from headstart.bench.html_report import write_html

        try:
            write_html(measuring.html, result)
        except ValueError as error:
            raise ValueError(f"{error}; the measurements are {json.dumps(result)}") from None


def _print_tables(title: str, rows: "Sequence[Row]", result: dict[str, Any], by_kind: bool) -> None:
    from headstart.bench import tables, trained_heads
    from headstart.bench.concurrency import Load

    shown = [tables.table(rows, title), tables.table_of_times(rows)]
    shown += [tables.table_by_kind(rows)] if by_kind else []
    shown += [tables.table_of_loads([Load(**load) for load in result["concurrency"]])] if result["concurrency"] else []
    shown += [trained_heads.table([trained_heads.Trained(**one) for one in result["heads"]])] if result["heads"] else []
    for table in shown:
        console().print(table)


def _sentences(rows: "Sequence[Row]", result: dict[str, Any]) -> Iterator[str]:
    """What the tables do not say: disturbed samples, prompts left out, differences, peers, slow runs, and the machine."""
    from headstart.bench.advice import advice, advice_on_loads
    from headstart.bench.concurrency import Load

    settings, share = result["settings"], result["clean_share"]
    clean = "unknown on this system" if share is None else f"{share:.0%} of {result['num_samples']}"
    yield f"clean samples (waited at most 2% for a processor): {clean}; medians are of these where there are some"
    if settings["num_skipped"]:
        yield f"{settings['num_skipped']} prompts are left out: with max_tokens={settings['max_tokens']} they exceed the context"
    for row in rows:
        for split in row.splits:
            yield f"{row.run} at temperature {row.temperature:g} differs at {split}"
    yield from _about_peers(rows, settings)
    yield from advice(rows, settings["rows"])
    yield from advice_on_loads([Load(**load) for load in result["concurrency"]])
    machine = result["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "headstart"))
    kernels = f"{machine['threads']} threads of {machine['cores']} cores, {machine['kernels']} kernels"
    yield f"{kernels}, {versions}, seed {settings['seed']}: {machine['command']}"


def _about_peers(rows: "Sequence[Row]", settings: dict[str, Any]) -> Iterator[str]:
    copies = [row.memory.get("copy", 0) for row in rows if row.is_peer]
    if not copies:
        return
    yield f"transformers runs on a copy of the target's weights ({copies[0] / 1e6:.1f} MB), without the kernels of this package"
    if any(row.is_peer and row.temperature > 0 for row in rows):
        yield "transformers draws its own random numbers, so its sampled texts are others, and `identical` does not apply"
    if settings["concurrency"]:
        yield "transformers is left out of the numbers of requests at once: its generate drafts for one request at a time"
