"""The acceptance rules: `coupled`, `rejection` and `typical`. Must not import models, the cache or drafters."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from headstart.speculation.checks import require
from headstart.speculation.distribution import warp
from headstart.speculation.noise import gumbel, noise_keys, uniform
from headstart.speculation.rows import Paths, Rows
from headstart.speculation.tree import ROOT, Forest
from headstart.speculation.verify import Asked, Decisions, Rule, alive


def coupled(forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
    """The lossless rule: a draft is accepted if it is the token that the target decides there. Drafts never change the text.

    On a GPU all asked nodes are decided in one step, because level by level would cost a host synchronisation each. On a CPU only
    the nodes on the kept path are decided, which reads the logits of no other node.
    """
    judge = coupled_as_reached if logits.device.type == "cpu" else coupled_at_once
    return judge(forest, asked, logits, rows, in_full)


def coupled_at_once(forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
    """The `coupled` rule, with every asked node decided in one step."""
    span = range(asked.max_level + 1)
    tokens, is_sure = _decide(rows, logits, asked.levels, span, asked_paths(forest, asked, rows), in_full)
    return Decisions(tokens, tokens[asked.parents] == forest.drafts.tokens, is_sure)


def coupled_as_reached(forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
    """The `coupled` rule, level by level, with only the nodes decided whose ancestors are all accepted. Walks on the host."""
    edges = list(zip(asked.parents.tolist(), forest.drafts.tokens.tolist(), strict=True))  # per draft, its parent and its token
    children = dict(zip(edges, asked.drafts.tolist(), strict=True))
    row_of, path_tokens = asked.rows.tolist(), asked_paths(forest, asked, rows).tokens
    tokens, is_sure = [-1] * len(row_of), [True] * len(row_of)
    frontier, level = asked.roots.tolist(), 0
    while frontier:
        nodes, line_rows, levels = torch.tensor([frontier, [row_of[node] for node in frontier], [level] * len(frontier)])
        paths = Paths(line_rows, path_tokens[nodes], nodes)
        decided = [part.tolist() for part in _decide(rows, logits[nodes], levels, range(level, level + 1), paths, in_full)]
        for node, token, is_certain in zip(frontier, *decided, strict=True):
            tokens[node], is_sure[node] = token, is_certain
        frontier, level = [children[node, tokens[node]] for node in frontier if (node, tokens[node]) in children], level + 1
    ok = [tokens[parent] == token for parent, token in edges]  # an undecided parent has token -1, which no draft has
    return Decisions(
        torch.tensor(tokens, dtype=torch.int64), torch.tensor(ok, dtype=torch.bool), torch.tensor(is_sure, dtype=torch.bool)
    )


def _decide(rows: Rows, logits: Tensor, levels: Tensor, span: range, paths: Paths, in_full: bool) -> tuple[Tensor, Tensor]:
    """The target's tokens [n] after the nodes of `logits` [n, vocab], and whether they are certain [n]."""
    if in_full:
        return rows.decide_fully(logits, levels, span, paths), torch.ones_like(levels, dtype=torch.bool)
    return rows.decide(logits, levels, span, paths)


def rejection(forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
    """Rejection sampling, lossless in distribution: Leviathan et al. 2023, over siblings as in SpecInfer, drawn without
    replacement as in Sequoia.

    Siblings are judged in the order in which they were drawn. Child x is accepted with probability min(1, p(x) / q(x)); else p
    becomes norm((p - q)+) and x is removed from q. q is one-hot where children were picked, not drawn. One step per rank judges
    the children of all parents. Every token is certain.
    """
    sampling = rows.sampling.rows(asked.rows)
    distribution = warp(rows.adjust(logits, asked_paths(forest, asked, rows)), sampling)
    keys = noise_keys(
        noise_keys(sampling.seeds, rows.positions[asked.rows]), torch.arange(len(asked.rows), device=distribution.device)
    )
    drafts, tokens = forest.drafts, forest.drafts.tokens
    ok = torch.zeros_like(tokens, dtype=torch.bool)
    followed = torch.full_like(asked.rows, -1)  # the accepted child's token
    proposal = _proposal(forest, asked, distribution)
    rank = _ranks(asked.parents)
    for step in range(int(rank.max()) + 1 if len(drafts) else 0):
        child = (rank == step).nonzero().squeeze(-1)
        parent = asked.parents[child]
        child, parent = child[followed[parent] < 0], parent[followed[parent] < 0]
        token = tokens[child][:, None]
        p, q = distribution[parent], proposal[parent]
        # q has no mass at a child that was picked, not drawn: one-hot q accepts it with probability p.
        q = torch.where(q.gather(1, token) > 0, q, torch.zeros_like(q).scatter_(1, token, 1.0))
        u = uniform(keys[parent][:, None], torch.tensor([step], device=distribution.device)).squeeze(-1)
        is_accepted = u * q.gather(1, token).squeeze(-1) < p.gather(1, token).squeeze(-1)
        ok[child] = is_accepted
        followed[parent] = torch.where(is_accepted, tokens[child], -1)
        distribution[parent] = torch.where(is_accepted[:, None], p, _residual(p, q, token))
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
    """[drafts] int64, how many siblings precede each draft. parents: [drafts]."""
    earlier = torch.ones(len(parents), len(parents), dtype=torch.bool, device=parents.device).tril(-1)
    return ((parents[:, None] == parents) & earlier).sum(-1)


def _residual(p: Tensor, q: Tensor, token: Tensor) -> Tensor:
    """norm((p - q)+); where rounding leaves no mass, p without the rejected token."""
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, _normalise(rest), _normalise(p.scatter(1, token, 0.0)))


