"""`demo`: plain decoding and drafters side by side, on a few built-in prompts."""

import json as json_format
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.measuring import available_drafters, measure, title_of
from headstart.cli.options import Json, ModelOptions
from headstart.cli.terminal import console

if TYPE_CHECKING:
    from headstart.bench.samples import Sample
    from headstart.bench.suites import Case
    from headstart.engine.llm import LLM


def demo(
    model: ModelOptions,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of each answer.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 is greedy. Greedy answers of small models loop, which flatters drafters.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the answers.")] = 0,
    drafter: Annotated[
        list[str] | None, typer.Option(help="Drafter to run; may be repeated.", show_default="all available")
    ] = None,
    json: Json = False,
) -> None:
    """Compare plain decoding with drafters.

    Prints the answers to a few built-in prompts, then a table of speed and acceptance.

    Example: headstart demo --max-tokens 96
    """
    from headstart.bench import report, runner, suites
    from headstart.bench.tasks import encode_tasks
    from headstart.speculation.params import SamplingParams

    cases = [*suites.SUITES["stories"][:3], suites.SUITES["questions"][0]]
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    llm = model.load(drafter=None, max_rows=1)
    tasks, num_skipped = encode_tasks(llm, cases, max_tokens)
    if num_skipped:
        raise ValueError(f"max_tokens is {max_tokens}; with the demo's prompts that exceeds the context, so lower it")
    setup = runner.Setup(llm.engine.target, tasks, params, llm.stop_ids, model.accept)
    runs = drafter or available_drafters(model)
    samples = measure(setup, runs, repeat=3)
    rows = report.rows(setup, samples)
    if json:
        settings = {"seed": seed, "max_tokens": max_tokens, "temperature": temperature}
        print(json_format.dumps(report.as_json(setup, samples, rows, settings)))
        return
    for case, sample in zip(cases, samples[:: len(runs) + 1], strict=False):
        _print_text(case, llm, sample)
    claim = "The same text, sooner" if model.accept == "coupled" else "Sooner"
    console().print(report.table(rows, f"{claim}: {title_of([setup], model)}", is_short=True))


def _print_text(case: "Case", llm: "LLM", sample: "Sample") -> None:
    from rich.text import Text

    from headstart.text.tokenizer import decode

    answer = decode(llm.tokenizer, sample.tokens)
    console().print(Text.assemble((case.prompt, "bold"), "" if case.is_beginning else "\n", answer, "\n"))
