"""Recorded rounds: what a drafter would propose behind every token of an answer, to be played under any planner.

An answer does not depend on what is drafted, and what a drafter proposes depends on the text alone. So one recording of large trees
serves every planner whose trees are prunings of them, and gives the exact rounds that it would have run. Their time follows from a
measured cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from headstart.drafters import Drafter
from headstart.engine.engine import Engine
from headstart.engine.memory import request_bytes
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Plan
from headstart.speculation.tree import ROOT, Drafts
from headstart.target.target import Target


@dataclass(frozen=True)
class Tree:
    """What a drafter proposed behind one token.

    children: per node, the indices of its children by rank; first the root's, then those of node 0, 1, ...
    chances: per node, its chance (acceptance probability) given its parent.
    is_right: per node, whether the answer goes on with the node and all its ancestors.
    """

    children: tuple[tuple[int, ...], ...]
    chances: tuple[float, ...]
    is_right: tuple[bool, ...]


@dataclass(frozen=True)
class Recording:
    """An answer, and what was proposed behind each of its tokens.

    temperature: of sampling. num_prompt: tokens of the prompt. trees: behind each token of the answer but the last.
    """

    temperature: float
    num_prompt: int
    trees: tuple[Tree, ...]


@dataclass
class _Keeper:
    """A planner that keeps what was drafted, and verifies none of it."""

    largest: Plan
    drafts: list[Drafts] = field(default_factory=list)

    def headroom(self, max_rows: int) -> int:
        return 1 + self.largest.width * (1 + (self.largest.depth - 1) * self.largest.beam)

    def plan(self, depths: Sequence[int]) -> Plan:
        return self.largest

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        self.drafts.append(drafts)
        return Drafts.none(drafts.tokens.device)


def record(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    largest: Plan,
    stop_ids: Sequence[int] = (),
    on_answer: Callable[[], None] = lambda: None,
) -> list[Recording]:
    """The recordings of the answers to some prompts, whose seeds are `mix(params.seed, index)`.

    largest: the trees to record.
    on_answer: called after each answer.
    """
    keeper = _Keeper(largest)
    memory = request_bytes(target, drafter, keeper, max(map(len, prompts)) + params.max_tokens)
    engine = Engine(target, drafter, keeper, max_rows=1, memory=memory)
    recordings = []
    for index, prompt in enumerate(prompts):
        keeper.drafts.clear()
        request = engine.add(prompt, replace(params, seed=mix(params.seed or 0, index)), stop_ids=stop_ids)
        for _ in engine.run():
            pass
        answer = request.output
        trees = [_tree(drafts, answer[place + 1 :]) for place, drafts in enumerate(keeper.drafts[: len(answer) - 1])]
        trees += [Tree(((),), (), ())] * (len(answer) - 1 - len(trees))  # the last rounds may not draft
        recordings.append(Recording(params.temperature, len(prompt), tuple(trees)))
        on_answer()
    return recordings


def _tree(drafts: Drafts, following: Sequence[int]) -> Tree:
    """A recorded tree. following: the answer's tokens behind the root."""
    tokens, parents, depths = drafts.tokens.tolist(), drafts.parents.tolist(), drafts.depths.tolist()
    totals = drafts.chances.tolist()
    children: list[list[int]] = [[] for _ in range(len(tokens) + 1)]
    chances: list[float] = []
    is_right: list[bool] = []
    for node, (token, parent, depth) in enumerate(zip(tokens, parents, depths, strict=True)):
        children[parent + 1].append(node)  # of the root: ROOT + 1 is 0
        before = 1.0 if parent == ROOT else totals[parent]
        chances.append(min(1.0, totals[node] / before) if before > 0 else 0.0)
        is_on_path = parent == ROOT or is_right[parent]
        is_right.append(is_on_path and depth <= len(following) and following[depth - 1] == token)
    return Tree(tuple(map(tuple, children)), tuple(chances), tuple(is_right))
