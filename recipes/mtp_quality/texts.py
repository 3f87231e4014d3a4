"""The texts of the experiment: stories, dialogues and instructions, as `recipes.embedded.prepare` wrote them.

The module must not import models.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from headstart.training.packing import Packed
from recipes.embedded.mix import mix

# No code, no arithmetic and no old books: a million parameters cannot learn all of it from so few tokens.
SOURCES = (
    "african_storybook", "pratham_storyweaver", "tinystories_sample", "grimm_fairy_tales", "fairytaleqa_train", "story_requests",
    "sgd", "taskmaster4", "dolly_3k", "gpteacher_roleplay",
)  # fmt: skip


def sources(work: Path) -> dict[str, dict[str, Any]]:
    """The sources of the experiment by name, with their shares."""
    statistics = json.loads((work / "sources.json").read_text())
    return {name: statistics[name] for name in SOURCES}


def train(work: Path, tokens: int) -> dict[str, Any]:
    """`data`, `times` and `epochs` of a run that reads `tokens` tokens, each source in its share."""
    return mix({}, sources(work), work / "tokens", tokens)


def held_out(work: Path, tokens: int, end: int) -> list[np.ndarray]:
    """Complete held-out documents, [tokens] each, each source in its share.

    tokens: of all documents, approximately.
    end: the token that ends a document.
    """
    statistics = sources(work)
    total_share = sum(source["share"] for source in statistics.values())
    documents: list[np.ndarray] = []
    for name, source in statistics.items():
        stream = np.load(work / "tokens" / f"{name}.held_out.npy")
        left = tokens * source["share"] / total_share
        for document in split(stream, end):
            if left > 0:
                documents.append(document)
                left -= len(document)
    return documents


def split(stream: np.ndarray, end: int) -> list[np.ndarray]:
    """The documents of a stream, [tokens] each, that have at least two tokens."""
    return [piece for piece in np.split(stream, np.flatnonzero(stream == end) + 1) if len(piece) > 1]


def write_lines(packed: Packed, path: Path) -> None:
    """Write the blocks of a pretraining run as lines that `headstart train` reads; the loss mask is 1 everywhere."""
    with path.open("w") as file:
        for index in packed.train:
            tokens = packed.texts[index].tokens.tolist()
            file.write(json.dumps({"tokens": tokens, "loss_mask": [1] * len(tokens)}) + "\n")
