"""Write the prompts to which the embedded target answers when heads learn from it: what it was trained on, without the answers.

python -m recipes.embedded.prompts --data DATA --out prompts.jsonl --count 4000

Conversations keep their turns, for `headstart distill --mode chat` gives every reply anew; texts keep a beginning, to be continued.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from recipes.embedded.sources import SOURCES, Document, documents

WORDS = range(5, 16)  # of a text's beginning
LINES = range(2, 9)  # of a program's beginning
LONGEST = 1200  # characters of a conversation; its prompts must leave room for answers


def prompts(data: Path, count: int, seed: int) -> Iterator[dict]:
    """`count` prompts, drawn from the sources by their shares in pretraining; nothing that is held out there."""
    dice = random.Random(seed)
    shelves = {source.name: [d for d in documents(source, data) if not d.is_held_out] for source in SOURCES}
    shares = [source.share for source in SOURCES]
    while count:
        name = dice.choices(list(shelves), shares)[0]
        found = prompt(dice.choice(shelves[name]), name, dice)
        if found:
            yield found
            count -= 1


def prompt(document: Document, source: str, dice: random.Random) -> dict | None:
    """A conversation, or the beginning of some paragraph or program; None where there is none."""
    if document.messages:
        size = sum(len(message["content"]) for message in document.messages)
        return {"messages": list(document.messages)} if size <= LONGEST else None
    if source == "thealgorithms_python":
        lines = document.text.splitlines()
        start = dice.randrange(max(1, len(lines) - LINES.stop))
        return {"text": "\n".join(lines[start : start + dice.choice(LINES)])}
    paragraphs = [line.split() for line in document.text.splitlines() if len(line.split()) > WORDS.stop]
    return {"text": " ".join(dice.choice(paragraphs)[: dice.choice(WORDS)])} if paragraphs else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds train/")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--count", type=int, default=4000, help="prompts (default 4000)")
    parser.add_argument("--seed", type=int, default=0, help="other prompts (default 0)")
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as file:
        for found in prompts(args.data, args.count, args.seed):
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
