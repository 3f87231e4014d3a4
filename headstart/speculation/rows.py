"""The rows of a round: each row's sampling turns drafters' logits into children, and the target's logits into tokens.

The token at position `i` of a request is `argmax_v (z_v + T * g(seed, i, v))`, Gumbel-max with counter-based noise: it follows
softmax(z / T), and depends on history, seed and position only. Drafters choose with the same noise. Must not import models or
drafters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.speculation.calibration import UNFITTED, Calibration
from headstart.speculation.choosing import Chooser, choose, widened
from headstart.speculation.constraints import Constraints
from headstart.speculation.distribution import History, SamplingTensors, Truncation, penalise, warp
from headstart.speculation.noise import gumbel, noise_keys
from headstart.speculation.planner import Plan


class Choice(NamedTuple):
    """Children for several parents.

    tokens: [n, k] token ids of the target, best first.
    chances: [n, k] float32, acceptance probability of each child given its parent.
    distribution: [n, vocab] from which the children were drawn, under the `rejection` rule; else None.
    """

    tokens: Tensor
    chances: Tensor
    distribution: Tensor | None


@dataclass(frozen=True, eq=False)
class Paths:
    """The paths from a root to several nodes.

    rows: [n] int64, the row of the round.
    tokens: [n, level] int64, the drafts from the root's child to the node itself; -1: no token.
    noise_ids: [n] int64, a number that differs between nodes of one level, for noise that they must not share.
    """

    rows: Tensor
    tokens: Tensor
    noise_ids: Tensor


@dataclass(eq=False)
class Rows:
    """The rows of a round, and everything that depends on their sampling.

    seats: per row, its seat; on the host, as the next three.
    roots: per row, the token of its root.
    root_positions: per row, the position of its root.
    depths: per row, how deep it may draft, at most `plan.depth`; 0: it does not draft.
    plan: how wide to draft and how many drafts can be verified; `NO_DRAFTS` where no row drafts.
    sampling: the rows' sampling settings.
    vocab: number of logits of the target.
    noise_rule: "shared" for `coupled`, "fresh" for `rejection`, "none" for `typical`.
    history: token counts of the seats; needed only where a row has penalties.
    odds: per row, the factor on the odds of a child's chance by which earlier rounds correct it; (): none are corrected.
    constraints: of the rows that have some; None: no row has.
    chooser: chooses children in place of tensor operations, with the same result; None: tensor operations do.
    """

    seats: tuple[int, ...]
    roots: tuple[int, ...]
    root_positions: tuple[int, ...]
    depths: tuple[int, ...]
    plan: Plan
    sampling: SamplingTensors
    vocab: int
    noise_rule: str = "shared"
    history: History | None = None
    odds: tuple[float, ...] = ()
    chooser: Chooser | None = None
    constraints: Constraints | None = None
    _noise: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.seats)

    @cached_property
    def drafting(self) -> tuple[int, ...]:
        """Indices of the rows that draft, ascending, on the host."""
        return tuple(row for row, depth in enumerate(self.depths) if depth > 0)

    @property
    def max_depth(self) -> int:
        """The largest of `depths`, 0 for none."""
        return max(self.depths, default=0)

    @cached_property
    def positions(self) -> Tensor:
        """[rows] int64: `root_positions`, on the device of the sampling settings."""
        return torch.tensor(self.root_positions).to(self.sampling.seeds.device, non_blocking=True)

    def noise(self, level: int) -> Tensor:
        """[rows, vocab] Gumbel noise of the position `level` after each root. Computed once, for drafters and target."""
        if level not in self._noise:
            places = [(seed, root + level) for seed, root in zip(self.sampling.host_seeds, self.root_positions, strict=True)]
            self._noise[level] = self.sampling.noise.at(places, self.vocab, self.sampling.seeds.device)
        return self._noise[level]

    @property
    def depends_on_paths(self) -> bool:
        """Whether logits are adjusted by the drafts on the path to their node."""
        return self.sampling.has_penalties or self.constraints is not None

    def adjust(self, logits: Tensor, paths: Paths, ids: Tensor | None = None) -> Tensor:
        """Logits after the penalties, biases and constraints of each line's row and path, in float32 or wider.

        logits: [n, vocab], or [n, len(ids)] with `ids`.
        paths: [n] the node after which each line was computed.
        ids: [draft_vocab] token id of each column; None: all tokens.
        """
        logits = self._penalised(logits, paths, ids)
        return logits if self.constraints is None else self.constraints.apply(logits, paths, ids)

    def _penalised(self, logits: Tensor, paths: Paths, ids: Tensor | None) -> Tensor:
        """Logits after penalties and biases."""
        logits = widened(logits)
        if self.sampling.has_penalties:
            assert self.history is not None
            seats = torch.tensor(self.seats).to(logits.device, non_blocking=True)[paths.rows]
            seen, written = self.history.seen[seats], self.history.written[seats]
            if paths.tokens.shape[1]:
                valid = (paths.tokens >= 0).to(torch.int32)
                written = written.scatter_add(1, paths.tokens.clamp(min=0), valid)
                seen = seen | (written > 0)
            if ids is not None:
                seen, written = seen[:, ids], written[:, ids]
            logits = penalise(logits, self.sampling.rows(paths.rows), seen, written)
        if self.sampling.biases is not None:
            logits = logits + self._bias.to(logits.dtype)[paths.rows][:, slice(None) if ids is None else ids]
        return logits

    @cached_property
    def _bias(self) -> Tensor:
        """[rows, vocab] the sum of each row's logit biases."""
        assert self.sampling.biases is not None
        rows, tokens, values = self.sampling.biases
        return torch.zeros(len(self), self.vocab, device=values.device).index_put_((rows, tokens), values)

    def choose(
        self,
        logits: Tensor,
        level: int,
        paths: Paths,
        k: int,
        ids: Tensor | None = None,
        calibration: Calibration = UNFITTED,
    ) -> Choice:
        """The children that a drafter's logits give, with each row's sampling and the noise of the acceptance rule.

        logits: [n, vocab], or [n, draft_vocab] with `ids`.
        level: depth of the children; a root's children have 1.
        paths: [n] the parents.
        k: children per parent.
        ids: [draft_vocab] the target's token id of each column; None: the drafter has the target's vocabulary.
        calibration: turns the drafter's scores into chances.
        """
        k = min(k, logits.shape[-1])
        if self.sampling.has_penalties or self.sampling.biases is not None:
            logits = self._penalised(logits, paths, ids)
        if self.constraints is not None and paths.tokens.shape[1] == level - 1:  # parallel heads have one line for all paths
            logits = self.constraints.apply(widened(logits), paths, ids)
        if self.noise_rule == "fresh" and self.sampling.is_sampled:
            sampling = self.sampling.rows(paths.rows)
            ranks = calibration.of_ranks(sampling.temperature, level, k)
            return self._draw(widened(logits), level, paths, sampling, ranks, ids)
        noise = self.noise(level) if self.sampling.is_sampled and self.noise_rule == "shared" else None
        divisors = self.sampling.calibration_temperature_of(calibration, level)
        chosen = self.chooser(logits, paths.rows, noise, self.sampling, divisors, k, ids) if self.chooser else None
        tokens, chances = chosen or choose(logits, paths.rows, noise, self.sampling, divisors, k, ids)
        return Choice(tokens, self._corrected(chances, paths.rows), None)

    def _corrected(self, chances: Tensor, rows: Tensor) -> Tensor:
        """Chances [n, k] with their odds, p / (1 - p), multiplied by those of their rows [n]."""
        if not self.odds:
            return chances
        odds = self._odds if len(self) == 1 else self._odds[rows]
        return chances * odds / (1 + chances * (odds - 1))

    @cached_property
    def _odds(self) -> Tensor:
        """[rows, 1] `odds`, on the device of the sampling settings."""
        return torch.tensor(self.odds)[:, None].to(self.sampling.seeds.device, non_blocking=True)

    def _draw(
        self, logits: Tensor, level: int, paths: Paths, sampling: SamplingTensors, ranks: Tensor, ids: Tensor | None
    ) -> Choice:
        """Children drawn without replacement (Gumbel top-k, Kool et al. 2019), with noise that is used nowhere else.

        The noise is keyed by the round (the root's position), the level and the parent: a position that is drafted again in a
        later round must have other noise.
        ranks: [n, k] chances of the ranks, or one line for all. They are the children's chances: which drafts are verified must
        not depend on the tokens drawn.
        """
        distribution = warp(logits, sampling)
        round_keys = noise_keys(sampling.seeds, self.positions[paths.rows])
        keys = noise_keys(round_keys, level * 2**20 + paths.noise_ids + 2**40)
        scores = distribution.log() + gumbel(keys[:, None], torch.arange(distribution.shape[-1], device=distribution.device))
        drawn = scores.topk(ranks.shape[1], -1).indices
        if ids is not None:
            drawn = ids[drawn]
            distribution = distribution.new_zeros(distribution.shape[0], self.vocab).index_copy_(1, ids, distribution)
        return Choice(drawn, ranks.expand_as(drawn), distribution)

    def decide(self, logits: Tensor, levels: Tensor, span: range, paths: Paths, tries: int = 2) -> tuple[Tensor, Tensor]:
        """The target's token after each asked node, [asked] int64, and whether it is certain, [asked] bool.

        Truncation is checked on the `tries` best candidates only. Where none of them is inside, the token is not certain:
        the caller calls `decide_fully`.
        logits: [asked, vocab].
        levels: [asked] int64, the depths of the nodes, all within `span`; a root has 0.
        paths: [asked] the nodes.
        """
        logits = self.adjust(logits, paths)
        if not self.sampling.is_sampled:
            return logits.argmax(-1), torch.ones_like(levels, dtype=torch.bool)
        sampling = self.sampling.rows(paths.rows)
        scores = self._scores(logits, levels, span, paths.rows, sampling)
        tokens = scores.argmax(-1)
        if not self.sampling.is_truncated or _are_best(tokens, logits):
            return tokens, torch.ones_like(levels, dtype=torch.bool)
        truncation = Truncation(logits, sampling)
        is_sure = truncation.admits(tokens) | sampling.is_greedy
        for _ in range(tries - 1):
            if scores.device.type == "cpu" and bool(is_sure.all()):  # no host synchronisation there
                break
            scores.scatter_(-1, tokens[:, None], torch.where(is_sure, torch.inf, -torch.inf)[:, None].to(scores.dtype))
            tokens = scores.argmax(-1)
            is_sure = is_sure | truncation.admits(tokens)
        return tokens, is_sure

    def decide_fully(self, logits: Tensor, levels: Tensor, span: range, paths: Paths) -> Tensor:
        """The tokens of `decide`, all certain: every token is checked for truncation. Costs a sort."""
        logits = self.adjust(logits, paths)
        sampling = self.sampling.rows(paths.rows)
        scores = self._scores(logits, levels, span, paths.rows, sampling)
        is_outside = ~Truncation(logits, sampling).members() & ~sampling.is_greedy[:, None]
        return scores.masked_fill(is_outside, -torch.inf).argmax(-1)

    def _scores(self, logits: Tensor, levels: Tensor, span: range, rows: Tensor, sampling: SamplingTensors) -> Tensor:
        """[asked, vocab] z + T g of the position after each asked node."""
        if len(span) == 1:
            noise = self.noise(span[0] + 1)[rows]
        else:
            noise = torch.stack([self.noise(level + 1) for level in span])[levels - span[0], rows]
        return torch.addcmul(logits, sampling.temperature[:, None], noise)


def _are_best(tokens: Tensor, logits: Tensor) -> bool:
    """Whether the tokens [n] are known to be the best of each line of `logits` [n, vocab], which no truncation leaves out.

    Known on a CPU only: elsewhere, asking costs a host synchronisation.
    """
    return logits.device.type == "cpu" and torch.equal(tokens, logits.argmax(-1))
