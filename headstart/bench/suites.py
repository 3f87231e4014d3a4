"""Prompts and reference answers as text: suites, and JSONL files in the formats of published benchmarks.

Must not import target, engine or transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from headstart.bench.elsewhere import ELSEWHERE, records_of
from headstart.text.jsonl import PROMPTS, applied_to, first_text, read_fields

REFERENCES = ("reference", "answer", "canonical_solution", "output")
FOLDER = Path(__file__).parent / "prompts"
SHIPPED = ("mt-bench", "gsm8k", "humaneval", "summaries", "translation", "qa", "retrieval")  # files in `FOLDER`
MIXTURE = "categories"  # the categories of Spec-Bench: suites and the names of their prompts there
_MIXED = {
    "conversation": "mt-bench", "translation": "translation", "summaries": "summaries", "qa": "qa", "maths": "gsm8k",
    "retrieval": "retrieval",
}  # fmt: skip
_PER_CATEGORY = 6


@dataclass(frozen=True)
class Case:
    """A prompt of a benchmark.

    reference: an answer for a replay, or None.
    is_beginning: whether the prompt is the beginning of a text to be continued, rather than a message to an assistant.
    category: its part of the suite; empty where the suite has none.
    history: what was said before: (message, answer) of each turn.
    following: the later messages of the conversation, each asked with the answers to all messages before it.
    """

    prompt: str
    reference: str | None = None
    is_beginning: bool = False
    category: str = ""
    history: tuple[tuple[str, str], ...] = ()
    following: tuple[Case, ...] = ()


def load_cases(source: str, limit: int | None = None) -> list[Case]:
    """The prompts of a suite or of a JSONL file.

    source: a suite's name or a path.
    limit: only the first so many, of each category of `categories`; None: all.
    Raises ValueError, with the line, for what cannot be read, and with where to get it for a suite that is not shipped.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 prompt")
    if source == MIXTURE:
        return [replace(case, category=name) for name, suite in _MIXED.items() for case in load_cases(suite, limit)[:_PER_CATEGORY]]
    if source in SUITES:
        return list(SUITES[source][:limit])
    if source in ELSEWHERE and not Path(source).is_file():
        return _cases(source, enumerate(records_of(source, limit), 1))[:limit]
    path = FOLDER / f"{source}.jsonl" if source in SHIPPED else Path(source)
    if not path.is_file():
        raise ValueError(f"prompts {source!r} is neither a JSONL file nor a suite ({', '.join(names())})")
    return _cases(path, read_fields(path))[:limit]


def names() -> list[str]:
    """The names of all suites, those that are not shipped at the end."""
    return [*SUITES, *SHIPPED, MIXTURE, *ELSEWHERE]


def _cases(source: object, records: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Case]:
    cases = [_from_record(source, number, dict(fields)) for number, fields in records]
    if not cases:
        raise ValueError(f'{source} holds no prompt; write one JSON object per line, such as {{"prompt": "Hello"}}')
    return cases


def _from_record(source: object, number: int, fields: dict[str, Any]) -> Case:
    prompt = first_text(fields, PROMPTS)
    if not prompt:
        raise ValueError(f"line {number} of {source} has no prompt; give one of the fields {', '.join(PROMPTS)}")
    category = fields.get("category")
    return Case(
        prompt + applied_to(fields),
        first_text(fields, REFERENCES),
        category=category if isinstance(category, str) else "",
        following=_following(fields),
    )


def _following(fields: Mapping[str, Any]) -> tuple[Case, ...]:
    """The messages after the first one of `turns`, with their references."""
    turns = next((value for name in PROMPTS if isinstance(value := fields.get(name), list) and value), [])
    references = next((value for name in REFERENCES if isinstance(value := fields.get(name), list)), [])
    pairs = zip_longest(turns[1:], references[1 : len(turns)])
    return tuple(Case(turn, answer if isinstance(answer, str) else None) for turn, answer in pairs if isinstance(turn, str))


# -- built in ---------------------------------------------------------------------------------------------------------------

_STORIES = (
    "Once upon a time there was a little fox who could not sleep",
    "One day Anna found a small blue door behind the old tree",
    "The king had three daughters, and the youngest of them",
    "A long time ago, at the end of the river, there lived a boat builder who",
    "Tom and his grandmother went to the market to buy",
    "There was once a bear who was afraid of the dark. Every evening",
    "It was a cold morning, and the birds in the garden",
    "The little robot had never seen the sea before. When",
)

_QUESTIONS = (
    "Give me three tips for staying healthy.",
    "What is the capital of France, and what is it known for?",
    "How do I boil an egg?",
    "Write a short letter to a friend who has moved away.",
    "A box holds 12 pencils. How many pencils are in 7 boxes?",
    "Explain what a volcano is to a child.",
    "Write a Python function that returns the largest number in a list.",
    "Why do leaves change their colour in autumn?",
)

_FUNCTIONS = (
    """def count_words(text):
    words = {}
    for word in text.split():
        word = word.strip(".,;:!?").lower()
        if not word:
            continue
        if word in words:
            words[word] += 1
        else:
            words[word] = 1
    return words
""",
    """def merge(left, right):
    result = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    result.extend(left[i:])
    result.extend(right[j:])
    return result
""",
    """def find_path(graph, start, goal):
    queue = [start]
    previous = {start: None}
    while queue:
        node = queue.pop(0)
        if node == goal:
            break
        for other in graph[node]:
            if other not in previous:
                previous[other] = node
                queue.append(other)
    path = []
    while goal is not None:
        path.append(goal)
        goal = previous.get(goal)
    return path[::-1]
""",
    """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
""",
)

_RENAMES = (
    ("words", "counts"), ("word", "token"), ("text", "line"),
    ("result", "merged"), ("left", "first"), ("right", "second"),
    ("previous", "parents"), ("node", "place"), ("goal", "target"),
    ("amount", "money"), ("balance", "total"), ("owner", "name"),
)  # fmt: skip


def _edits() -> tuple[Case, ...]:
    """Three names to rename in each function: answers that repeat their input with small changes."""
    return tuple(
        Case(f"Rename {old} to {new} in this code and print all of it:\n\n{code}", re.sub(rf"\b{old}\b", new, code))
        for code, renames in zip(_FUNCTIONS, (_RENAMES[i : i + 3] for i in range(0, 12, 3)), strict=True)
        for old, new in renames
    )


SUITES: dict[str, tuple[Case, ...]] = {
    "stories": tuple(Case(story, is_beginning=True) for story in _STORIES),
    "questions": tuple(map(Case, _QUESTIONS)),
    "edits": _edits(),
}
