"""`bench --endpoint`: the same measurements of servers, other engines' included."""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import bench_output
from headstart.cli.bench_options import MeasuringOptions
from headstart.cli.options import ModelOptions, quieten, waiting
from headstart.cli.terminal import console, progress

if TYPE_CHECKING:
    from headstart.bench.endpoints.client import Endpoint, EndpointTask
    from headstart.bench.endpoints.measure import EndpointSetup, Measured
    from headstart.bench.endpoints.results import EndpointRow
    from headstart.bench.suites import Case
    from headstart.speculation.params import SamplingParams

_PANEL = "Measuring a server"


def _option(help: str) -> Any:
    return typer.Option(help=help, show_default=False, rich_help_panel=_PANEL)


@dataclass(frozen=True)
class EndpointOptions:
    """The servers that are measured, if any; else the engine of this package is."""

    endpoint: Annotated[
        str | None, _option("URL of an OpenAI-compatible server to measure instead of a model in this process, with its /v1.")
    ] = None
    endpoint_model: Annotated[str | None, _option("Name of the model on the server. Default: the only one that it lists.")] = None
    against: Annotated[
        str | None, _option("URL of the server to compare with, such as the same one without speculation; speed-ups are over it.")
    ] = None
    against_model: Annotated[str | None, _option("Name of the model there. Default: the only one that it lists.")] = None
    api_key_env: Annotated[str | None, _option("Environment variable that holds the API key of both.")] = None

    def check(self, model: ModelOptions, measuring: MeasuringOptions) -> None:
        """Raise ValueError for options that do not go together."""
        from headstart.bench.endpoints.client import run_name

        if self.endpoint is None:
            for name in ("endpoint_model", "against", "against_model", "api_key_env"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} is for an --endpoint; give its URL, or leave it out")
            return
        if self.against_model is not None and self.against is None:
            raise ValueError("--against-model is for a server --against which to compare; give its URL, or leave it out")
        if self.against is not None and run_name(self.against) == run_name(self.endpoint):
            raise ValueError(
                f"--endpoint and --against are both {run_name(self.endpoint)}; give two servers, or leave --against out"
            )
        if self.api_key_env is not None and self.api_key_env not in os.environ:
            raise ValueError(f"--api-key-env names {self.api_key_env}, which is not set")
        if measuring.repeat < 1:
            raise ValueError(f"repeat is {measuring.repeat}; it must be at least 1")
        for field in fields(model):
            if getattr(model, field.name) != field.default:
                option = field.name.replace("_", "-")
                raise ValueError(
                    f"--{option} is for a model in this process, and --endpoint measures a server; leave one of them out"
                )
        if measuring.html is not None:
            raise ValueError("--html compares with plain decoding in this process; with --endpoint use --out, or --format markdown")
        for option, is_set in (("--run", measuring.run), ("--replay", measuring.replay)):
            if is_set:
                raise ValueError(
                    f"{option} is for drafters in this process, and --endpoint measures a server; leave one of them out"
                )

    def connected(self) -> "list[Endpoint]":
        """The servers, the baseline first. Raises ValueError for one that cannot be reached or has no such model."""
        from headstart.bench.endpoints.client import Endpoint

        key = os.environ.get(self.api_key_env or "")
        servers = [(self.against, self.against_model), (self.endpoint, self.endpoint_model)]
        return [Endpoint(url, name, key) for url, name in servers if url is not None]


def bench_endpoints(
    options: EndpointOptions,
    measuring: MeasuringOptions,
    params: "SamplingParams",
    temperatures: Sequence[float],
    sets: "dict[str, list[Case]]",
    as_json: bool,
) -> None:
    """Measure the servers, print the tables and write the files.

    Raises ValueError for what fails; a failure in the middle does so after everything measured before it was printed and written.
    """
    from headstart.bench.endpoints.measure import EndpointSetup, Measured, measure, num_answers

    quieten()
    endpoints = options.connected()
    first = replace(params, temperature=temperatures[0])
    with waiting("answering the first messages of conversations"):
        tasks = _tasks(endpoints[0], sets, first, measuring.raw)
    setups = [EndpointSetup(tasks, replace(params, temperature=one), measuring.rows) for one in temperatures]
    levels, measured = measuring.levels, list[Measured]()
    with progress(len(setups) * num_answers(setups[0], len(endpoints), measuring.repeat, levels)) as on_progress:
        for setup in setups:
            measured.append(measure(setup, endpoints, measuring.repeat, levels, on_progress))
            if measured[-1].failure is not None:
                break
    _report(endpoints, measured, measuring, params, temperatures, as_json)


