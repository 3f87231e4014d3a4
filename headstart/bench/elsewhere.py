"""Suites that are not shipped: where each is found, and reading it from the hub where the `datasets` package is installed.

Must not import target, engine or transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from typing import Any


@dataclass(frozen=True)
class Elsewhere:
    """Where a suite is found.

    page: from which its file is downloaded.
    hub: the dataset's id; empty where the hub has none that is known to be the same.
    config, split: of that dataset.
    rename: its fields by the names that prompt files have.
    before: text in front of each prompt.
    """

    page: str
    hub: str = ""
    config: str | None = None
    split: str = "test"
    rename: dict[str, str] = field(default_factory=dict)
    before: str = ""


ELSEWHERE = {
    "spec-bench": Elsewhere("https://github.com/hemingkx/Spec-Bench (data/spec_bench/question.jsonl)"),
    "mt-bench-all": Elsewhere(
        "https://github.com/lm-sys/FastChat (fastchat/llm_judge/data/mt_bench/question.jsonl)",
        "HuggingFaceH4/mt_bench_prompts",
        split="train",
        rename={"turns": "prompt"},
    ),
    "gsm8k-all": Elsewhere("https://github.com/openai/grade-school-math", "openai/gsm8k", "main"),
    "humaneval-all": Elsewhere("https://github.com/openai/human-eval", "openai/openai_humaneval"),
    "cnn-dailymail": Elsewhere(
        "https://huggingface.co/datasets/abisee/cnn_dailymail",
        "abisee/cnn_dailymail",
        "3.0.0",
        rename={"prompt": "article", "reference": "highlights"},
        before="Summarize: ",
    ),
    "mbpp": Elsewhere(
        "https://huggingface.co/datasets/google-research-datasets/mbpp",
        "google-research-datasets/mbpp",
        "full",
        rename={"prompt": "text", "reference": "code"},
    ),
    "alpaca": Elsewhere("https://huggingface.co/datasets/tatsu-lab/alpaca", "tatsu-lab/alpaca", split="train"),
}


def records_of(name: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """The records of a suite, from the hub. limit: only the first so many; None: all.

    Raises ValueError where the hub lacks it, `datasets` is not installed, or the hub cannot be read.
    """
    suite = ELSEWHERE[name]
    if not suite.hub or find_spec("datasets") is None:
        or_else = "" if not suite.hub else ", or install the datasets package, which reads it from the hub"
        raise ValueError(f"suite {name!r} is not shipped; get its JSONL file from {suite.page} and pass --prompts FILE{or_else}")
    import datasets  # type: ignore[import-not-found,unused-ignore]

    try:
        records = list(islice(datasets.load_dataset(suite.hub, suite.config, split=suite.split, streaming=True), limit))
    except Exception as error:  # whatever the network, the hub and that package raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"suite {name!r} cannot be read from the hub ({suite.hub}): {reason}; get its JSONL file from {suite.page} and pass "
            "--prompts FILE"
        ) from error
    return (_renamed(dict(record), suite) for record in records)


def _renamed(fields: dict[str, Any], suite: Elsewhere) -> dict[str, Any]:
    fields |= {ours: fields.pop(theirs) for ours, theirs in suite.rename.items() if theirs in fields}
    if suite.before and isinstance(fields.get("prompt"), str):
        fields["prompt"] = suite.before + fields["prompt"]
    return fields
