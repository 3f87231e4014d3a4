"""From prompts to tasks: prompt sets are read, encoded as the model expects them, and kept where they fit its context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from headstart.bench.samples import Task
from headstart.bench.suites import Case, load_cases
from headstart.engine.llm import LLM
from headstart.speculation.params import SamplingParams
from headstart.text.tokenizer import decode, encode_prompt


def read_prompt_sets(sources: Sequence[str], limit: int | None = None, is_replay: bool = False) -> dict[str, list[Case]]:
    """Prompt sets by name: a suite's own name, or a file's without its folder and suffix; with categories, one set for each.

    The category of a single source names its set; with several sources its name is SOURCE/CATEGORY.

    sources: suites or JSONL files.
    limit: only the first so many prompts of each source; None: all.
    is_replay: every prompt needs a reference answer.
    Raises ValueError for a set that cannot be read, for two of one name, and for a replay without references.
    """
    sets: dict[str, list[Case]] = {}
    for source in sources:
        name, cases = Path(source).name.partition(".")[0], load_cases(source, limit)
        if is_replay and any(turn.reference is None for case in cases for turn in (case, *case.following)):
            raise ValueError(f"--replay needs reference answers, which {source} does not give for every prompt")
        if any(kind.partition("/")[0] == name for kind in sets):
            raise ValueError(f"two prompt sets are called {name!r}; give each once, and rename a file if they differ")
        for case in cases:
            category = case.category if len(sources) == 1 else f"{name}/{case.category}"
            sets.setdefault(category if case.category else name, []).append(case)
    return sets


def encode_prompt_sets(
    llm: LLM, sets: Mapping[str, Sequence[Case]], max_tokens: int, raw: bool | None = None, is_replay: bool = False
) -> tuple[tuple[Task, ...], int]:
    """The tasks of all prompt sets, each with the name of its set, and how many prompts were left out; see `encode_tasks`.

    Raises ValueError where no prompt of a set is left.
    """
    encoded = {kind: encode_tasks(llm, cases, max_tokens, raw, is_replay) for kind, cases in sets.items()}
    tasks = tuple(replace(task, kind=kind) for kind, (tasks_of_set, _) in encoded.items() for task in tasks_of_set)
    return tasks, sum(num_skipped for _, num_skipped in encoded.values())


def encode_tasks(
    llm: LLM, cases: Sequence[Case], max_tokens: int, raw: bool | None = None, is_replay: bool = False
) -> tuple[tuple[Task, ...], int]:
    """Prompts as tokens, and how many were left out because they exceed the context.

    max_tokens: of each answer; with the prompt it must fit the context.
    raw: True: never the chat template; False: always; None: where there is one, but not for the beginning of a text.
    is_replay: encode the reference answers too.
    Raises ValueError where no prompt is left.
    """
    context = llm.engine.target.context
    is_chat = uses_chat_template(llm, raw)
    tasks: list[Task] = []
    for case in cases:
        task = _encode(llm, case, is_chat and not (case.is_beginning and raw is None), is_replay)
        num_answer = max_tokens if task.reference is None else min(max_tokens, len(task.reference))
        if len(task.prompt) + num_answer <= context:
            tasks.append(task)
    if not tasks:
        raise ValueError(f"every prompt plus max_tokens={max_tokens} exceeds the context of {context} tokens; lower --max-tokens")
    return tuple(tasks), len(cases) - len(tasks)


def with_answers(llm: LLM, cases: Sequence[Case], params: SamplingParams, raw: bool | None = None) -> list[Case]:
    """The cases with every later message of a conversation as a case of its own, which has the answers before it in its history.

    These are the references, where there are some, and else the answers of plain decoding, the same for every run.
    params: of these answers.
    raw: as for `encode_tasks`.
    """
    return answered_turns(cases, lambda turn: _answer(llm, turn, params, raw))


def answered_turns(cases: Sequence[Case], answer: Callable[[Case], str | None]) -> list[Case]:
    """The cases with every later message of a conversation as a case of its own.

    answer: gives the reply to a case that has no reference; None where there is no room for it: the conversation ends there.
    """
    asked: list[Case] = []
    for case in cases:
        turn = replace(case, following=())
        asked.append(turn)
        for later in case.following:
            reply = turn.reference if turn.reference is not None else answer(turn)
            if reply is None:
                break
            turn = replace(later, history=(*turn.history, (turn.prompt, reply)), category=case.category)
            asked.append(turn)
    return asked


def _answer(llm: LLM, case: Case, params: SamplingParams, raw: bool | None) -> str | None:
    """The text of plain decoding; None where prompt and answer exceed the context."""
    prompt = _encode(llm, case, uses_chat_template(llm, raw), False).prompt
    if len(prompt) + params.max_tokens > llm.engine.target.context:
        return None
    request = llm.engine.add(prompt, params, stop_ids=llm.stop_ids)
    for _ in llm.engine.run():
        pass
    return decode(llm.tokenizer, request.output)


def uses_chat_template(llm: LLM, raw: bool | None) -> bool:
    """Whether prompts go through the chat template. Raises ValueError where that is asked for and the model has none."""
    if raw is False and llm.tokenizer.chat_template is None:
        raise ValueError(f"{llm.engine.target.name} has no chat template; use --raw")
    return llm.tokenizer.chat_template is not None and not raw


def _encode(llm: LLM, case: Case, is_message: bool, is_replay: bool) -> Task:
    prompt = encode_prompt(llm.tokenizer, messages_of(case) if is_message else text_of(case))
    if not is_replay:
        return Task(tuple(prompt), text=case.prompt)
    assert case.reference is not None, "a replay needs a reference"
    return Task(tuple(prompt), tuple(llm.tokenizer.encode(case.reference, add_special_tokens=False)), text=case.prompt)


def messages_of(case: Case) -> list[dict[str, str]]:
    """What was said before, and the prompt, as messages of a chat."""
    before = [(role, text) for turn in case.history for role, text in zip(("user", "assistant"), turn, strict=True)]
    return [{"role": role, "content": text} for role, text in [*before, ("user", case.prompt)]]


def text_of(case: Case) -> str:
    """For a model without a chat template: all that was said, with blank lines between."""
    return "\n\n".join([*(text for turn in case.history for text in turn), case.prompt])
