"""Targets and drafters that are tables of logits after two tokens, so that tests can enumerate their distributions."""

from collections.abc import Callable, Sequence

import torch
from scipy import stats
from torch import Tensor

from headstart.drafters.parts.grow import Level, compose, grow
from headstart.speculation.distribution import History, SamplingTensors, warp
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Plan, Planner
from headstart.speculation.rows import Paths, Rows
from headstart.speculation.tree import ROOT, Drafts, Forest, merge
from headstart.speculation.verify import Rule, verify

Draft = Callable[[Rows, Sequence[Sequence[int]]], Drafts]


def make_rows(
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    vocab: int,
    *,
    root_positions: Sequence[int] | None = None,
    roots: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    width: int = 2,
    beam: int = 2,
    parents: frozenset[tuple[int, ...]] = frozenset(),
    noise_rule: str = "shared",
    history: History | None = None,
    nodes: int = 10**6,
    min_gain: float = 0.0,
) -> Rows:
    """Rows of these params and seeds, one each per row; row `i` is in seat `i`."""
    count = len(params)
    return Rows(
        seats=tuple(range(count)),
        roots=tuple(roots or [0] * count),
        root_positions=tuple(root_positions or [0] * count),
        depths=tuple(depths or [1] * count),
        plan=Plan(max(depths or [1]), width, beam, nodes, parents, min_gain),
        sampling=SamplingTensors.of(params, seeds),
        vocab=vocab,
        noise_rule=noise_rule,
        history=history,
    )


def paths_of(rows: Sequence[int], tokens: Sequence[Sequence[int]] | None = None) -> Paths:
    """The paths to one node per entry of `rows`. tokens: the drafts on each path; None: the nodes are roots."""
    row_ids = torch.tensor(rows)
    return Paths(row_ids, torch.tensor(tokens) if tokens else row_ids.new_empty(len(rows), 0), torch.arange(len(rows)))


def forest_of(drafts: Drafts, texts: Sequence[Sequence[int]]) -> Forest:
    """The forest of these drafts; every row's stem is its text's last token."""
    return merge([text[-1:] for text in texts], [len(text) - 1 for text in texts], [True] * len(texts), drafts)


def asked_logits(table: Tensor, forest: Forest, texts: Sequence[Sequence[int]]) -> Tensor:
    """table: [vocab, vocab, vocab] logits after (token before last, last token). Returns [asked, vocab]."""
    lines, first = [], 0
    tokens, parents = forest.drafts.tokens.tolist(), forest.drafts.parents.tolist()
    for text, count in zip(texts, forest.counts, strict=True):
        lines.append((text[-2], text[-1]))
        for node in range(first, first + count):
            lines.append((text[-1] if parents[node] == ROOT else tokens[parents[node]], tokens[node]))
        first += count
    before, last = torch.tensor(lines).T
    return table[before, last]


def drafting(table: Tensor) -> Draft:
    """A drafter that grows trees with its own table. It takes paths from the tree mask, so a wrong mask gives wrong drafts."""

    def propose(rows: Rows, texts: Sequence[Sequence[int]]) -> Drafts:
        run: dict[int, list[int]] = {}  # per row, the nodes run so far

        def expand(level: Level) -> Tensor:
            lines = []
            for row, tokens, seen in zip(level.rows, level.tokens.tolist(), level.tree_mask.tolist(), strict=True):
                run[row] = run.get(row, [])[: level.earlier] + tokens
                for mask in seen:
                    path = [*texts[row], *(token for token, is_seen in zip(run[row], mask, strict=True) if is_seen)]
                    lines.append((path[-2], path[-1]))
            before, last = torch.tensor(lines).T
            return table[before, last]

        before, last = torch.tensor([texts[row][-2:] for row in rows.drafting]).T
        return grow(rows, table[before, last], expand)

    return propose


def parallel(table: Tensor) -> Draft:
    """A drafter of parallel heads: head `d` predicts from the last two tokens of the text, not from drafts."""

    def propose(rows: Rows, texts: Sequence[Sequence[int]]) -> Drafts:
        before, last = torch.tensor([texts[row][-2:] for row in rows.drafting]).T
        return compose(rows, [table.roll(depth, 0)[before, last] for depth in range(rows.max_depth)])

    return propose


def rounds(
    target: Tensor,
    draft: Draft,
    rule: Rule,
    planner: Planner,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    length: int,
    depth: int = 2,
) -> list[list[int]]:
    """Decode every row, from the text (0, 0), until all have `length` tokens; one row per seed."""
    texts = [[0, 0] for _ in seeds]
    while min(map(len, texts)) < 2 + length:
        plan = planner.plan([depth] * len(texts))
        rows = make_rows(
            params,
            seeds,
            target.shape[-1],
            root_positions=[len(text) - 1 for text in texts],
            roots=[text[-1] for text in texts],
            depths=[min(plan.depth, depth)] * len(texts),
            width=plan.width,
            beam=plan.beam,
            parents=plan.parents,
            noise_rule=rule.noise,
        )
        drafts = planner.prune(draft(rows, texts), plan, len(rows))
        forest = forest_of(drafts, texts)
        verdict = verify(forest, asked_logits(target, forest, texts), rows, rule)
        for text, tokens in zip(texts, verdict.emitted, strict=True):
            text += tokens
    return [text[2 : 2 + length] for text in texts]


def joint_distribution(target: Tensor, params: SamplingParams, length: int) -> Tensor:
    """[vocab ** length] the distribution of the first tokens after the text (0, 0), by enumeration."""
    vocab = target.shape[-1]
    distributions = warp(target.reshape(-1, vocab), SamplingTensors.of([params], [0])).reshape(target.shape)
    joint = torch.ones(1, dtype=torch.float64)
    last_two = torch.zeros(1, 2, dtype=torch.int64)
    for _ in range(length):
        joint = (joint[:, None] * distributions[last_two[:, 0], last_two[:, 1]]).reshape(-1)
        last_two = torch.stack([last_two[:, 1].repeat_interleave(vocab), torch.arange(vocab).repeat(len(last_two))], -1)
    return joint


def p_value(texts: Sequence[Sequence[int]], joint: Tensor, vocab: int) -> float:
    """The p-value of a chi-square test of the texts against the joint distribution; 0 where a text has probability 0."""
    cells = torch.zeros(len(texts), dtype=torch.int64)
    for tokens in torch.tensor(texts).T:
        cells = cells * vocab + tokens
    counts = torch.bincount(cells, minlength=len(joint)).double()
    if bool((counts[joint == 0] > 0).any()):
        return 0.0
    expected = joint * len(texts)
    small = expected < 5  # cells too small for the test are merged
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    is_possible = expected > 0
    if int(is_possible.sum()) == 1:  # greedy: only one text is possible
        return 1.0
    return float(stats.chisquare(counts[is_possible].numpy(), expected[is_possible].numpy(), sum_check=False).pvalue)