def _normalise(distribution: Tensor) -> Tensor:
    total = distribution.sum(-1, keepdim=True)
    return torch.where(total > 0, distribution / total, distribution)


def asked_paths(forest: Forest, asked: Asked, rows: Rows) -> Paths:
    """The rows of the asked nodes and, where logits depend on them, the drafted tokens from root to node (-1: not on the path)."""
    noise_ids = torch.arange(len(asked.rows), device=asked.rows.device)
    tokens = asked.rows.new_empty(len(asked.rows), 0)
    if rows.depends_on_paths and len(forest.drafts):
        tokens = asked.rows.new_full((len(asked.rows), len(forest.drafts)), -1)
        tokens[asked.drafts] = torch.where(forest.lineage, forest.drafts.tokens, -1)
    return Paths(asked.rows, tokens, noise_ids)


def typical(epsilon: float = 0.09, delta: float = 0.3) -> Rule:
    """Typical acceptance (Cai et al. 2024, section 2.3.2), **lossy**: a draft is accepted if p > min(epsilon, delta exp(-H)).

    p is the draft's probability in the distribution from which the target samples its row, and H that distribution's entropy in
    nats: the higher the entropy, the more drafts are accepted. A row keeps its deepest alive draft; of several, that with the most
    probable path, then the first. The token after it is the target's own decision.
    Drafters choose without noise: only p decides, so noise would only propose less probable tokens. A greedy row's distribution is
    one-hot, so its text is that of plain decoding.
    epsilon: upper bound of the threshold. delta: factor of the entropy term.
    Raises ValueError for values outside (0, 1): at 1, even a greedy row would accept nothing.
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        require(0 < value < 1, f"{name} of the typical rule", f"{value:g}", "between 0 and 1")
    return Rule(partial(_typical, epsilon, delta), noise="none", is_lossy=True)


def _typical(epsilon: float, delta: float, forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
    drafts, paths = forest.drafts, asked_paths(forest, asked, rows)
    distribution = warp(rows.adjust(logits, paths), rows.sampling.rows(asked.rows))
    threshold = (delta * torch.exp(-torch.special.entr(distribution).sum(-1))).clamp(max=epsilon)
    chances = distribution[asked.parents, drafts.tokens]
    is_on_path, last = deepest(forest, asked, chances > threshold[asked.parents], chances.log())
    span, last_paths = range(asked.max_level + 1), Paths(paths.rows[last], paths.tokens[last], last)
    tokens = torch.full_like(asked.rows, -1)
    is_sure = torch.ones_like(tokens, dtype=torch.bool)
    tokens = tokens.scatter_reduce(0, asked.parents, torch.where(is_on_path, drafts.tokens, -1), "amax")  # the kept child
    tokens[last], is_sure[last] = _decide(rows, logits[last], asked.levels[last], span, last_paths, in_full)
    return Decisions(tokens, is_on_path, is_sure)


def deepest(forest: Forest, asked: Asked, ok: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """One path per row, for rules that may accept several siblings: the path to the deepest alive draft.

    Of several such drafts, the one with the largest sum of scores along its path is taken, then the first. No host
    synchronisation.
    ok: [drafts] bool, accepted given the parent.
    scores: [drafts], finite where ok.
    Returns [drafts] bool, whether each draft is on its row's path, and [asked rows] int64, the asked node at which the path ends.
    """
    drafts, order = forest.drafts, torch.arange(len(forest.drafts), device=ok.device)
    is_last = alive(forest, ok)
    no_draft = torch.full((forest.num_rows,), ROOT, device=ok.device)
    sums = torch.where(forest.lineage, scores, 0).sum(-1)
    for value in (drafts.depths.double(), sums.double(), -order.double()):
        value = value.masked_fill(~is_last, -math.inf)
        most = torch.full_like(no_draft, -math.inf, dtype=torch.float64).scatter_reduce(0, drafts.rows, value, "amax")
        is_last = is_last & (value == most[drafts.rows])
    last = no_draft.scatter_reduce(0, drafts.rows, torch.where(is_last, order, ROOT), "amax")[asked.rows[asked.roots]]
    last_asked = torch.cat([asked.drafts, asked.roots.new_full((1,), ROOT)])[last]  # index ROOT reads the added last entry
    return (forest.lineage & is_last[:, None]).any(0), torch.where(last == ROOT, asked.roots, last_asked)


RULES = {"coupled": Rule(coupled, noise="shared"), "rejection": Rule(rejection, noise="fresh"), "typical": typical()}


def parse_rule(spec: str) -> Rule:
    """The rule that a text describes: a name in `RULES`, or `typical:EPSILON,DELTA`. Raises ValueError for any other text."""
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
