"""The cells of the identity tests: every drafter, distribution and number of rows, on models large enough to say something.

`tests/engine/test_engine_identity.py` runs a few hundred tokens per cell, `benchmarks/identity.py` as many as one likes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from heads import heads_for
from scripted import AsDrafted, Ask, Scripted, decode, random_trees, right, right_then_wrong, texts, wrong
from tiny import cut, tiny

from headstart.bench.identity import Split, find_split
from headstart.drafters import Drafter
from headstart.drafters.draft_model import ModelDrafter
from headstart.drafters.lookup import Lookup
from headstart.engine.drafter_loading import heads_in
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain, Planner, StaticTree
from headstart.target.loading import load_model
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.tokenizer import encode_prompt

ROOT = Path(__file__).parent.parent
MODELS = ROOT.parent / "shared" / "models"  # beside the checkout of those who have it
EMBEDDED = ROOT / "headstart" / "embedded" / "target"

DISTRIBUTIONS = {
    "greedy": SamplingParams(),
    "T=0.7": SamplingParams(temperature=0.7),
    "T=1 top-p 0.9 penalties": SamplingParams(
        temperature=1.0, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1
    ),
}

STORIES = [
    "Once upon a time, there was a little girl named Lily.",
    "Tom had a big red ball. One day, he",
    "The cat sat on the mat. The cat sat on the mat. The cat",
    "One day, a small bird wanted to fly very high. But",
    "S",
    "Ben and Mia went to the park. They saw a big dog. Mia said, \"Look, a big dog!\" Ben said,",
    "It was raining. Sam was sad because he could not play",
    "There was an old man who lived in a house by the sea. Every day he",
]  # fmt: skip


@dataclass(frozen=True)
class SamplingCase:
    """A model under test, prompts for it, and a smaller model that drafts for it."""

    name: str
    target: Target
    prompts: Sequence[tuple[int, ...]]
    draft: Target


@dataclass(frozen=True)
class Cell:
    """One drafter with one distribution, compared with plain decoding.

    rows: requests that ran at once.
    tokens: emitted.
    tau: acceptance length.
    splits: where outputs differ from plain decoding.
    """

    drafter: str
    distribution: str
    rows: int
    tokens: int
    tau: float
    splits: tuple[Split, ...]

    def __str__(self) -> str:
        flips = "; ".join(map(str, self.splits)) or "identical"
        return f"{self.drafter:22} {self.distribution:24} {self.rows:2} rows {self.tokens:6} tokens  tau {self.tau:5.2f}  {flips}"


def sampling_cases(dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], SamplingCase]]:
    """The models that exist: the tiny one always (fp64), others beside the checkout, the embedded one once it is trained."""
    cases: dict[str, Callable[[], SamplingCase]] = {"tiny": tiny_case}
    for name in ("stories260K", "babyllama105", "talk13M"):
        if (MODELS / name / "config.json").is_file():
            cases[name] = lambda name=name: folder_case(name, MODELS / name, dtype)
    if (EMBEDDED / "config.json").is_file():
        cases["embedded"] = lambda: folder_case("embedded", EMBEDDED, dtype)
    return cases


def tiny_case() -> SamplingCase:
    target = tiny("llama")
    rng = random.Random(1)
    prompts = [tuple(rng.randrange(target.vocab) for _ in range(size)) for size in (5, 1, 12, 30, 2, 8, 17, 3)]
    return SamplingCase("tiny", target, prompts, cut(target.model, 2))


def folder_case(name: str, folder: Path, dtype: torch.dtype) -> SamplingCase:
    """A model from a folder, with the kernels that a target has by default."""
    target = Target.load(folder, dtype=dtype, device="cpu")
    tokenizer = load_tokenizer(folder)
    sibling = folder.with_name(folder.name + "-draft") if name != "embedded" else folder.with_name("draft")
    has_sibling = (sibling / "config.json").is_file()
    draft = Target.load(sibling, dtype=dtype, device="cpu") if has_sibling else cut(load_model(folder, dtype, "cpu"), 2)
    return SamplingCase(name, target, [tuple(encode_prompt(tokenizer, prompt)) for prompt in STORIES], draft)


def heads_of(sampling: SamplingCase, kind: str) -> Drafter:
    """For the embedded model the heads that come with it, for any other model untrained heads."""
    shipped = EMBEDDED.with_name(kind)
    return (
        heads_in(shipped, sampling.target) if sampling.name == "embedded" and shipped.is_dir() else heads_for(sampling.target, kind)
    )


Maker = Callable[[SamplingCase, Sequence[Sequence[int]]], tuple[Drafter | None, Planner | None]]


def scripted(
    script: Callable[[int], Callable[[Sequence[int], int], list[tuple[int, int]]]], nodes: int = 16, depth: int = 8
) -> Maker:
    return lambda sampling, answers: (Scripted(script(sampling.target.vocab), answers), AsDrafted(nodes, depth))


# The static tree of EAGLE-1's paper: 25 drafts, five deep.
_PATHS = "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
EAGLE = tuple(tuple(map(int, path)) for path in _PATHS.split(" "))

DRAFTERS: dict[str, Maker] = {
    "none": lambda sampling, answers: (None, None),
    "lookup": lambda sampling, answers: (Lookup(), Best(nodes=10, depth=5)),
    "model, chain": lambda sampling, answers: (ModelDrafter(sampling.draft), Chain(4)),
    "model, static tree": lambda sampling, answers: (ModelDrafter(sampling.draft), StaticTree.full(3, 2, 1)),
    "model, dynamic tree": lambda sampling, answers: (ModelDrafter(sampling.draft), Best(nodes=8, depth=4, width=3, beam=2)),
    "medusa, chain": lambda sampling, answers: (heads_of(sampling, "medusa"), Chain(4)),
    "medusa, dynamic tree": lambda sampling, answers: (heads_of(sampling, "medusa"), Best(nodes=9, depth=4, width=3, beam=4)),
    "hydra, static tree": lambda sampling, answers: (heads_of(sampling, "hydra"), StaticTree.full(3, 2, 1)),
    "hydra++, dynamic tree": lambda sampling, answers: (heads_of(sampling, "hydra++"), Best(nodes=9, depth=4, width=3, beam=2)),
    "mtp, static tree": lambda sampling, answers: (heads_of(sampling, "mtp"), StaticTree.full(3, 2, 1)),
    "mtp, dynamic tree": lambda sampling, answers: (heads_of(sampling, "mtp"), Best(nodes=9, depth=4, width=3, beam=2)),
    "mtp-parallel, dynamic tree": lambda sampling, answers: (
        heads_of(sampling, "mtp-parallel"),
        Best(nodes=9, depth=3, width=3, beam=4),
    ),
    "eagle, static tree": lambda sampling, answers: (heads_of(sampling, "eagle"), StaticTree(EAGLE)),
    "eagle, dynamic tree": lambda sampling, answers: (heads_of(sampling, "eagle"), Best(nodes=12, depth=4, width=4, beam=4)),
    "eagle3, chain": lambda sampling, answers: (heads_of(sampling, "eagle3"), Chain(4)),
    "eagle3, dynamic tree": lambda sampling, answers: (
        heads_of(sampling, "eagle3"),
        Best(nodes=9, depth=5, width=3, beam=3, min_gain=0.1),
    ),
    "scripted right": scripted(lambda vocab: right()),
    "scripted wrong": scripted(wrong),
    "scripted right to 3": scripted(lambda vocab: right_then_wrong(3, vocab)),
    "scripted random trees": scripted(lambda vocab: random_trees(vocab, 14)),
}


def requests_of(sampling: SamplingCase, distribution: SamplingParams, tokens: int, count: int = 8) -> list[Ask]:
    """`count` requests of different length, `tokens` in all, each with its own seed. None stops early."""
    shares = [1 + index % 5 for index in range(count)]
    return [
        Ask(prompt, replace(distribution, max_tokens=max(1, tokens * share // sum(shares)), seed=77 + index, ignore_eos=True))
        for index, (prompt, share) in enumerate(zip(sampling.prompts[:count], shares, strict=True))
    ]


def cells(sampling: SamplingCase, distribution: str, tokens: int, drafters: Sequence[str] = tuple(DRAFTERS)) -> Iterator[Cell]:
    """Every drafter with one distribution: eight requests in an engine of one row, then in one of three rows.

    tokens: emitted in each of these two. All are compared with plain decoding of one row at a time.
    """
    requests = requests_of(sampling, DISTRIBUTIONS[distribution], tokens)
    plain, _ = decode(sampling.target, requests)
    answers = texts(requests, plain)
    for name in drafters:
        for rows in (1, 3):
            drafter, planner = DRAFTERS[name](sampling, answers)
            outputs, engine = decode(sampling.target, requests, drafter, planner, max_rows=rows, chunk=64)
            splits = [
                find_split(sampling.target, ask.prompt, ask.params, expected, actual)
                for ask, expected, actual in zip(requests, plain, outputs, strict=True)
            ]
            yield Cell(
                name, distribution, rows, sum(map(len, outputs)), engine.stats.tau, tuple(split for split in splits if split)
            )
