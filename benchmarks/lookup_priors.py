"""The priors of the lookup drafter: how often a follower of each kind is right, and how well its chances are calibrated.

    python benchmarks/lookup_priors.py TOKENIZER FILE...

Each file holds texts (.jsonl or .jsonl.gz with `text` or `messages`; any other file is one text). No model runs: a text's tokens
stand for the target's. The first third of a text is the prompt. A chance is the acceptance probability of a draft.
"""

import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from headstart.drafters.lookup import Record, SuffixAutomaton
from headstart.target.tokenizer_loading import load_tokenizer

MAX_TEXTS, MAX_LENGTH = 60, 1000  # texts per file; tokens per text

Sums = defaultdict[tuple[int, int], list[float]]


def texts(path: Path) -> Iterator[str]:
    """The texts of a file."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        if ".jsonl" not in path.suffixes:
            yield lines.read()
            return
        for line in lines:
            row = json.loads(line)
            yield row["text"] if "text" in row else "\n".join(f"{m['role']}: {m['content']}" for m in row["messages"])


def count(tokens: list[int], kinds: Sums, bins: Sums) -> None:
    """Add the followers of every position in a text: [right, all] by kind and [predicted, right, all] by chance."""
    start = len(tokens) // 3
    text, record = SuffixAutomaton(tokens[:start]), Record()
    for token in tokens[start:]:
        followers, left, is_open = text.followers(text.end, 4), 1.0, True
        for follower in followers:
            is_right, chance = follower.token == token, left * record.chance(follower)
            left -= chance
            add(bins[int(10 * chance), 0], chance, is_right, 1)
            if is_open:
                add(kinds[record.kind(follower)], is_right, 1)
            is_open = is_open and not is_right
        record.learn(followers, token)
        text.extend(token)


def add(sums: list[float], *values: float) -> None:
    """Add values to running sums."""
    sums[:] = [total + value for total, value in zip(sums or [0.0] * len(values), values, strict=True)]


def main(tokenizer_path: str, *files: str) -> None:
    tokenizer, rates, bins = load_tokenizer(tokenizer_path), defaultdict(list), defaultdict(list)
    for path in map(Path, files):
        kinds: Sums = defaultdict(list)
        long_enough = (ids[:MAX_LENGTH] for ids in map(tokenizer.encode, texts(path)) if len(ids) > 150)
        for _, ids in zip(range(MAX_TEXTS), long_enough, strict=False):
            count(ids, kinds, bins)
        for kind, (right, tried) in kinds.items():
            if tried >= 20:
                rates[kind].append(right / tried)
    print("right, mean over files; rows: kind, columns: level of the match's length")
    for kind in range(4):
        print("  ", *(f"{sum(r) / len(r):.2f}" if (r := rates[kind, level]) else " -  " for level in range(6)))
    print("predicted chance: observed (drafts)")
    for _, (predicted, right, tried) in sorted(bins.items()):
        print(f"   {predicted / tried:.2f}: {right / tried:.2f} ({tried:.0f})")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
