"""`demo` and `bench`: plain decoding and drafters side by side, on the same prompts, in one process."""

import json as json_format
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.options import Json, Model, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from headstart.bench.runner import Sample, Setup, Task
    from headstart.bench.suites import Case
    from headstart.engine.llm import LLM

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
        list[str] | None, typer.Option(help="Draft with this one; may be given again.", show_default="all there are")
    ] = None,
    json: Json = False,
) -> None:
    """See it work, plain and guessed.

    Example: headstart demo --max-tokens 96
    """
    from headstart.bench import report, runner, suites
    from headstart.speculation.params import SamplingParams

    cases = [*suites.SUITES["stories"][:3], suites.SUITES["questions"][0]]
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    llm = model.load(drafter=None, max_rows=1)
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
    promise = "The same text, sooner" if model.accept == "coupled" else "Sooner"
    console().print(report.table(found, f"{promise}: {_title([setup], model)}", is_short=True))


def bench(
    model: Model,
    sampling: Sampling,
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="DRAFTER or DRAFTER@PLANNER, such as lookup@best:nodes=8, model:PATH@chain:4, HEADS@tree:32; may be given again.",
            show_default="all there are",
            rich_help_panel=_BENCH,
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="A JSONL file, or a built-in suite: stories, questions, edits; may be given again.",
            show_default="stories",
            rich_help_panel=_BENCH,
        ),
    ] = None,
    by_kind: Annotated[
        bool, typer.Option("--by-kind", help="A line per prompt set, too, where there are several.", rich_help_panel=_BENCH)
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(help="Only the first so many prompts, of each set.", show_default="all", rich_help_panel=_BENCH),
    ] = None,
    temperatures: Annotated[
        str | None,
        typer.Option(
            help="Measure everything at each of these, such as 0,0.7,1.", show_default="--temperature", rich_help_panel=_BENCH
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(help="Measure everything so often.", rich_help_panel=_BENCH)] = 3,
    raw: Raw = None,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay", help="The target runs at full cost, the references of the prompts decide.", rich_help_panel=_BENCH
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="File for everything that was measured, as JSON.", show_default="none", rich_help_panel=_BENCH),
    ] = None,
    json: Json = False,
) -> None:
    """Measure drafters against plain decoding.

    Example: headstart bench --model ./talk13M --run lookup --run model:./draft@chain:4 --prompts edits --replay
    """
    from headstart.bench import report, runner
    from headstart.bench import trained_heads as heads

    params = replace(
        sampling.params(), seed=sampling.seed or 0, max_tokens=128 if sampling.max_tokens is None else sampling.max_tokens
    )
    heats = _temperatures(sampling.temperature, temperatures)
    if out is not None:
        _check_place(out)
    sources = prompts or ["stories"]
    sets = _prompt_sets(sources, limit, replay)
    if by_kind and len(sets) == 1:
        raise ValueError(f"--by-kind compares prompt sets, and {sources[0]} is the only one; give --prompts again, or leave it out")
    runs = run if run is not None else _available(model)
    for spec, temperature in product(runs, heats):
        runner.read_spec(spec, temperature)
    llm = model.load(drafter=None, max_rows=1)
    tasks, num_skipped = _all_tasks(llm, sets, params.max_tokens, raw, replay)
    setup = runner.Setup(llm.engine.target, tasks, params, llm.stop_ids, model.accept, replay)
    setups = [replace(setup, params=replace(params, temperature=temperature)) for temperature in heats]
    samples = [_measure(one, runs, repeat) for one in setups]
    found = [row for one, taken in zip(setups, samples, strict=True) for row in report.rows(one, taken)]
    made = heads.trained(runs, setup.target.dtype)
    settings = {
        "prompts": sources,
        "num_skipped": num_skipped,
        "repeat": repeat,
        "chat": _is_chat(llm, raw),
        "exact": model.exact,
        "temperatures": heats,
    } | {name: value for name, value in vars(params).items() if name not in ("n", "logprobs", "temperature")}
    result = report.as_json(setup, [*chain(*samples)], found, settings) | {"heads": [vars(one) for one in made]}
    if out is not None:
        _write(out, result)
    if json:
        print(json_format.dumps(result))
    else:
        console().print(report.table(found, _title(setups, model)))
        for more in ([report.table_by_kind(found)] if by_kind else []) + ([heads.table(made)] if made else []):
            console().print(more)
        _print_caution(result)


