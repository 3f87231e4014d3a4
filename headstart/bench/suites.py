"""Prompts and reference answers as text: built-in suites, and JSONL files in the formats of published benchmarks.

Must not import target, engine or transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.text.jsonl import PROMPTS, applied_to, first_text, read_fields

REFERENCES = ("reference", "answer", "canonical_solution", "output")


@dataclass(frozen=True)
class Case:
    """A prompt of a benchmark.

    reference: an answer for a replay, or None.
    is_beginning: whether the prompt is the beginning of a text to be continued, rather than a message to an assistant.
    """

    prompt: str
    reference: str | None = None
    is_beginning: bool = False


def load_cases(source: str, limit: int | None = None) -> list[Case]:
    """The prompts of a built-in suite or of a JSONL file.

    source: a suite's name or a path.
    limit: only the first so many; None: all.
    Raises ValueError, with the line, for what cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 prompt")
    cases = SUITES[source] if source in SUITES else _from_file(Path(source))
    return list(cases[:limit])


def _from_file(path: Path) -> list[Case]:
    if not path.is_file():
        raise ValueError(f"prompts {str(path)!r} is neither a JSONL file nor a built-in suite ({', '.join(SUITES)})")
    cases = [_from_record(path, number, fields) for number, fields in read_fields(path)]
    if not cases:
        raise ValueError(f"{path} holds no prompt")
    return cases


def _from_record(path: Path, number: int, fields: dict[str, Any]) -> Case:
    prompt = first_text(fields, PROMPTS)
    if not prompt:
        raise ValueError(f"line {number} of {path} has no prompt; give one of the fields {', '.join(PROMPTS)}")
    return Case(prompt + applied_to(fields), first_text(fields, REFERENCES))


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
