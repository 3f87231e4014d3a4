"""A smaller causal language model with the same vocabulary as drafter: classical speculative decoding, as trees.

Its own cache mirrors the target's seats. What is certain is scored as a stem together with the root, one forward per round before
the first level; deeper levels are scratch behind it, overwritten in the next round and never committed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from headstart.attention import Sight
from headstart.cache import KVCache, Seating
from headstart.drafters.grow import Level, grow
from headstart.planner import Best, Planner
from headstart.sampling import Rows
from headstart.target import Target
from headstart.text import load_tokenizer
from headstart.tree import Drafts, Kept, merge

_PIECE = 256  # certain tokens scored at once while a prompt streams in


class ModelDrafter:
    """Drafts with `model`, a `Target` of its own. Raises ValueError at `attach` if the vocabularies differ."""

    name = "model"
    taps: tuple[int, ...] = ()
    planner: Planner = Best(nodes=8, depth=4, width=3, beam=2)

    def __init__(self, model: Target) -> None:
        self.model = model
        self.slot_bytes = model.slot_bytes
        self._cache: KVCache | None = None
        self._pending: dict[int, list[int]] = {}  # per seat: certain tokens behind what the cache holds

    @classmethod
    def load(cls, path: str | Path, target: Target) -> ModelDrafter:
        """From a folder or hub id, in the target's precision, on its device. Raises ValueError if it speaks other tokens."""
        _same_tokens(path, target)
        return cls(Target.load(path, dtype=target.dtype, device=str(target.device), exact=False))

    @property
    def cache(self) -> KVCache:
        assert self._cache is not None, "attach the drafter first"
        return self._cache

    def attach(self, target: Target, seating: Seating) -> None:
        if self.model.vocab != target.vocab:
            raise ValueError(
                f"drafter {self.model.name} has a vocabulary of {self.model.vocab} tokens, target {target.name} one of "
                f"{target.vocab}; a model can only draft for a target with the same tokenizer"
            )
        self._cache = self.model.new_cache(seating)
        self._pending = {}

    def extend(self, kept: Kept) -> None:
        for seat, text, start in zip(kept.seats, kept.texts, kept.starts, strict=True):
            pending = self._pending.setdefault(seat, [])
            have = self.cache.lengths[seat] + len(pending)
            pending += text[have - start : -1]
        long = [seat for seat in kept.seats if len(self._pending[seat]) >= _PIECE and self._fits(seat, 0)]
        if long:
            self._score_stems(long, [self._pending[seat] for seat in long])

    def propose(self, rows: Rows) -> Drafts:
        # Where the draft model's context is shorter than the target's, a row stops drafting when it has outgrown it.
        fitting = [depth if self._fits(seat, 1 + depth) else 0 for seat, depth in zip(rows.seats, rows.depths, strict=True)]
        rows = replace(rows, depths=tuple(fitting))
        drafting = [row for row, depth in enumerate(fitting) if depth > 0]
        if not drafting:
            return Drafts.none(self.model.device)
        seats = [rows.seats[row] for row in drafting]
        stems = [[*self._pending.get(seat, []), rows.roots[row]] for seat, row in zip(seats, drafting, strict=True)]
        logits = self._score_stems(seats, stems)
        return grow(rows, logits, lambda level: self._score_level(level, rows))

    def fork(self, source: int, seat: int, length: int) -> None:
        have = min(length, self.cache.lengths[source])
        self.cache.fork(source, seat, have)
        self._pending[seat] = list(self._pending.get(source, [])[: length - have])

    def free(self, seat: int) -> None:
        self.cache.free(seat)
        self._pending.pop(seat, None)

    def _fits(self, seat: int, more: int) -> bool:
        return self.cache.lengths[seat] + len(self._pending.get(seat, [])) + more <= self.model.context

    def _score_stems(self, seats: list[int], stems: list[list[int]]) -> Tensor:
        """Score and commit what is certain. Returns [seats, vocab]: what the model expects after each stem."""
        starts = [self.cache.lengths[seat] for seat in seats]
        forest = merge(stems, starts, [True] * len(stems), Drafts.none(self.model.device), self.model.min_nodes)
        logits = self.model.score(forest, self.cache, seats).logits[: len(seats)]
        self.cache.commit(seats, forest.stems, [()] * len(seats))
        for seat in seats:
            self._pending[seat] = []
        return logits

    def _score_level(self, level: Level, rows: Rows) -> Tensor:
        """[rows * width, vocab] behind the nodes of a level, whose earlier levels lie as scratch in the cache."""
        width = level.width
        firsts = [self.cache.lengths[rows.seats[row]] - 1 for row in level.rows]  # the roots' positions
        roots = torch.tensor(firsts).to(level.tokens.device, non_blocking=True)
        positions = roots[:, None] + level.depths  # [rows, earlier + width]
        seen = [
            Sight(
                place * width,
                (place + 1) * width,
                self.cache.seating[rows.seats[row]].start,
                firsts[place] + 1,
                level.seen[place],
                positions[place],
                level.earlier,
            )
            for place, row in enumerate(level.rows)
        ]
        tokens = level.tokens.reshape(-1)
        everything = torch.arange(len(tokens), device=tokens.device)
        return self.model.forward(tokens, positions[:, level.earlier :].reshape(-1), seen, self.cache, everything).logits


def _same_tokens(path: str | Path, target: Target) -> None:
    """Two vocabularies of one size may still be two; where either has no tokenizer beside it, the sizes must do."""
    try:
        own, its = load_tokenizer(path).get_vocab(), load_tokenizer(target.name).get_vocab()
    except ValueError:
        return
    if own != its and len(own) == len(its):
        token = min(set(own.items()) ^ set(its.items()))[0]
        raise ValueError(
            f"drafter {path} and target {target.name} have {len(own)} tokens each, but not the same ones (token {token!r} "
            f"differs); a model can only draft for a target with the same tokenizer"
        )
