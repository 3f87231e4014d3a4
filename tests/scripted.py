"""A drafter that follows a script and knows the answers, and functions that decode requests with an engine."""

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
Script = Callable[[Sequence[int], int], list[Node]]  # (coming tokens, depth limit) -> a tree


def right(depth: int = 99) -> Script:
    """A chain of `depth` right tokens."""
    return lambda coming, limit: [(token, index - 1) for index, token in enumerate(coming[: min(depth, limit)])]


def right_then_wrong(depth: int, vocab: int) -> Script:
    """A chain of `depth` right tokens and two wrong ones after them."""

    def script(coming: Sequence[int], limit: int) -> list[Node]:
        return [
            (token if index < depth else (token + 1) % vocab, index - 1)
            for index, token in enumerate(coming[: min(depth + 2, limit)])
        ]

    return script


def wrong(vocab: int) -> Script:
    """Two siblings with one child each, all wrong."""
    return lambda coming, limit: (
        [((coming[0] + 1) % vocab, ROOT), ((coming[0] + 2) % vocab, ROOT), *([(coming[0], 0), (coming[0], 1)] if limit > 1 else [])]
        if coming
        else []
    )


def random_trees(vocab: int, size: int, seed: int = 0, skill: float = 0.6) -> Script:
    """Trees of 0 to `size` nodes of any shape; a child of a right node is right with probability `skill`."""
    rng = random.Random(seed)

    def script(coming: Sequence[int], limit: int) -> list[Node]:
        nodes: list[Node] = []
        depths: list[int] = []
        is_right: list[bool] = []
        for _ in range(rng.randint(0, size)):
            parent = rng.choice([ROOT, *(node for node, depth in enumerate(depths) if depth < limit)])
            depth = depths[parent] if parent != ROOT else 0
            may_be_right = depth < len(coming) and (parent == ROOT or is_right[parent])
            token = coming[depth] if may_be_right and rng.random() < skill else rng.randrange(vocab)
            if (token, parent) in nodes:
                continue  # siblings are distinct
            nodes.append((token, parent))
            depths.append(depth + 1)
            is_right.append(may_be_right and token == coming[depth])
        return nodes

    return script


@dataclass(frozen=True)
class AsDrafted:
    """A planner that verifies every draft: at most `nodes` per row, at most `depth` deep."""

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
    """A drafter that proposes the tree that a script makes of the coming tokens.

    answers: full texts, prompts included; a row's answer is the one that begins with the row's text.
    """

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
            assert len(text) >= start, "tokens are missing between two calls of extend"
            assert text[start:] == list(tokens[: len(text) - start]), "a kept token has changed"
            text[start:] = tokens

    def propose(self, rows: Rows) -> Drafts:
        tokens: list[int] = []
        parents: list[int] = []
        row_ids: list[int] = []
        depths: list[int] = []
        for row in rows.drafting:
            text, first = self.texts[rows.seats[row]], len(tokens)
            assert (len(text) - 1, text[-1]) == (rows.root_positions[row], rows.roots[row]), "the root is not the last known token"
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
        """The tokens of the answer after `text`, () for an unknown text."""
        return next((answer[len(text) :] for answer in self.answers if list(answer[: len(text)]) == text), ())

    def fork(self, source: int, seat: int, length: int) -> None:
        self.texts[seat] = self.texts[source][:length]

    def free(self, seat: int) -> None:
        self.texts.pop(seat, None)


@dataclass(frozen=True)
class Ask:
    """A prompt and its sampling params, with a seed."""

    prompt: tuple[int, ...]
    params: SamplingParams


def asks(vocab: int, lengths: Sequence[int], max_tokens: Sequence[int], params: SamplingParams, seed: int = 0) -> list[Ask]:
    """Requests with random prompts of these lengths and this many tokens to generate, each with its own seed."""
    rng = random.Random(seed)
    return [
        Ask(tuple(rng.randrange(vocab) for _ in range(length)), replace(params, max_tokens=tokens, seed=seed * 1000 + index))
        for index, (length, tokens) in enumerate(zip(lengths, max_tokens, strict=True))
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
    """The answers, and the engine after them: idle, with every slot free."""
    engine = Engine(target, drafter, planner, max_rows=max_rows, chunk=chunk)
    running: list[Request] = [engine.add(ask.prompt, ask.params) for ask in requests]
    for _ in engine.run():
        engine.seating.check()
    check_empty(engine)
    return [request.output for request in running], engine


def check_empty(engine: Engine) -> None:
    """Assert that the engine is idle and every slot is free."""
    engine.seating.check()
    assert engine.seating.num_free == engine.seating.num_slots
    assert engine.scheduler.is_idle
    assert not any(engine.cache.lengths)


def texts(requests: Sequence[Ask], outputs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts and outputs as full texts, the `answers` of `Scripted`."""
    return [[*ask.prompt, *output] for ask, output in zip(requests, outputs, strict=True)]
