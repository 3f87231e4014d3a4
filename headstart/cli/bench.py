"""`bench`: plain decoding and drafters side by side, on the same prompts, in one process; or a server."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, product
from typing import TYPE_CHECKING, Any

from headstart.cli import bench_output
from headstart.cli.bench_endpoint import EndpointOptions, bench_endpoints
from headstart.cli.bench_options import MeasuringOptions
from headstart.cli.measuring import Measurement, available_drafters, measure_all, title_of
from headstart.cli.options import Json, ModelOptions, SamplingOptions, waiting

if TYPE_CHECKING:
    from headstart.bench.samples import Setup
    from headstart.bench.suites import Case
    from headstart.engine.llm import LLM
    from headstart.speculation.params import SamplingParams


def bench(
    model: ModelOptions, sampling: SamplingOptions, measuring: MeasuringOptions, endpoints: EndpointOptions, json: Json = False
) -> None:
    """Measure drafters against plain decoding, or a server.

    Prints tokens/s, speed-up, tau (acceptance length), the acceptance rate by depth, latency, memory, and whether the text is
    identical. Intervals are 95 % bootstrap confidence intervals over prompts. The time per token is that of a round divided over
    the tokens that it emitted. With --endpoint, any OpenAI-compatible server is measured with the same prompts, and with --against
    compared with another one.

    Example: headstart bench --model ./talk13M --run lookup --run model:./draft@chain:4 --prompts edits --replay
    """
    from headstart.bench import report, results, trained_heads

    params = sampling.params(seed=sampling.seed or 0, max_tokens=128 if sampling.max_tokens is None else sampling.max_tokens)
    temperatures = measuring.all_temperatures(sampling.temperature)
    measuring.check()
    endpoints.check(model, measuring)
    sets = measuring.read_prompt_sets()
    if endpoints.endpoint is not None:
        bench_endpoints(endpoints, measuring, params, temperatures, sets, json)
        return
    runs = measuring.run if measuring.run is not None else available_drafters(model)
    _check_runs(runs, temperatures, model, params, measuring)
    llm = model.load(drafter=None, max_rows=1)
    setups, num_skipped = _setups(llm, sets, params, temperatures, model.accept, measuring)
    measured = measure_all(setups, runs, measuring.repeat, measuring.levels)
    rows = [*chain.from_iterable(results.rows(one.setup, one.samples, one.memory) for one in measured)]
    settings = _settings(llm, model, measuring, params, temperatures, num_skipped)
    result = report.as_json(setups[0], [sample for one in measured for sample in one.samples], rows, settings)
    result["heads"] = [vars(one) for one in trained_heads.trained(runs, llm.engine.target)]
    result["cost"] = report.cost_curve(next((one.cost for one in measured if one.cost), None), rows)
    result["concurrency"] = [asdict(load) for one in measured for load in one.loads]
    bench_output.write(measuring, result, _lines(measured, llm))
    bench_output.show("json" if json else measuring.format, title_of(setups, model), rows, result, measuring.by_kind)


def _check_runs(
    runs: Sequence[str],
    temperatures: Sequence[float],
    model: ModelOptions,
    params: "SamplingParams",
    measuring: MeasuringOptions,
) -> None:
    """Before a model is loaded. Raises ValueError for a planner that cannot be read, or whose trees were not measured, and for
    a run of transformers that these settings do not allow."""
    from headstart.bench import peers
    from headstart.bench.runner import read_spec

    for spec, temperature in product(runs, temperatures):
        read_spec(spec, temperature, model.model)
    if any(map(peers.is_peer, runs)):
        peers.check_settings(params, is_replay=measuring.replay, rows=measuring.rows, weights=model.weights)


def _setups(
    llm: "LLM",
    sets: "dict[str, list[Case]]",
    params: "SamplingParams",
    temperatures: Sequence[float],
    accept: str,
    measuring: MeasuringOptions,
) -> "tuple[list[Setup], int]":
    """One per temperature, and how many prompts exceed the context and are left out.

    The later messages of conversations follow the answers at the first temperature, so that all temperatures have the same prompts.
    """
    from headstart.bench.samples import Setup
    from headstart.bench.tasks import encode_prompt_sets, with_answers

    first = replace(params, temperature=temperatures[0])
    if any(case.following for cases in sets.values() for case in cases):
        with waiting("answering the first messages of conversations"):
            sets = {name: with_answers(llm, cases, first, measuring.raw) for name, cases in sets.items()}
    tasks, num_skipped = encode_prompt_sets(llm, sets, params.max_tokens, measuring.raw, measuring.replay)
    setup = Setup(llm.engine.target, tasks, params, llm.stop_ids, accept, measuring.replay, measuring.rows)
    return [replace(setup, params=replace(params, temperature=temperature)) for temperature in temperatures], num_skipped


def _settings(
    llm: "LLM",
    model: ModelOptions,
    measuring: MeasuringOptions,
    params: "SamplingParams",
    temperatures: Sequence[float],
    num_skipped: int,
) -> dict[str, Any]:
    """What the numbers depend on, for machines."""
    from headstart.bench.tasks import uses_chat_template

    return {
        "prompts": measuring.sources,
        "num_skipped": num_skipped,
        "repeat": measuring.repeat,
        "rows": measuring.rows,
        "concurrency": measuring.levels,
        "chat": uses_chat_template(llm, measuring.raw),
        "exact": model.exact,
        "weights": model.weights,
        "temperatures": temperatures,
    } | {name: value for name, value in vars(params).items() if name not in ("n", "logprobs", "temperature")}


def _lines(measured: "Sequence[Measurement]", llm: "LLM") -> Iterator[dict[str, Any]]:
    """Every answer, for --save."""
    from headstart.bench.samples import as_line
    from headstart.text.tokenizer import decode

    return (as_line(one.setup, sample, decode(llm.tokenizer, sample.tokens)) for one in measured for sample in one.samples)
