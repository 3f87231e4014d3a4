"""What a drafter would have proposed at every position of a text that the target wrote, and at which rank the decided token was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from headstart.drafters import Drafter
from headstart.drafters.parts.losses import CHUNK, NONE, Batch, HeadOutput, columns
from headstart.speculation.noise import gumbel, noise_keys, signed
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept
from headstart.target.cache import Seating
from headstart.target.embed_head import EmbedHead
from headstart.target.target import Target

WIDTH = 8  # ranks that are told apart, and up to which a parent counts as kept
BEYOND = 2**31  # the rank of a token behind the end of an answer: no path has it

Ids = Sequence[int]


class TrainedDrafter(Drafter, Protocol):
    """A drafter that also gives its logits for all positions of a text at once."""

    @property
    def depth(self) -> int: ...

    def states(self, batch: Batch) -> Iterator[HeadOutput]: ...

    def clone(self) -> Self: ...

    def eval(self) -> Self: ...

    def bind(self, embed_head: EmbedHead) -> Self: ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Self: ...


class Recorder:
    """A drafter that passes everything on to another one and records the features (tapped hidden states) of every kept token.

    It follows one request at a time.
    """

    is_recorder = True

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.name, self.slot_bytes, self.planner = drafter.name, drafter.slot_bytes, drafter.planner
        self.taps = drafter.taps if drafter.taps[-1:] == (-1,) else (*drafter.taps, -1)
        self._features: list[Tensor] = []

    def batch(self, tokens: Ids, num_prompt: int) -> Batch:
        """The recorded text as a training batch of one row, and an empty record.

        tokens: prompt and answer; the last token was never scored, so its features are zero.
        num_prompt: tokens of the prompt, which the loss mask leaves out.
        """
        features = torch.cat(self._features)[: len(tokens) - 1]
        self._features.clear()
        features = torch.cat([features, torch.zeros_like(features[:1])])[None]
        text = torch.tensor([tokens], device=features.device)
        width = features.shape[-1] // len(self.taps)
        loss_mask = torch.arange(len(tokens), device=features.device)[None] >= num_prompt
        return Batch(text, loss_mask, features[..., : width * len(self._drafter.taps)], features[..., -width:])

    def attach(self, target: Target, seating: Seating) -> None:
        """As the recorded drafter's."""
        self._drafter.attach(target, seating)

    def extend(self, kept: Kept) -> None:
        """Record the features of what was kept, and pass on those that the drafter taps."""
        assert kept.features is not None, "a recorder taps the last layer"
        self._features.append(kept.features)
        width = kept.features.shape[-1] // len(self.taps) * len(self._drafter.taps)
        self._drafter.extend(replace(kept, features=kept.features[:, :width]))

    def propose(self, rows: Rows) -> Drafts:
        """As the recorded drafter's."""
        return self._drafter.propose(rows)

    def fork(self, source: int, seat: int, length: int) -> None:
        """Never called."""
        raise AssertionError("a recorder follows one request at a time")

    def free(self, seat: int) -> None:
        """As the recorded drafter's."""
        self._drafter.free(seat)


@dataclass(frozen=True, eq=False)
class Observation:
    """The decided tokens of one answer among the drafter's candidates.

    ranks: [tokens - 1, depth] int64 on the host, as `calibration.walk` reads them; `BEYOND` where a token is past the end or not in
        the draft vocabulary.
    scores: per depth [n, vocab] z + T g, at positions whose parents were kept.
    decided: per depth [n] the column of the token decided there.
    """

    ranks: Tensor
    scores: tuple[Tensor, ...]
    decided: tuple[Tensor, ...]


@torch.inference_mode()
def observe(drafter: TrainedDrafter, batch: Batch, temperature: float, seed: int, max_scores: int) -> Observation:
    """The ranks of a text's decided tokens among what the drafter would propose, given the text before them.

    batch: one row; its loss mask begins at the first output token.
    temperature, seed: of the request. A candidate at position j is ranked with the noise g(seed, j), as in a round.
    max_scores: positions whose scores are kept, per depth.
    """
    first = int(batch.loss_mask[0].int().argmax()) - 1  # t of the first round: its root t + 1 is the first output token
    count = batch.tokens.shape[1] - 2 - first
    ranks, scores, decided = [], [], []
    is_kept = torch.ones(max(0, count), dtype=torch.bool, device=batch.tokens.device)
    for depth, output in enumerate(drafter.states(batch), 1):
        size = max(0, count - depth + 1)  # roots that still have a token so far behind them
        positions = first + torch.arange(size, device=batch.tokens.device)
        tokens = columns(batch.tokens[0, positions + depth + 1], output.output_head.ids)
        scored = is_kept[:size].nonzero().squeeze(-1)[:max_scores]
        ranks_at_depth, scores_at_depth = _rank(output, positions, tokens, depth, temperature, seed, scored)
        ranks.append(torch.nn.functional.pad(ranks_at_depth, (0, len(is_kept) - size), value=BEYOND))
        scores.append(scores_at_depth)
        decided.append(tokens[is_kept[:size]][:max_scores])
        is_kept &= ranks[-1] < WIDTH
    return Observation(torch.stack(ranks, 1).cpu(), tuple(scores), tuple(decided))


def _rank(
    output: HeadOutput, positions: Tensor, tokens: Tensor, depth: int, temperature: float, seed: int, scored: Tensor
) -> tuple[Tensor, Tensor]:
    """The ranks [n] of `tokens` [n], columns of the output's logits, and the scores [scored, vocab] of some of them.

    positions: [n] of a text. scored: indices into them.
    """
    ranks, kept_scores = torch.zeros_like(positions), [torch.empty(0, device=positions.device)]
    for start in range(0, len(positions), CHUNK):
        chunk = slice(start, start + CHUNK)
        scores = _scores(output, positions[chunk], depth, temperature, seed)
        decided = scores.gather(1, tokens[chunk, None].clamp(min=0))
        ranks[chunk] = torch.where(tokens[chunk] == NONE, BEYOND, (scores > decided).sum(-1))
        kept_scores.append(scores[scored[(scored >= start) & (scored < start + CHUNK)] - start].float())
    return ranks, torch.cat(kept_scores)


def _scores(output: HeadOutput, positions: Tensor, depth: int, temperature: float, seed: int) -> Tensor:
    """z + T g(seed, position) of the candidates at `positions` [n] of a text: [n, vocab]."""
    logits = output.output_head(output.states[0, positions])
    if temperature == 0:
        return logits
    drafted, ids = positions + depth + 1, output.output_head.ids
    keys = noise_keys(torch.full_like(drafted, signed(seed)), drafted)
    ids = torch.arange(logits.shape[-1], device=positions.device) if ids is None else ids
    return logits + temperature * gumbel(keys[:, None], ids)
