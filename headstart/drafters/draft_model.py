"""A smaller causal language model with the same vocabulary as drafter: classical speculative decoding, as trees.

Its own cache mirrors the target's seats. What is certain is scored as a stem together with the root, one forward per round before
the first level; deeper levels are scratch behind it, overwritten in the next round and never committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from headstart.drafters.parts.grow import Level, grow
from headstart.speculation.planner import Best, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept, merge
from headstart.target.attention import RowMask
from headstart.target.cache import KVCache, Seating
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer

_PIECE = 256  # certain tokens scored at once while a prompt streams in


class ModelDrafter:
    """Drafts with `model`, a `Target` of its own.

    has_same_tokens: whether a number is known to stand for one token in both models. The widths of their logits may then differ:
    models of one family are padded to different sizes. Tokens that only the target has are never drafted, tokens that only the
    draft model has never proposed. Where it is not known, `attach` raises ValueError if the widths differ.
    """

    name = "model"
    taps: tuple[int, ...] = ()
    planner: Planner = Best(nodes=8, depth=4, width=3, beam=2)

    def __init__(self, model: Target, has_same_tokens: bool = False) -> None:
        self.model = model
        self.has_same_tokens = has_same_tokens
        self.slot_bytes = model.slot_bytes
        self._cache: KVCache | None = None
        self._pending: dict[int, list[int]] = {}  # per seat: certain tokens behind what the cache holds
        self._ids: Tensor | None = None  # of the target's tokens, those that can be drafted; None for all of them
        self._width = model.vocab  # of the draft model's logits that the target has too

    @classmethod
    def load(cls, path: str | Path, target: Target) -> ModelDrafter:
        """From a folder or hub id, in the target's precision, on its device. Raises ValueError if it speaks other tokens."""
        has_same_tokens = _has_same_tokens(path, target)
        trust = target.trust_remote_code
        model = Target.load(path, dtype=target.dtype, device=str(target.device), exact=False, trust_remote_code=trust)
        return cls(model, has_same_tokens)

    @property
    def cache(self) -> KVCache:
        assert self._cache is not None, "attach the drafter first"
        return self._cache

    def attach(self, target: Target, seating: Seating) -> None:
        if self.model.vocab != target.vocab and not self.has_same_tokens:
            raise ValueError(
                f"drafter {self.model.name} has a vocabulary of {self.model.vocab} tokens, target {target.name} one of "
                f"{target.vocab}; a model can only draft for a target with the same tokenizer"
            )
        self._width = min(self.model.vocab, target.vocab)
        self._ids = torch.arange(self._width, device=self.model.device) if self._width < target.vocab else None
        self._cache = self.model.new_cache(seating)
        self._pending = {}

    def extend(self, kept: Kept) -> None:
        for seat, text, start in zip(kept.seats, kept.texts, kept.starts, strict=True):
            pending = self._pending.setdefault(seat, [])
            have = self.cache.lengths[seat] + len(pending)
            pending += self._known(text[have - start : -1])
        long = [seat for seat in kept.seats if len(self._pending[seat]) >= _PIECE and self._fits(seat, 0)]
        if long:
            self._score_stems(long, [self._pending[seat] for seat in long])

    def propose(self, rows: Rows) -> Drafts:
        # Where the draft model's context is shorter than the target's, a row stops drafting when it has outgrown it.
        fitting = [depth if self._fits(seat, 1 + depth) else 0 for seat, depth in zip(rows.seats, rows.depths, strict=True)]
        rows = replace(rows, depths=tuple(fitting))
        if not rows.drafting:
            return Drafts.none(self.model.device)
        seats = [rows.seats[row] for row in rows.drafting]
        roots = self._known([rows.roots[row] for row in rows.drafting])
        stems = [[*self._pending.get(seat, []), root] for seat, root in zip(seats, roots, strict=True)]
        logits = self._score_stems(seats, stems)
        return grow(rows, logits, lambda level: self._score_level(level, rows), self._ids)

    def fork(self, source: int, seat: int, length: int) -> None:
        have = min(length, self.cache.lengths[source])
        self.cache.fork(source, seat, have)
        self._pending[seat] = list(self._pending.get(source, [])[: length - have])

    def free(self, seat: int) -> None:
        self.cache.free(seat)
        self._pending.pop(seat, None)

    def snapshot(self) -> tuple[list[int], dict[int, list[int]]]:
        return list(self.cache.lengths), {seat: list(pending) for seat, pending in self._pending.items()}

    def restore(self, snapshot: tuple[list[int], dict[int, list[int]]]) -> None:
        self.cache.lengths[:], self._pending = snapshot

    def _fits(self, seat: int, more: int) -> bool:
        return self.cache.lengths[seat] + len(self._pending.get(seat, [])) + more <= self.model.context

    def _known(self, tokens: Sequence[int]) -> Sequence[int]:
        """Tokens as the draft model reads them: one that it does not have, of the target's padding, as its own last one."""
        return tokens if self._ids is None else [min(token, self.model.vocab - 1) for token in tokens]

    def _score_stems(self, seats: list[int], stems: list[list[int]]) -> Tensor:
        """Score and commit what is certain. Returns [seats, common vocab]: what the model expects after each stem."""
        starts = [self.cache.lengths[seat] for seat in seats]
        forest = merge(stems, starts, [True] * len(stems), Drafts.none(self.model.device), self.model.min_nodes)
        logits = self.model.score(forest, self.cache, seats).logits[: len(seats)]
        self.cache.commit(seats, forest.stems, [()] * len(seats))
        for seat in seats:
            self._pending[seat] = []
        return logits[:, : self._width]

    def _score_level(self, level: Level, rows: Rows) -> Tensor:
        """[rows * width, common vocab] behind the nodes of a level, whose earlier levels lie as scratch in the cache."""
        width = level.width
        firsts = [self.cache.lengths[rows.seats[row]] - 1 for row in level.rows]  # the roots' positions
        roots = torch.tensor(firsts).to(level.tokens.device, non_blocking=True)
        positions = roots[:, None] + level.depths  # [rows, earlier + width]
        seen = [
            RowMask(
                place * width,
                (place + 1) * width,
                self.cache.seating[rows.seats[row]].start,
                firsts[place] + 1,
                level.tree_mask[place],
                positions[place],
                level.earlier,
            )
            for place, row in enumerate(level.rows)
        ]
        tokens = level.tokens.reshape(-1)
        everything = torch.arange(len(tokens), device=tokens.device)
        logits = self.model.forward(tokens, positions[:, level.earlier :].reshape(-1), seen, self.cache, everything).logits
        return logits[:, : self._width]


def _has_same_tokens(path: str | Path, target: Target) -> bool:
    """Whether both tokenizers are known to have the same tokens; False where one has tokens more than the other, or where either
    model has no tokenizer beside it. Raises ValueError where a number stands for two tokens, or a token for two numbers."""
    try:
        own, its = (load_tokenizer(place, target.trust_remote_code).get_vocab() for place in (path, target.name))
    except ValueError:
        return False
    by_number = {number: token for token, number in its.items()}
    for token, number in own.items():
        if its.get(token, number) != number or by_number.get(number, token) != token:
            raise ValueError(
                f"drafter {path} and target {target.name} have different tokenizers: token {number} is {token!r} for the drafter "
                f"and {by_number.get(number)!r} for the target; a model can only draft for a target with the same tokenizer"
            )
    return own == its
