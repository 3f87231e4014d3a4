"""A smaller causal language model with the same vocabulary as draft model: speculative decoding as first published, with trees.

It has a KV cache with the target's seats. Certain tokens are scored together with the root, in one forward per round before
the first level; the entries of deeper levels are scratch behind them, which the next round overwrites.
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
from headstart.target.cache import KVCache, Seating
from headstart.target.flat_rows import level_rows
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer

_PIECE = 256  # pending tokens of a prompt that are scored at once


class ModelDrafter:
    """Drafts with a smaller model.

    model: the draft model, loaded as a `Target`.
    has_same_tokens: each token id is known to stand for the same token in both models. The sizes of their vocabularies may then
        differ, since models of one family are padded to different sizes; tokens that only one of them has are never drafted.
        False: `attach` raises ValueError where the sizes differ.
    """

    name = "model"
    taps: tuple[int, ...] = ()
    planner: Planner = Best(nodes=8, depth=4, width=3, beam=2)

    def __init__(self, model: Target, has_same_tokens: bool = False) -> None:
        self.model = model
        self.has_same_tokens = has_same_tokens
        self.slot_bytes = model.slot_bytes
        self._cache: KVCache | None = None
        self._pending: dict[int, list[int]] = {}  # per seat: certain tokens that are not in the cache yet
        self._ids: Tensor | None = None  # the target's tokens that can be drafted; None: all of them
        self._width = model.vocab  # number of the draft model's logits that the target has, too

    @classmethod
    def load(cls, path: str | Path, target: Target) -> ModelDrafter:
        """Load a draft model from a folder or hub id, in the target's precision, on its device.

        Raises ValueError where its tokenizer contradicts the target's.
        """
        has_same_tokens = _has_same_tokens(path, target)
        trust = target.trust_remote_code
        model = Target.load(path, dtype=target.dtype, device=str(target.device), exact=False, trust_remote_code=trust)
        return cls(model, has_same_tokens)

    @property
    def cache(self) -> KVCache:
        """The draft model's KV cache."""
        assert self._cache is not None, "attach the drafter first"
        return self._cache

    def attach(self, target: Target, seating: Seating) -> None:
        """Allocate the KV cache. Raises ValueError where the vocabularies differ in size and `has_same_tokens` is False."""
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
        """Append the kept tokens to the pending ones of their seats, and score these where they are many."""
        for seat, text, start in zip(kept.seats, kept.texts, kept.starts, strict=True):
            pending = self._pending.setdefault(seat, [])
            num_known = self.cache.lengths[seat] + len(pending)
            pending += self._known(text[num_known - start : -1])
        long = [seat for seat in kept.seats if len(self._pending[seat]) >= _PIECE and self._fits(seat, 0)]
        if long:
            self._score_stems(long, [self._pending[seat] for seat in long])

    def propose(self, rows: Rows) -> Drafts:
        """Score the pending tokens and the roots, then grow a tree level by level."""
        # Where the draft model's context is shorter than the target's, rows beyond it do not draft.
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
        """Copy the first `length` tokens of one seat to another, from cache and pending ones."""
        num_scored = min(length, self.cache.lengths[source])
        self.cache.fork(source, seat, num_scored)
        self._pending[seat] = list(self._pending.get(source, [])[: length - num_scored])

    def free(self, seat: int) -> None:
        """Forget a seat."""
        self.cache.free(seat)
        self._pending.pop(seat, None)

    def snapshot(self) -> tuple[list[int], dict[int, list[int]]]:
        """The lengths of the cache's seats, and the pending tokens."""
        return list(self.cache.lengths), {seat: list(pending) for seat, pending in self._pending.items()}

    def restore(self, snapshot: tuple[list[int], dict[int, list[int]]]) -> None:
        """Return to a snapshot."""
        self.cache.lengths[:], self._pending = snapshot

    def _fits(self, seat: int, more: int) -> bool:
        return self.cache.lengths[seat] + len(self._pending.get(seat, [])) + more <= self.model.context

    def _known(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens, with those that the draft model does not have (the target's padding) replaced by its last one."""
        return tokens if self._ids is None else [min(token, self.model.vocab - 1) for token in tokens]

    def _score_stems(self, seats: list[int], stems: list[list[int]]) -> Tensor:
        """Score and commit certain tokens. Returns [seats, common vocab] logits after each stem."""
        starts = [self.cache.lengths[seat] for seat in seats]
        forest = merge(stems, starts, [True] * len(stems), Drafts.none(self.model.device), self.model.min_nodes)
        logits = self.model.score(forest, self.cache, seats).logits[: len(seats)]
        self.cache.commit(seats, forest.stems, [()] * len(seats))
        for seat in seats:
            self._pending[seat] = []
        return logits[:, : self._width]

    def _score_level(self, level: Level, rows: Rows) -> Tensor:
        """[rows * width, common vocab] logits after the nodes of a level; those of earlier levels are scratch in the cache."""
        root_positions = [self.cache.lengths[rows.seats[row]] - 1 for row in level.rows]
        roots = torch.tensor(root_positions).to(level.tokens.device, non_blocking=True)
        positions = roots[:, None] + level.depths  # [rows, earlier + width]
        seats = [rows.seats[row] for row in level.rows]
        masks = level_rows(self.cache, seats, level.tree_mask, positions, is_flat=self.model.pad_rows)
        tokens = level.tokens.reshape(-1)
        asked = torch.arange(len(tokens), device=tokens.device)
        logits = self.model.forward(tokens, positions[:, level.earlier :].reshape(-1), masks, self.cache, asked).logits
        return logits[:, : self._width]


def _has_same_tokens(path: str | Path, target: Target) -> bool:
    """Whether the tokenizers of draft model and target have the same tokens.

    False where one has tokens that the other lacks, and where either model has no tokenizer beside it.
    Raises ValueError where an id stands for two tokens, or a token has two ids.
    """
    try:
        draft_vocab, target_vocab = (load_tokenizer(name, target.trust_remote_code).get_vocab() for name in (path, target.name))
    except ValueError:
        return False
    target_tokens = {token_id: token for token, token_id in target_vocab.items()}
    for token, token_id in draft_vocab.items():
        if target_vocab.get(token, token_id) != token_id or target_tokens.get(token_id, token) != token:
            raise ValueError(
                f"drafter {path} and target {target.name} have different tokenizers: token {token_id} is {token!r} for the drafter "
                f"and {target_tokens.get(token_id)!r} for the target; a model can only draft for a target with the same tokenizer"
            )
    return draft_vocab == target_vocab