def _temperatures(single: float | None, several: str | None) -> tuple[float, ...]:
    if several is None:
        return (single or 0.0,)
    if single is not None:
        raise ValueError("--temperature gives one and --temperatures several; leave one of the two out")
    try:
        found = tuple(map(float, several.split(",")))
    except ValueError:
        raise ValueError(f"temperatures is {several!r}; write numbers with commas between them, such as 0,0.7,1") from None
    if len({*found}) < len(found) or not all(0 <= temperature < math.inf for temperature in found):
        raise ValueError(f"temperatures is {several!r}; each must be 0 or positive, and given once")
    return found


def _prompt_sets(sources: Sequence[str], limit: int | None, is_replay: bool) -> "dict[str, list[Case]]":
    """By name: a suite's own, or a file's without its folder and ending."""
    from headstart.bench import suites

    sets: dict[str, list[Case]] = {}
    for source in sources:
        cases = suites.load_cases(source, limit)
        if is_replay and any(case.reference is None for case in cases):
            raise ValueError(f"--replay needs reference answers, which {source} does not give for every prompt")
        name = Path(source).name.partition(".")[0]
        if name in sets:
            raise ValueError(f"two prompt sets are called {name!r}; give each once, and rename a file if they differ")
        sets[name] = cases
    return sets


def _available(model: Model) -> list[str]:
    """Every drafter that needs nothing but the target, heads in its own files included; the embedded model has a sibling, too."""
    from headstart.drafters.registry import METHODS
    from headstart.formats import inside
    from headstart.target.loading import embedded

    if model.model:
        own = inside(model.model)
        return ["lookup", own.method] if own is not None and not any(own.problems()) else ["lookup"]
    home = embedded("target").parent
    return ["lookup", f"model:{embedded('draft')}", *(name for name in METHODS if (home / name).is_dir())]


# -- tasks ------------------------------------------------------------------------------------------------------------------


def _is_chat(llm: "LLM", raw: bool | None) -> bool:
    if raw is False and llm.tokenizer.chat_template is None:
        raise ValueError(f"{llm.engine.target.name} has no chat template; use --raw")
    return llm.tokenizer.chat_template is not None and not raw


def _all_tasks(
    llm: "LLM", sets: "dict[str, list[Case]]", max_tokens: int, raw: bool | None, is_replay: bool
) -> "tuple[tuple[Task, ...], int]":
    """Those of all prompt sets, each with its set's name; how many were left out."""
    found = {kind: as_tasks(llm, cases, max_tokens, raw, is_replay) for kind, cases in sets.items()}
    tasks = tuple(replace(task, kind=kind) for kind, (some, _) in found.items() for task in some)
    return tasks, sum(num_skipped for _, num_skipped in found.values())


def as_tasks(
    llm: "LLM", cases: "Sequence[Case]", max_tokens: int, raw: bool | None, is_replay: bool
) -> "tuple[tuple[Task, ...], int]":
    """Prompts (and references) as tokens, without those that exceed the context; how many these were."""
    from headstart.bench.runner import Task
    from headstart.text.tokenizer import encode_prompt

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
    with progress(len(prepared) * (1 + repeat * len(setup.tasks))) as on_progress:
        return runner.measure(setup, prepared, repeat, on_progress)


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


def _title(setups: "Sequence[Setup]", model: Model) -> str:
    """setups: alike, but for their temperature."""
    from headstart.bench.report import cpu_name, labels

    setup = setups[0]
    dtype = str(setup.target.dtype).removeprefix("torch.")
    heats = "/".join(f"{one.params.temperature:g}" for one in setups)
    words = [model.model or "embedded model", dtype, cpu_name(), f"temperature {heats}"]
    return ", ".join([*words, f"{len(setup.tasks)} prompts", *labels(setup)])


def _check_place(out: Path) -> None:
    """Before anything is measured: a file that can be written. Raises ValueError where it cannot."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        what = "is a folder" if out.is_dir() else f"is in {out.parent}, which is no folder"
        raise ValueError(f"--out {out} {what}; name a file for what is measured")


def _write(out: Path, result: dict[str, Any]) -> None:
    try:
        out.write_text(json_format.dumps(result) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be written: {error.strerror}; what was measured was {json_format.dumps(result)}"
        ) from None


def _print_caution(result: dict[str, Any]) -> None:
    clean = result["clean_share"]
    told = "unknown on this system" if clean is None else f"{clean:.0%} of {result['num_samples']}"
    print(f"clean samples (waited at most 2% for a processor): {told}; medians are of these where there are some")
    for row in result["runs"]:
        for split in row["splits"]:
            print(f"{row['run']} at temperature {row['temperature']:g} differs at {split}")


def _print_text(case: "Case", llm: "LLM", sample: "Sample") -> None:
    from rich.text import Text

    from headstart.text.tokenizer import decode

    answer = decode(llm.tokenizer, sample.tokens)
    console().print(Text.assemble((case.prompt, "bold"), "" if case.is_beginning else "\n", answer, "\n"))
