"""`demo` and `bench`: plain decoding and drafters side by side, on the same prompts, in one process."""

import json as json_format
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.settings import Json, Model, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from headstart.bench.runner import Sample, Setup, Task
    from headstart.bench.suites import Case
    from headstart.llm import LLM
    from headstart.target import Target

_BENCH = "Measuring"
Raw = Annotated[
    bool | None,
    typer.Option(
        "--raw/--chat",
        help="Prompts as they stand, or through the chat template; left out: as suits them.",
        show_default=False,
        rich_help_panel=_BENCH,
    ),
]


def demo(
    model: Model,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; small greedy models loop, which flatters drafters.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Repeats the answers.")] = 0,
    drafter: Annotated[
        list[str] | None, typer.Option(help="Guess with this one; may be given again.", show_default="all there are")
    ] = None,
    json: Json = False,
) -> None:
    """See it work, plain and guessed.

    Example: headstart demo --max-tokens 96
    """
    from headstart.bench import report, runner, suites
    from headstart.sampling import SamplingParams

    cases = [*suites.SUITES["stories"][:3], suites.SUITES["questions"][0]]
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    llm = model.load(drafter=None, max_rows=1)
    _make_exact(llm.engine.target, model)
    tasks, num_skipped = as_tasks(llm, cases, max_tokens, None, False)
    if num_skipped:
        raise ValueError(f"max_tokens is {max_tokens}; with the demo's prompts that exceeds the context, so lower it")
    setup = runner.Setup(llm.engine.target, tasks, params, llm.stop_ids, model.accept)
    runs = drafter or _available(model)
    samples = _measure(setup, runs, repeat=3)
    found = report.rows(setup, samples)
    if json:
        settings = {"seed": seed, "max_tokens": max_tokens, "temperature": temperature}
        print(json_format.dumps(report.as_json(setup, samples, found, settings)))
        return
    for case, sample in zip(cases, samples[:: len(runs) + 1], strict=False):
        _print_text(case, llm, sample)
    console().print(report.table(found, f"The same text, sooner: {_title(setup, model)}", is_short=True))


def _make_exact(target: "Target", model: Model) -> None:
    """A demonstration shows equality to the bit wherever that can be had, unless it was refused."""
    equipment = target.equipment
    if model.exact is None and equipment is not None and not equipment.is_exact and equipment.why_not is None:
        target.equip(True)


