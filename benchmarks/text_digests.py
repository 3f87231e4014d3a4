"""Digests of a fixed set of answers of the embedded model: a change that keeps every token prints the same lines before and after.

    python benchmarks/text_digests.py > before.txt     # then, in the changed checkout
    python benchmarks/text_digests.py | diff before.txt -

Each line: drafter, temperature, rows at once, a digest of all tokens and texts, and tau (acceptance length) of that drafter so far.
For one temperature and number of rows, every drafter has the digest of plain decoding.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import headstart

PROMPTS = (
    "Once upon a time", "The river was", "How do I bake bread?", "A list of three animals:", "def add(a, b):", "Yesterday the king",
    "In the morning she", "What is water?",
)  # fmt: skip
EMBEDDED = Path(headstart.__file__).parent / "embedded"
DRAFTERS = (None, "lookup", f"model:{EMBEDDED / 'draft'}", "medusa", "hydra", "eagle", "eagle3", "mtp", "mtp-parallel")


def main() -> None:
    """Print one line per drafter, temperature and number of rows, and the digest of all lines."""
    torch.set_num_threads(1)
    lines = []
    for drafter in DRAFTERS:
        with headstart.load(drafter=drafter, exact=True) as llm:
            for temperature in (0.0, 0.7, 1.0):
                for rows in (1, 8):
                    answers = decode(llm, temperature, rows)
                    content = json.dumps([[answer.token_ids, answer.text] for answer in answers])
                    name = "plain" if drafter is None else drafter.partition(":")[0]
                    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
                    lines.append(f"{name} T={temperature:g} rows={rows} {digest} {llm.stats.tau:.4f}")
                    print(lines[-1], flush=True)
    print("all", hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16])


def decode(llm: headstart.LLM, temperature: float, rows: int) -> list[Any]:
    """Answers to all prompts, one after another (rows = 1) or at once."""
    if rows > 1:
        return llm.generate(PROMPTS, max_tokens=32, temperature=temperature, seed=11)
    top_p = 0.95 if temperature == 1 else None
    return [
        llm.generate(prompt, max_tokens=32, temperature=temperature, top_p=top_p, seed=7 + index)[0]
        for index, prompt in enumerate(PROMPTS)
    ]


if __name__ == "__main__":
    main()
