"""Which drafts are kept: a rule says what the target wants after every node, one walk finds the path.

A rule maps (forest, logits, rows) to `token` (what follows if the path ends here) and `ok` (this draft is accepted given its
parent). A draft is alive if it and all its ancestors are ok; a row keeps its deepest alive draft and that draft's ancestors.
This file knows sampling and trees. It refuses to know models, caches and how drafts came about.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.speculation.distribution import warp
from headstart.speculation.noise import gumbel, noise_keys, uniform
from headstart.speculation.rows import Paths, Rows
from headstart.speculation.tree import ROOT, Forest


class Decisions(NamedTuple):
    """tokens: [asked], what follows if the path ends here; ok: [drafts] bool, accepted given its parent;
    is_sure: [asked] bool, False where a rule could not decide cheaply and asks to be run again in full."""

    tokens: Tensor
    ok: Tensor
    is_sure: Tensor


class Asked(NamedTuple):
    """The asked nodes, drafts and roots alike, and how they hang together.

    rows, levels: [asked] row of the round, and depth (a root: 0); max_level: a bound of the levels, on the host.
    roots: [whole rows] and drafts: [drafts] say which asked node each is; parents: [drafts] the asked node it hangs on.
    """

    rows: Tensor
    levels: Tensor
    max_level: int
    roots: Tensor
    drafts: Tensor
    parents: Tensor


def asked_nodes(forest: Forest) -> Asked:
    """The asked nodes of a forest in order: each whole row's root, then its drafts. Dead ones are left out."""
    whole = [row for row, is_whole in enumerate(forest.whole) if is_whole]
    sizes = [forest.counts[row] + 1 for row in whole]
    device, hanging = forest.tokens.device, forest.drafts.parents
    if len(whole) == 1:  # the common case, without index arithmetic
        rows = torch.full((sizes[0],), whole[0], device=device)
        roots, drafts, parents = (
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.arange(1, sizes[0], device=device),
            hanging + 1,
        )
    else:
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        rows = torch.tensor([whole, sizes], dtype=torch.int64)
        roots = torch.tensor(starts, dtype=torch.int64).to(device, non_blocking=True)
        shifts = torch.repeat_interleave(torch.arange(1, len(whole) + 1), rows[1] - 1).to(device, non_blocking=True)
        rows = torch.repeat_interleave(rows[0], rows[1]).to(device, non_blocking=True)
        drafts = torch.arange(len(forest.drafts), device=device) + shifts  # behind its own and all earlier rows' roots
        parents = torch.where(hanging == ROOT, roots[shifts - 1], hanging + shifts)
    levels = torch.zeros_like(rows)
    levels[drafts] = forest.drafts.depths
    return Asked(rows, levels, forest.max_depth, roots, drafts, parents)


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a round decided, on the host.

    emitted: per row, the tokens that are now certain: kept drafts, then the new root; empty where the stem was cut.
    kept: per row, the kept drafts as places in the row's own run of drafts, ascending.
    asked: per row, which asked node decided each emitted token. tried: per row, depth of its deepest draft.
    """

    emitted: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]
    asked: tuple[tuple[int, ...], ...]
    tried: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """judge: what is accepted; noise: which noise a drafter chooses with, "shared" with the target's own, "fresh" or "none".
    is_lossy: whether the text follows another distribution than the target's, which must be said wherever a result is printed."""

    judge: Callable[[Forest, Asked, Tensor, Rows, bool], Decisions]
    noise: str
    is_lossy: bool = False


def verify(forest: Forest, logits: Tensor, rows: Rows, rule: Rule) -> Verdict:
    """Judge a forest. logits: [asked, vocab]; rows: the forest's rows, in order. One host synchronisation."""
    asked = asked_nodes(forest)
    logits = logits[: asked.rows.shape[0]]
    decisions = rule.judge(forest, asked, logits, rows, False)
    answer = _walk(forest, asked, decisions)
    if not (answer[2] >= answer[1]).all():  # rare: on the kept path a rule's shortcut did not reach
        answer = _walk(forest, asked, rule.judge(forest, asked, logits, rows, True))
    return _read(forest, answer)


