"""The rows of a round: how each row chooses a drafter's children and decides the target's tokens.

The token at absolute position `i` of a request is `argmax_v (z_v + T * g(seed, i, v))`: Gumbel-max with counter-based noise, so
the distribution is softmax(z / T) and the token is a function of history, seed and position alone. Drafters choose with the same
noise. Must not import models or drafters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.speculation.calibration import UNFITTED, Calibration
from headstart.speculation.distribution import History, SamplingTensors, Truncation, penalise, warp
from headstart.speculation.noise import gumbel, noise_key, noise_keys
from headstart.speculation.planner import Plan


class Choice(NamedTuple):
    """Children for several parents. tokens: [n, k] target ids, best first; chances: [n, k] float32, each given its parent;
    distribution: [n, vocab] from which the children were drawn, under the `rejection` rule, else None."""

    tokens: Tensor
    chances: Tensor
    distribution: Tensor | None


@dataclass(frozen=True, eq=False)
class Paths:
    """Where drafting parents stand. rows: [n] row of the round; tokens: [n, level] drafts from the root's child to the parent
    itself; places: [n] a number that differs between parents of one level, for noise that must not be shared."""

    rows: Tensor
    tokens: Tensor
    places: Tensor


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
    _noise: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seats)

    @cached_property
    def drafting(self) -> tuple[int, ...]:
        """Indices of the rows that draft, ascending, on the host."""
        return tuple(row for row, depth in enumerate(self.depths) if depth > 0)

    @property
    def max_depth(self) -> int:
        return max(self.depths, default=0)

    @cached_property
    def positions(self) -> Tensor:
        """[rows] int64: the roots' positions, on the device of the sampling."""
        return torch.tensor(self.root_positions).to(self.sampling.seeds.device, non_blocking=True)

    def noise(self, level: int) -> Tensor:
        """[rows, vocab] Gumbel noise of the position `level` after each root: evaluated once per round, shared by all."""
        if level not in self._noise:
            keys = [
                [noise_key(seed, place + level)] for seed, place in zip(self.sampling.host_seeds, self.root_positions, strict=True)
            ]
            device = self.sampling.seeds.device
            self._noise[level] = gumbel(torch.tensor(keys).to(device, non_blocking=True), torch.arange(self.vocab, device=device))
        return self._noise[level]

    def adjust(self, logits: Tensor, paths: Paths, ids: Tensor | None = None) -> Tensor:
        """Penalties and biases of each line's row and path. logits: [n, vocab] or [n, len(ids)]; float32 or wider."""
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
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
        """[rows, vocab] what each row adds to its logits."""
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
        """A drafter's logits turned into children, under each row's own distribution and the noise that the rule prescribes.

        logits: [n, vocab], or [n, draft_vocab] with `ids` [draft_vocab] naming the target token of each column; one line per
        entry of `paths`. level: depth of the children (a root's children: 1). k: children per parent. calibration: how the
        drafter's scores become chances.
        """
        logits = self.adjust(logits, paths, ids)
        sampling = self.sampling.rows(paths.rows)
        k = min(k, logits.shape[-1])
        if self.noise_rule == "fresh" and self.sampling.is_sampled:
            ranks = calibration.of_ranks(sampling.temperature, level, k)
            return self._draw(logits, level, paths, sampling, ranks, ids)
        scores = logits
        if self.sampling.is_sampled and self.noise_rule == "shared":
            noise = self.noise(level) if len(self) == 1 else self.noise(level)[paths.rows]  # a single row's broadcasts
            scores = torch.addcmul(logits, sampling.temperature[:, None], noise if ids is None else noise[:, ids])
        best = scores.topk(k, -1)
        calibration_temperature = self.sampling.calibration_temperature_of(calibration, level)
        calibration_temperature = (
            calibration_temperature if len(calibration_temperature) == 1 else calibration_temperature[paths.rows]
        )
        # One division for both: a chance above one by a rounding would put a child before its parent.
        chances = torch.exp(
            best.values / calibration_temperature[:, None]
            - torch.logsumexp(scores / calibration_temperature[:, None], -1, keepdim=True)
        )
        tokens = best.indices if ids is None else ids[best.indices]
        if self.sampling.is_truncated:
            truncation = Truncation(logits, sampling)
            admitted = torch.stack([truncation.admits(child) for child in best.indices.T], -1)
            chances = chances * (admitted | (sampling.temperature[:, None] == 0))
        return Choice(tokens, chances.float(), None)

    def _draw(
        self, logits: Tensor, level: int, paths: Paths, sampling: SamplingTensors, ranks: Tensor, ids: Tensor | None
    ) -> Choice:
        """Children drawn without replacement (Gumbel top-k, Kool et al. 2019) with noise used nowhere else.

        The noise is keyed by the round (the root's position), the level and the parent's place: a position that is drafted
        again in a later round must not meet the same noise. Chances are those of the ranks, for a draw may not be judged by
        what was drawn. ranks: [n, k] these chances, or one line for all.
        """
        distribution = warp(logits, sampling)
        round_keys = noise_keys(sampling.seeds, self.positions[paths.rows])
        keys = noise_keys(round_keys, level * 2**20 + paths.places + 2**40)
        scores = distribution.log() + gumbel(keys[:, None], torch.arange(distribution.shape[-1], device=distribution.device))
        drawn = scores.topk(ranks.shape[1], -1).indices
        wide = (
            distribution
            if ids is None
            else distribution.new_zeros(distribution.shape[0], self.vocab).index_copy_(1, ids, distribution)
        )
        return Choice(drawn if ids is None else ids[drawn], ranks.expand_as(drawn), wide)

    def decide(self, logits: Tensor, levels: Tensor, span: range, paths: Paths, tries: int = 2) -> tuple[Tensor, Tensor]:
        """The target's own token after each asked node, and whether it is certain.

        logits: [asked, vocab]; levels: [asked] the node's depth (root: 0), all within `span`; paths: rows and ancestors.
        Truncation is judged on the best few candidates only; where none of `tries` is inside, the second result
        ([asked] bool) is False and the caller asks again with `decide_fully`.
        """
        logits = self.adjust(logits, paths)
        if not self.sampling.is_sampled:
            return logits.argmax(-1), torch.ones_like(levels, dtype=torch.bool)
        sampling = self.sampling.rows(paths.rows)
        scores = self._scores(logits, levels, span, paths.rows, sampling)
        tokens = scores.argmax(-1)
        if not self.sampling.is_truncated:
            return tokens, torch.ones_like(levels, dtype=torch.bool)
        truncation = Truncation(logits, sampling)
        is_sure = truncation.admits(tokens) | (sampling.temperature == 0)
        for _ in range(tries - 1):
            if scores.device.type == "cpu" and bool(is_sure.all()):  # asking is free there
                break
            scores.scatter_(-1, tokens[:, None], torch.where(is_sure, torch.inf, -torch.inf)[:, None].to(scores.dtype))
            tokens = scores.argmax(-1)
            is_sure = is_sure | truncation.admits(tokens)
        return tokens, is_sure

    def decide_fully(self, logits: Tensor, levels: Tensor, span: range, paths: Paths) -> Tensor:
        """As `decide`, always certain: the whole truncated distribution is laid out. Costs a sort."""
        logits = self.adjust(logits, paths)
        sampling = self.sampling.rows(paths.rows)
        scores = self._scores(logits, levels, span, paths.rows, sampling)
        is_out = ~Truncation(logits, sampling).members() & (sampling.temperature > 0)[:, None]
        return scores.masked_fill(is_out, -torch.inf).argmax(-1)

    def _scores(self, logits: Tensor, levels: Tensor, span: range, rows: Tensor, sampling: SamplingTensors) -> Tensor:
        """z + T g of the position after each asked node: [asked, vocab]."""
        if len(span) == 1:
            noise = self.noise(span[0] + 1)[rows]
        else:
            noise = torch.stack([self.noise(level + 1) for level in span])[levels - span[0], rows]
        return torch.addcmul(logits, sampling.temperature[:, None], noise)
