"""A drafter that was told the answers, and decodes that go through an engine in one line."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from headstart.drafters import Drafter
from headstart.engine.engine import Engine
from headstart.engine.scheduler import Request
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Plan, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.tree import ROOT, Drafts, Kept
from headstart.target.cache import Seating
from headstart.target.target import Target

Node = tuple[int, int]  # a token, and its parent among the nodes of its row
Script = Callable[[Sequence[int], int], list[Node]]  # what will come, and how deep one may draft -> a tree


def right(depth: int = 99) -> Script:
    """A chain that is right down to `depth`, and ends there."""
    return lambda coming, limit: [(token, place - 1) for place, token in enumerate(coming[: min(depth, limit)])]


def right_then_wrong(depth: int, vocab: int) -> Script:
    """A chain that goes on behind its first `depth` tokens, which are right."""

    def script(coming: Sequence[int], limit: int) -> list[Node]:
        return [
            (token if place < depth else (token + 1) % vocab, place - 1)
            for place, token in enumerate(coming[: min(depth + 2, limit)])
        ]

    return script


def wrong(vocab: int) -> Script:
    """Two siblings with a child each, all wrong."""
    return lambda coming, limit: (
        [((coming[0] + 1) % vocab, ROOT), ((coming[0] + 2) % vocab, ROOT), *([(coming[0], 0), (coming[0], 1)] if limit > 1 else [])]
        if coming
        else []
    )


def random_trees(vocab: int, size: int, seed: int = 0, skill: float = 0.6) -> Script:
    """Trees of 0 to `size` nodes in any shape; a node behind right ones is right with the chance `skill`."""
    rng = random.Random(seed)

    def script(coming: Sequence[int], limit: int) -> list[Node]:
        nodes: list[Node] = []
        depths: list[int] = []
        is_right: list[bool] = []
        for _ in range(rng.randint(0, size)):
            parent = rng.choice([ROOT, *(node for node, depth in enumerate(depths) if depth < limit)])
            depth = depths[parent] if parent != ROOT else 0
            could_be = depth < len(coming) and (parent == ROOT or is_right[parent])
            token = coming[depth] if could_be and rng.random() < skill else rng.randrange(vocab)
            if (token, parent) in nodes:
                continue  # siblings are distinct
            nodes.append((token, parent))
            depths.append(depth + 1)
            is_right.append(could_be and token == coming[depth])
        return nodes

    return script


@dataclass(frozen=True)
class AsDrafted:
    """Verifies whatever was drafted: at most `nodes` per row, at most `depth` deep."""

    nodes: int = 24
    depth: int = 8

    def headroom(self, max_rows: int) -> int:
        return self.nodes + 1

    def plan(self, depths: Sequence[int]) -> Plan:
        return Plan(self.depth, self.nodes, self.nodes, self.nodes * len(depths))

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        return drafts.by_row(num_rows)


@dataclass
class Scripted:
    """Drafts what a script makes of the answer. answers: whole texts, prompts included; the one that begins like a row's is its."""

    script: Script
    answers: Sequence[Sequence[int]]
    name: str = "scripted"
    taps: tuple[int, ...] = ()
    slot_bytes: int = 0
    planner: Planner = AsDrafted()
    texts: dict[int, list[int]] = field(default_factory=dict)

    def attach(self, target: Target, seating: Seating) -> None:
        self.texts = {}

    def extend(self, kept: Kept) -> None:
        for seat, tokens, start in zip(kept.seats, kept.texts, kept.starts, strict=True):
            text = self.texts.setdefault(seat, [])
            assert len(text) >= start, "a gap in what the drafter was told"
            assert text[start:] == list(tokens[: len(text) - start]), "what was certain has changed"
            text[start:] = tokens

    def propose(self, rows: Rows) -> Drafts:
        tokens: list[int] = []
        parents: list[int] = []
        row_ids: list[int] = []
        depths: list[int] = []
        for row in rows.drafting:
            text, first = self.texts[rows.seats[row]], len(tokens)
            assert (len(text) - 1, text[-1]) == (rows.root_positions[row], rows.roots[row]), "the root is the last of what is known"
            for token, parent in self.script(self.coming(text), rows.depths[row]):
                tokens.append(token)
                parents.append(parent if parent == ROOT else first + parent)
                row_ids.append(row)
                depths.append(1 if parent == ROOT else depths[first + parent] + 1)
        chances = [0.9**depth for depth in depths]
        drafts = Drafts.of(tokens, parents, row_ids, depths, chances)
        drafts.check()
        return drafts

    def coming(self, text: list[int]) -> Sequence[int]:
        return next((answer[len(text) :] for answer in self.answers if list(answer[: len(text)]) == text), ())

    def fork(self, source: int, seat: int, length: int) -> None:
        self.texts[seat] = self.texts[source][:length]

    def free(self, seat: int) -> None:
        self.texts.pop(seat, None)


@dataclass(frozen=True)
class Ask:
    """A prompt and how it is to be continued; `params.seed` is set."""

    prompt: tuple[int, ...]
    params: SamplingParams


def asks(vocab: int, lengths: Sequence[int], max_tokens: Sequence[int], distribution: SamplingParams, seed: int = 0) -> list[Ask]:
    """Requests with random prompts of these lengths and so many tokens to come, each with a seed of its own."""
    rng = random.Random(seed)
    return [
        Ask(tuple(rng.randrange(vocab) for _ in range(length)), replace(distribution, max_tokens=tokens, seed=seed * 1000 + place))
        for place, (length, tokens) in enumerate(zip(lengths, max_tokens, strict=True))
    ]


def decode(
    target: Target,
    requests: Sequence[Ask],
    drafter: Drafter | None = None,
    planner: Planner | None = None,
    *,
    max_rows: int = 1,
    chunk: int = 256,
) -> tuple[list[list[int]], Engine]:
    """The answers, and the engine as it stands afterwards: idle, with every slot free."""
    engine = Engine(target, drafter, planner, max_rows=max_rows, chunk=chunk)
    running: list[Request] = [engine.add(ask.prompt, ask.params) for ask in requests]
    for _ in engine.run():
        engine.seating.check()
    check_empty(engine)
    return [request.output for request in running], engine


def check_empty(engine: Engine) -> None:
    engine.seating.check()
    assert engine.seating.num_free == engine.seating.num_slots
    assert engine.scheduler.is_idle
    assert not any(engine.cache.lengths)


def texts(requests: Sequence[Ask], outputs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Whole texts, as `Scripted` wants them."""
    return [[*ask.prompt, *output] for ask, output in zip(requests, outputs, strict=True)]