def bench(
    model: Model,
    sampling: Sampling,
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="DRAFTER or DRAFTER@PLANNER, such as lookup@best:nodes=8 or model:PATH@chain:4; may be given again.",
            show_default="all there are",
            rich_help_panel=_BENCH,
        ),
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="A JSONL file, or a built-in suite: stories, questions, edits.", rich_help_panel=_BENCH)
    ] = "stories",
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many prompts.", show_default="all", rich_help_panel=_BENCH)
    ] = None,
    repeat: Annotated[int, typer.Option(help="Measure everything so often.", rich_help_panel=_BENCH)] = 3,
    raw: Raw = None,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay", help="The target runs at full cost, the references of the prompts decide.", rich_help_panel=_BENCH
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Measure drafters against plain decoding.

    Example: headstart bench --model ./talk13M --run lookup --run model:./draft@chain:4 --prompts edits --replay
    """
    from headstart.bench import report, runner, suites

    params = replace(
        sampling.params(), seed=sampling.seed or 0, max_tokens=128 if sampling.max_tokens is None else sampling.max_tokens
    )
    cases = suites.load_cases(prompts, limit)
    if replay and any(case.reference is None for case in cases):
        raise ValueError(f"--replay needs reference answers, which {prompts} does not give for every prompt")
    runs = run if run is not None else _available(model)
    for spec in runs:
        runner.split_spec(spec)
    llm = model.load(drafter=None, max_rows=1)
    tasks, num_skipped = as_tasks(llm, cases, params.max_tokens, raw, replay)
    setup = runner.Setup(llm.engine.target, tasks, params, llm.stop_ids, model.accept, replay)
    samples = _measure(setup, runs, repeat)
    found = report.rows(setup, samples)
    settings = {
        "prompts": prompts,
        "num_skipped": num_skipped,
        "repeat": repeat,
        "chat": _is_chat(llm, raw),
        "exact": model.exact,
    } | {name: value for name, value in vars(params).items() if name not in ("n", "logprobs")}
    result = report.as_json(setup, samples, found, settings)
    if not json:
        console().print(report.table(found, _title(setup, model)))
        _print_caution(result)
    print(json_format.dumps(result))


def _available(model: Model) -> list[str]:
    """Every drafter that needs nothing but the target; the embedded model has its sibling too."""
    from headstart.llm import embedded

    return ["lookup"] if model.model else ["lookup", f"model:{embedded('draft')}"]


# -- tasks ------------------------------------------------------------------------------------------------------------------


def _is_chat(llm: "LLM", raw: bool | None) -> bool:
    if raw is False and llm.tokenizer.chat_template is None:
        raise ValueError(f"{llm.engine.target.name} has no chat template; use --raw")
    return llm.tokenizer.chat_template is not None and not raw


def as_tasks(
    llm: "LLM", cases: "Sequence[Case]", max_tokens: int, raw: bool | None, is_replay: bool
) -> "tuple[tuple[Task, ...], int]":
    """Prompts (and references) as tokens, without those that exceed the context; how many these were."""
    from headstart.bench.runner import Task
    from headstart.text import encode_prompt

    is_chat, context = _is_chat(llm, raw), llm.engine.target.context
    may_continue = raw is not False
    tasks: list[Task] = []
    for case in cases:
        is_said = is_chat and not (case.is_beginning and may_continue)
        prompt = encode_prompt(llm.tokenizer, [{"role": "user", "content": case.prompt}] if is_said else case.prompt)
        reference = llm.tokenizer.encode(case.reference, add_special_tokens=False) if is_replay else None
        if len(prompt) + min(max_tokens, max_tokens if reference is None else len(reference)) <= context:
            tasks.append(Task(tuple(prompt), None if reference is None else tuple(reference)))
    if not tasks:
        raise ValueError(f"every prompt plus max_tokens={max_tokens} exceeds the context of {context} tokens; lower --max-tokens")
    return tuple(tasks), len(cases) - len(tasks)


def _measure(setup: "Setup", runs: Sequence[str], repeat: int) -> "list[Sample]":
    from headstart.bench import runner

    prepared = runner.prepare(setup, runs)
    with progress(len(prepared) * (1 + repeat * len(setup.tasks))) as tell:
        return runner.measure(setup, prepared, repeat, tell)


# -- printing ---------------------------------------------------------------------------------------------------------------


def console() -> Any:
    """For tables on standard output: wide where that is a file or a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


@contextmanager
def progress(total: int) -> "Iterator[Callable[[], None]]":
    """A bar on standard error, if that is a terminal; call what it gives after each of `total` steps."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        bar = shown.add_task("measuring", total=total)
        yield lambda: shown.advance(bar)


def _title(setup: "Setup", model: Model) -> str:
    from headstart.bench.report import cpu_name, labels

    target, params = setup.target, setup.params
    name = model.model or "embedded model"
    words = [name, str(target.dtype).removeprefix("torch."), cpu_name(), f"temperature {params.temperature:g}"]
    return ", ".join([*words, f"{len(setup.tasks)} prompts", *labels(setup)])


def _print_caution(result: dict[str, Any]) -> None:
    clean = result["clean_share"]
    told = "unknown on this system" if clean is None else f"{clean:.0%} of {result['num_samples']}"
    print(f"clean samples (waited at most 2% for a processor): {told}; medians are of these where there are some")
    for row in result["runs"]:
        for split in row["splits"]:
            print(f"{row['run']} differs at {split}")


def _print_text(case: "Case", llm: "LLM", sample: "Sample") -> None:
    from rich.text import Text

    from headstart.text import decode

    answer = decode(llm.tokenizer, sample.tokens)
    console().print(Text.assemble((case.prompt, "bold"), "" if case.is_beginning else "\n", answer, "\n"))