def _report(
    endpoints: "Sequence[Endpoint]",
    measured: "Sequence[Measured]",
    measuring: MeasuringOptions,
    params: "SamplingParams",
    temperatures: Sequence[float],
    as_json: bool,
) -> None:
    """Print and write all there is. Raises ValueError for a failure, after that, and where no prompt has been answered."""
    from headstart.bench.endpoints import results

    names = [endpoint.name for endpoint in endpoints]
    whole = [one for one in measured if one.usable(names)]
    rows = [*chain.from_iterable(results.rows(one, names) for one in whole)]
    result = _as_json(endpoints, whole, rows, measuring, params, temperatures) if whole else None
    bench_output.write(measuring, result, (line for one in measured for line in results.as_lines(one.setup, one.samples)))
    if result is not None:
        _show("json" if as_json else measuring.format, _title(endpoints, whole), whole, rows, result, measuring.by_kind)
    if failure := measured[-1].failure:
        num = sum(len(one.samples) for one in measured)
        raise ValueError(f"{failure}; the {num} answers before that are {'in the results' if whole else 'too few for results'}")
    if not whole:
        raise ValueError(f"every prompt plus max_tokens={params.max_tokens} exceeds the context of an endpoint; lower --max-tokens")


def _tasks(
    endpoint: "Endpoint", sets: "dict[str, list[Case]]", params: "SamplingParams", raw: bool | None
) -> "tuple[EndpointTask, ...]":
    """The prompts of all sets; later messages of a conversation follow the answers of this endpoint."""
    from headstart.bench.endpoints.client import PromptTooLong
    from headstart.bench.tasks import answered_turns

    def answer(case: "Case") -> str | None:
        try:
            return endpoint.reply(_task(case, "", raw), params).text
        except PromptTooLong:
            return None

    return tuple(_task(case, kind, raw) for kind, cases in sets.items() for case in answered_turns(cases, answer))


def _task(case: "Case", kind: str, raw: bool | None) -> "EndpointTask":
    """A prompt as a message, or as a text to be continued. raw: as for `encode_tasks`."""
    from headstart.bench.endpoints.client import EndpointTask
    from headstart.bench.tasks import messages_of, text_of

    if raw or (raw is None and case.is_beginning):
        return EndpointTask(text=text_of(case), kind=kind, prompt=case.prompt)
    return EndpointTask(messages=tuple(messages_of(case)), kind=kind, prompt=case.prompt)


def _title(endpoints: "Sequence[Endpoint]", measured: "Sequence[Measured]") -> str:
    models = "/".join(dict.fromkeys(endpoint.model for endpoint in endpoints))
    temperatures = "/".join(f"{one.setup.params.temperature:g}" for one in measured)
    setup = measured[0].setup
    return f"{models}, temperature {temperatures}, {len(setup.tasks)} prompts, {setup.rows} at once"


def _as_json(
    endpoints: "Sequence[Endpoint]",
    measured: "Sequence[Measured]",
    rows: "Sequence[EndpointRow]",
    measuring: MeasuringOptions,
    params: "SamplingParams",
    temperatures: Sequence[float],
) -> dict[str, Any]:
    """All results and what they depend on, in the form of `headstart.bench.report.as_json` as far as that is known."""
    from dataclasses import asdict

    import headstart
    from headstart.bench.endpoints.tables import notes
    from headstart.engine.machine import cpu_name

    setup: EndpointSetup = measured[0].setup
    settings = {
        "prompts": measuring.sources,
        "num_prompts": len(setup.tasks),
        "num_skipped": len(set().union(*(one.skipped for one in measured))),
        "repeat": measuring.repeat,
        "rows": setup.rows,
        "concurrency": measuring.levels,
        "temperatures": temperatures,
    } | {name: value for name, value in vars(params).items() if name not in ("n", "logprobs", "temperature")}
    client = {
        "client_cpu": cpu_name(),
        "client_cores": os.cpu_count(),
        "python": platform.python_version(),
        "openai": version("openai"),
        "headstart": headstart.__version__,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    return {
        "model": {"name": endpoints[0].model, "dtype": None},
        "endpoints": [{"run": one.name, "url": one.url, "model": one.model} for one in endpoints],
        "machine": client,
        "settings": settings,
        "labels": ["endpoint"],
        "num_samples": sum(len(one.samples) for one in measured),
        "clean_share": None,
        "runs": [vars(row) | {"identical": row.identical} for row in rows],
        "heads": [],
        "cost": {},
        "concurrency": [asdict(load) for one in measured for load in one.loads],
        "notes": list(notes(measured, rows)),
    }


def _show(
    format: str, title: str, measured: "Sequence[Measured]", rows: "Sequence[EndpointRow]", result: dict[str, Any], by_kind: bool
) -> None:
    from headstart.bench import tables
    from headstart.bench.endpoints.tables import table, table_of_times

    if bench_output.show_text(format, title, result):
        print("".join(f"- {note}\n" for note in result["notes"] if format == "markdown"), end="")
        return
    shown = [table(rows, title), table_of_times(rows)]
    shown += [tables.table_by_kind(rows)] if by_kind else []
    loads = [load for one in measured for load in one.loads]
    shown += [tables.table_of_loads(loads)] if loads else []
    for one in shown:
        console().print(one)
    for note in result["notes"]:
        print(note)
    machine = result["machine"]
    print(f"client: {machine['client_cpu']}, openai {machine['openai']}, headstart {machine['headstart']}: {machine['command']}")
