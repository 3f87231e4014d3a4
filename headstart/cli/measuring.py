"""What `demo` and `bench` share: which drafters run, the progress bar, and a title that says what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headstart.cli.options import ModelOptions
from headstart.cli.terminal import progress

if TYPE_CHECKING:
    from headstart.bench.concurrency import Load
    from headstart.bench.samples import Sample, Setup
    from headstart.speculation.cost import CostModel


@dataclass(frozen=True)
class Measurement:
    """What was measured at one temperature.

    samples: of all runs.
    memory: of each run, in bytes, as in `Row`.
    loads: throughput by the number of rows.
    cost: of rounds, where a run's planner knows it.
    reliability: of the chances of each run and drafter, for JSON.
    """

    setup: "Setup"
    samples: "list[Sample]"
    memory: dict[str, dict[str, int]]
    loads: "list[Load]"
    cost: "CostModel | None" = None
    reliability: list[dict[str, Any]] = field(default_factory=list)


def available_drafters(model: ModelOptions) -> list[str]:
    """Every drafter that can run with no further files: lookup, the heads in the model's own files, and all that come with the
    embedded model."""
    from headstart.drafters.registry import METHODS
    from headstart.formats import inside
    from headstart.target.loading import embedded

    if model.model:
        heads = inside(model.model)
        return ["lookup", heads.method] if heads is not None and not any(heads.problems()) else ["lookup"]
    folder = embedded("target").parent
    return ["lookup", f"model:{embedded('draft')}", *(name for name in METHODS if (folder / name).is_dir())]


def measure(setup: "Setup", runs: Sequence[str], repeat: int) -> "list[Sample]":
    """All samples of plain decoding and of each run, with a progress bar."""
    return measure_all([setup], runs, repeat)[0].samples


def measure_all(setups: "Sequence[Setup]", runs: Sequence[str], repeat: int, levels: Sequence[int] = ()) -> list[Measurement]:
    """All samples of plain decoding and of each run, with one progress bar, which estimates the time that is left.

    setups: alike but for their temperature.
    levels: numbers of rows to measure throughput at.
    """
    with progress(_num_answers(setups[0], runs, repeat, levels) * len(setups)) as on_progress:
        return [_measure(setup, runs, repeat, levels, on_progress) for setup in setups]


def _num_answers(setup: "Setup", runs: Sequence[str], repeat: int, levels: Sequence[int]) -> int:
    from headstart.bench import concurrency, peers, runner

    num_engines = 1 + sum(not peers.is_peer(run) for run in runs)
    return runner.num_answers(setup, 1 + len(runs), repeat) + concurrency.num_answers(setup, num_engines, levels, repeat)


def _measure(
    setup: "Setup", runs: Sequence[str], repeat: int, levels: Sequence[int], on_progress: Callable[[], None]
) -> Measurement:
    from headstart.bench import concurrency, report, runner
    from headstart.speculation.adaptive import Adaptive

    prepared = runner.prepare(setup, runs)
    samples = runner.measure(setup, prepared, repeat, on_progress)
    reliability = report.reliability(prepared, setup.params.temperature)
    loads = concurrency.sweep(setup, prepared, levels, repeat, on_progress)
    planners = (run.engine.planner for run in prepared if isinstance(run, runner.Run))
    cost = next((planner.cost for planner in planners if isinstance(planner, Adaptive)), None)
    return Measurement(setup, samples, {run.name: run.memory for run in prepared}, loads, cost, reliability)


def title_of(setups: "Sequence[Setup]", model: ModelOptions) -> str:
    """The title of a table: model, precision, processor, temperatures, prompts, labels.

    setups: alike but for their temperature.
    """
    from headstart.bench.report import labels
    from headstart.engine.machine import cpu_name

    setup = setups[0]
    dtype = str(setup.target.dtype).removeprefix("torch.")
    temperatures = "/".join(f"{setup.params.temperature:g}" for setup in setups)
    parts = [model.model or "embedded model", dtype, cpu_name(), f"temperature {temperatures}"]
    return ", ".join([*parts, f"{len(setup.tasks)} prompts", *labels(setup)])