def _walk(forest: Forest, asked: Asked, decisions: Decisions) -> torch.Tensor:
    """Alive drafts and the deepest of each row, brought to the host: [4, asked] (token, is kept, is sure, level)."""
    kept = torch.ones_like(asked.levels)
    if len(forest.drafts):
        kept[asked.drafts] = alive(forest, decisions.ok).to(kept.dtype)
    return torch.stack([decisions.tokens, kept, decisions.is_sure.to(kept.dtype), asked.levels]).cpu()


def alive(forest: Forest, ok: Tensor) -> Tensor:
    """[drafts] bool: ok, and so are all ancestors. ok: [drafts] bool."""
    return ~(forest.lineage & ~ok).any(-1)


def _read(forest: Forest, answer: Tensor) -> Verdict:
    tokens, is_kept, _, levels = answer.numpy()
    emitted: list[tuple[int, ...]] = []
    kept: list[tuple[int, ...]] = []
    places: list[tuple[int, ...]] = []
    tried: list[int] = []
    start = 0
    for count, is_whole in zip(forest.counts, forest.whole, strict=True):
        if not is_whole:
            for empty in (emitted, kept, places):
                empty.append(())
            tried.append(0)
            continue
        line = slice(start, start + count + 1)
        path = is_kept[line].nonzero()[0]  # the root, then the kept drafts: parents stand before children
        emitted.append(tuple(tokens[line][path].tolist()))
        kept.append(tuple((path[1:] - 1).tolist()))
        places.append(tuple((path + start).tolist()))
        tried.append(int(levels[line].max()))
        start += count + 1
    return Verdict(tuple(emitted), tuple(kept), tuple(places), tuple(tried))


# -- rules ------------------------------------------------------------------------------------------------------------------


