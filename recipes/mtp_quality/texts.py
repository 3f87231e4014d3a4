"""What the experiment reads: stories, dialogues and instructions, as `recipes.embedded.prepare` packed them.

This file knows sources and documents. It refuses to know models.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from headstart.training.packing import Packed
from recipes.embedded.mix import mix

# No code, no sums and no old books: a million parameters cannot learn everything from so little.
SOURCES = (
    "african_storybook", "pratham_storyweaver", "tinystories_sample", "grimm_fairy_tales", "fairytaleqa_train", "story_requests",
    "sgd", "taskmaster4", "dolly_3k", "gpteacher_roleplay",
)  # fmt: skip


def sources(work: Path) -> dict[str, dict[str, Any]]:
    """Of the experiment, with their shares."""
    found = json.loads((work / "sources.json").read_text())
    return {name: found[name] for name in SOURCES}


def train(work: Path, tokens: int) -> dict[str, Any]:
    """`data`, `times` and `epochs` of a run that reads so many tokens, each source in its share."""
    return mix({}, sources(work), work / "tokens", tokens)


def held_out(work: Path, tokens: int, end: int) -> list[np.ndarray]:
    """Whole documents that nobody learns from, [tokens] each, about so many tokens, each source in its share. end: the token that
    ends a document."""
    found = sources(work)
    whole = sum(facts["share"] for facts in found.values())
    documents: list[np.ndarray] = []
    for name, facts in found.items():
        stream = np.load(work / "tokens" / f"{name}.held_out.npy")
        left = tokens * facts["share"] / whole
        for document in split(stream, end):
            if left > 0:
                documents.append(document)
                left -= len(document)
    return documents


def split(stream: np.ndarray, end: int) -> list[np.ndarray]:
    """The documents of a stream, [tokens], those with anything to predict."""
    return [piece for piece in np.split(stream, np.flatnonzero(stream == end) + 1) if len(piece) > 1]


def write_lines(packed: Packed, path: Path) -> None:
    """The very blocks of a pretraining run, as lines that `headstart train` reads: all tokens count."""
    with path.open("w") as file:
        for index in packed.train:
            tokens = packed.texts[index].tokens.tolist()
            file.write(json.dumps({"tokens": tokens, "loss_mask": [1] * len(tokens)}) + "\n")
