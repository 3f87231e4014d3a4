"""Prompts for distilling the embedded target: the texts that it was trained on, without the answers.

python -m recipes.embedded.prompts --data DATA --out prompts.jsonl --count 4000

Conversations keep their turns, since `headstart distill --mode chat` samples every reply; of texts, the beginning is the prompt.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from recipes.embedded.sources import SOURCES, Document, documents

WORDS = range(5, 16)  # of a text's beginning
LINES = range(2, 9)  # of a program's beginning
LONGEST = 1200  # characters of a conversation, so that its prompts leave room for answers


def prompts(data: Path, count: int, seed: int) -> Iterator[dict]:
    """`count` prompts, drawn from the sources by their shares in pretraining, without the held-out documents."""
    generator = random.Random(seed)
    documents_of = {source.name: [d for d in documents(source, data) if not d.is_held_out] for source in SOURCES}
    shares = [source.share for source in SOURCES]
    while count:
        name = generator.choices(list(documents_of), shares)[0]
        drawn = prompt(generator.choice(documents_of[name]), name, generator)
        if drawn:
            yield drawn
            count -= 1


def prompt(document: Document, source: str, generator: random.Random) -> dict | None:
    """A conversation, or the beginning of a paragraph or program; None if the document has none that fits."""
    if document.messages:
        size = sum(len(message["content"]) for message in document.messages)
        return {"messages": list(document.messages)} if size <= LONGEST else None
    if source == "thealgorithms_python":
        lines = document.text.splitlines()
        start = generator.randrange(max(1, len(lines) - LINES.stop))
        return {"text": "\n".join(lines[start : start + generator.choice(LINES)])}
    paragraphs = [line.split() for line in document.text.splitlines() if len(line.split()) > WORDS.stop]
    return {"text": " ".join(generator.choice(paragraphs)[: generator.choice(WORDS)])} if paragraphs else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds train/")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--count", type=int, default=4000, help="prompts (default 4000)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default 0)")
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as file:
        for drawn in prompts(args.data, args.count, args.seed):
            file.write(json.dumps(drawn) + "\n")


if __name__ == "__main__":
    main()