def coupled(forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
    """A draft is accepted if it is the token that the target itself decides there: the same text, whatever was drafted.

    On a GPU all asked nodes are decided at once, for asking it anything costs more. On a CPU only those that the walk reaches
    are: what is decided is what is emitted, and no vocabulary is touched in vain.
    """
    way = coupled_as_reached if logits.device.type == "cpu" else coupled_at_once
    return way(forest, asked, logits, rows, in_full)


def coupled_at_once(forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
    """`coupled`, every asked node in one step."""
    span = range(asked.max_level + 1)
    tokens, is_sure = _decide(rows, logits, asked.levels, span, asked_paths(forest, asked, rows), in_full)
    return Decisions(tokens, tokens[asked.parents] == forest.drafts.tokens, is_sure)


def coupled_as_reached(forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
    """`coupled`, level by level, only where the walk arrives."""
    everywhere = asked_paths(forest, asked, rows)
    tokens = torch.full_like(asked.levels, -1)
    is_sure = torch.ones_like(tokens, dtype=torch.bool)
    frontier, level = asked.roots, 0
    while True:
        paths = Paths(everywhere.rows[frontier], everywhere.tokens[frontier], frontier)
        found = _decide(rows, logits[frontier], asked.levels[frontier], range(level, level + 1), paths, in_full)
        tokens[frontier], is_sure[frontier] = found
        ok = tokens[asked.parents] == forest.drafts.tokens  # an undecided parent wants no token at all
        frontier, level = asked.drafts[ok & (tokens[asked.drafts] < 0)], level + 1
        if not len(frontier):
            return Decisions(tokens, ok, is_sure)


def _decide(rows: Rows, logits: Tensor, levels: Tensor, span: range, paths: Paths, in_full: bool) -> tuple[Tensor, Tensor]:
    """The decided tokens, and whether they are certain, both [n]."""
    if in_full:
        return rows.decide_fully(logits, levels, span, paths), torch.ones_like(levels, dtype=torch.bool)
    return rows.decide(logits, levels, span, paths)


def rejection(forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
    """Recursive rejection sampling over siblings drawn without replacement (Leviathan 2023; SpecInfer; Sequoia), exact in
    distribution.

    Children are tried in the order they were drawn: child x is accepted with min(1, p(x) / q(x)), else p becomes norm((p - q)+)
    and q loses x. Picked children (no distribution) have q one-hot. All parents at once, one step per rank. Always sure.
    """
    sampling = rows.sampling.rows(asked.rows)
    distribution = warp(rows.adjust(logits, asked_paths(forest, asked, rows)), sampling)
    keys = noise_keys(
        noise_keys(sampling.seeds, rows.positions[asked.rows]), torch.arange(len(asked.rows), device=distribution.device)
    )
    drafts, tokens = forest.drafts, forest.drafts.tokens
    ok = torch.zeros_like(tokens, dtype=torch.bool)
    followed = torch.full_like(asked.levels, -1)  # the accepted child's token
    proposal = _proposal(forest, asked, distribution)
    rank = _ranks(asked.parents)
    for step in range(int(rank.max()) + 1 if len(drafts) else 0):
        child = (rank == step).nonzero().squeeze(-1)
        parent = asked.parents[child]
        child, parent = child[followed[parent] < 0], parent[followed[parent] < 0]
        token = tokens[child][:, None]
        p, q = distribution[parent], proposal[parent]
        # Nothing left to draw from: the child was picked, as all are without a distribution, and is accepted with its own chance.
        q = torch.where(q.gather(1, token) > 0, q, torch.zeros_like(q).scatter_(1, token, 1.0))
        u = uniform(keys[parent][:, None], torch.tensor([step], device=distribution.device)).squeeze(-1)
        takes = u * q.gather(1, token).squeeze(-1) < p.gather(1, token).squeeze(-1)
        ok[child] = takes
        followed[parent] = torch.where(takes, tokens[child], -1)
        distribution[parent] = torch.where(takes[:, None], p, _residual(p, q, token))
        proposal[parent] = _normalise(q.scatter(1, token, 0.0))
    noise_ids = torch.arange(distribution.shape[-1], device=distribution.device) + 2**32
    final = (distribution.log() + gumbel(keys[:, None], noise_ids)).argmax(-1)
    return Decisions(torch.where(followed >= 0, followed, final), ok, torch.ones_like(final, dtype=torch.bool))


def _proposal(forest: Forest, asked: Asked, distribution: Tensor) -> Tensor:
    """[asked, vocab] the distribution from which each asked node's children were drawn."""
    if forest.drafts.distributions is None:
        return torch.zeros_like(distribution)
    drawn = forest.drafts.distributions.to(distribution.dtype)
    lines = torch.cat([drawn[asked.rows[asked.roots]], drawn[forest.num_rows :]])
    return torch.zeros_like(distribution).index_copy_(0, torch.cat([asked.roots, asked.drafts]), lines)


def _ranks(parents: Tensor) -> Tensor:
    """[drafts] how many siblings stand before each draft. parents: [drafts]."""
    earlier = torch.ones(len(parents), len(parents), dtype=torch.bool, device=parents.device).tril(-1)
    return ((parents[:, None] == parents) & earlier).sum(-1)


def _residual(p: Tensor, q: Tensor, token: Tensor) -> Tensor:
    """norm((p - q)+); where rounding leaves nothing, p without the token that was refused."""
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, _normalise(rest), _normalise(p.scatter(1, token, 0.0)))


def _normalise(distribution: Tensor) -> Tensor:
    total = distribution.sum(-1, keepdim=True)
    return torch.where(total > 0, distribution / total, distribution)


def asked_paths(forest: Forest, asked: Asked, rows: Rows) -> Paths:
    """Rows of the asked nodes and, where penalties look at them, the drafted tokens from root to node (-1 pads)."""
    places = torch.arange(len(asked.rows), device=asked.rows.device)
    tokens = asked.levels.new_empty(len(asked.rows), 0)
    if rows.sampling.has_penalties and len(forest.drafts):
        tokens = asked.levels.new_full((len(asked.rows), len(forest.drafts)), -1)
        tokens[asked.drafts] = torch.where(forest.lineage, forest.drafts.tokens, -1)
    return Paths(asked.rows, tokens, places)


def typical(epsilon: float = 0.09, delta: float = 0.3) -> Rule:
    """Typical acceptance (Cai et al. 2024, section 2.3.2), **lossy**: a draft is accepted if p > min(epsilon, delta exp(-H)).

    p is the draft's chance under the target's distribution, as the row samples it, and H that distribution's entropy in nats:
    where the target is
    undecided, more is accepted. A row keeps its deepest alive draft, then the likeliest path, then the first; what follows is the
    target's own choice. Drafters choose without noise: what is judged by p alone is best picked by chance alone, and noise would
    only bring in rarer tokens. A greedy row's distribution is one-hot, so its text is that of plain decoding.
    Raises ValueError for thresholds outside (0, 1): at 1, not even a greedy row could accept.
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"{name} of the typical rule is {value:g}; it must be between 0 and 1")
    return Rule(partial(_typical, epsilon, delta), noise="none", is_lossy=True)


def _typical(epsilon: float, delta: float, forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
    drafts, paths = forest.drafts, asked_paths(forest, asked, rows)
    distribution = warp(rows.adjust(logits, paths), rows.sampling.rows(asked.rows))
    threshold = (delta * torch.exp(-torch.special.entr(distribution).sum(-1))).clamp(max=epsilon)
    chances = distribution[asked.parents, drafts.tokens]
    path, ends = deepest(forest, asked, chances > threshold[asked.parents], chances.log())
    span, standing = range(asked.max_level + 1), Paths(paths.rows[ends], paths.tokens[ends], ends)
    tokens = torch.full_like(asked.levels, -1)
    is_sure = torch.ones_like(tokens, dtype=torch.bool)
    tokens = tokens.scatter_reduce(0, asked.parents, torch.where(path, drafts.tokens, -1), "amax")  # what is kept follows
    tokens[ends], is_sure[ends] = _decide(rows, logits[ends], asked.levels[ends], span, standing, in_full)
    return Decisions(tokens, path, is_sure)


def deepest(forest: Forest, asked: Asked, ok: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """One path a row, where several siblings may be ok: to the deepest alive draft, then of the largest sum of scores, then first.

    ok: [drafts] bool; scores: [drafts], finite where ok. Returns [drafts] bool, which are on their row's path, and [whole rows],
    the asked node at which it ends. Without a host synchronisation.
    """
    drafts, order = forest.drafts, torch.arange(len(forest.drafts), device=ok.device)
    is_end = alive(forest, ok)
    nothing = torch.full((forest.num_rows,), ROOT, device=ok.device)
    sums = torch.where(forest.lineage, scores, 0).sum(-1)
    for value in (drafts.depths.double(), sums.double(), -order.double()):
        value = value.masked_fill(~is_end, -math.inf)
        most = torch.full_like(nothing, -math.inf, dtype=torch.float64).scatter_reduce(0, drafts.rows, value, "amax")
        is_end = is_end & (value == most[drafts.rows])
    last = nothing.scatter_reduce(0, drafts.rows, torch.where(is_end, order, ROOT), "amax")[asked.rows[asked.roots]]
    ends = torch.cat([asked.drafts, asked.roots.new_full((1,), ROOT)])[last]  # ROOT reads the entry behind the drafts
    return (forest.lineage & is_end[:, None]).any(0), torch.where(last == ROOT, asked.roots, ends)


RULES = {"coupled": Rule(coupled, noise="shared"), "rejection": Rule(rejection, noise="fresh"), "typical": typical()}


def parse_rule(spec: str) -> Rule:
    """The rule that a line of text names: one of `RULES`, or `typical:EPSILON,DELTA`. Raises ValueError for anything else."""
    name, colon, argument = spec.partition(":")
    if not colon and name in RULES:
        return RULES[name]
    if name != "typical":
        raise ValueError(f"accept is {spec!r}; the rules are {', '.join(RULES)} and typical:EPSILON,DELTA")
    try:
        epsilon, delta = map(float, argument.split(","))
    except ValueError:
        raise ValueError(f"accept is {spec!r}; write both thresholds of the typical rule, as in typical:0.09,0.3") from None
    return typical(epsilon, delta)
