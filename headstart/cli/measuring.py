"""What `demo` and `bench` share: which drafters run, the progress bar, and a title that says what was measured."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headstart.cli.options import ModelOptions
from headstart.cli.terminal import progress

if TYPE_CHECKING:
    from headstart.bench.runner import Sample, Setup


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
    from headstart.bench import runner

    prepared = runner.prepare(setup, runs)
    with progress(len(prepared) * (1 + repeat * len(setup.tasks))) as on_progress:
        return runner.measure(setup, prepared, repeat, on_progress)


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
