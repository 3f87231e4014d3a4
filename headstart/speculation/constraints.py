"""Constraints: which tokens may follow an output, such as those of a grammar. They act on the logits of target and drafters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from headstart.speculation.tree import ROOT, Drafts

if TYPE_CHECKING:
    from headstart.speculation.rows import Paths

Path = tuple[int, ...]


class Constraint(Protocol):
    """Says which tokens may follow an output. A function of the output alone, so that a round can be repeated.

    error: what went wrong, which ends the request; None: nothing.
    """

    error: str | None

    def mask(self, output: Path) -> Tensor:
        """[vocab] bool on the CPU: the tokens that may follow an output; at least one may."""
        ...


class Constraints:
    """The constraints of a round's rows. Masks are computed once per round and path.

    of_rows: row -> its constraint, and the output of its request so far.
    """

    def __init__(self, of_rows: Mapping[int, tuple[Constraint, Path]]) -> None:
        self._of_rows = of_rows
        self._masks: dict[tuple[int, Path], Tensor] = {}

    def mask(self, row: int, path: Path) -> Tensor | None:
        """[vocab] bool: the tokens that may follow a path of drafts behind the root of a row; None: any."""
        if row not in self._of_rows:
            return None
        key = row, path
        if key not in self._masks:
            constraint, output = self._of_rows[row]
            self._masks[key] = constraint.mask(output + path)
        return self._masks[key]

    def apply(self, logits: Tensor, paths: Paths, ids: Tensor | None = None) -> Tensor:
        """Logits [n, vocab], or [n, len(ids)] with `ids`, with -inf for what may not follow. A host synchronisation on a GPU.

        paths: [n] the node after which each line was computed.
        """
        masks = [
            self.mask(row, tuple(token for token in tokens if token >= 0))
            for row, tokens in zip(paths.rows.tolist(), paths.tokens.tolist(), strict=True)
        ]
        lines = [line for line, mask in enumerate(masks) if mask is not None]
        if not lines:
            return logits
        allowed = torch.stack([mask for mask in masks if mask is not None])[:, : logits.shape[1] if ids is None else None]
        allowed = allowed.to(logits.device)
        index = torch.tensor(lines, device=logits.device)
        logits = logits.clone()
        logits[index] = logits[index].masked_fill(~(allowed if ids is None else allowed[:, ids]), -torch.inf)
        return logits

    def without_forbidden(self, drafts: Drafts, num_rows: int) -> Drafts:
        """The drafts that may follow their paths. On the host: a synchronisation where they are on a GPU."""
        tokens, parents, rows = torch.stack([drafts.tokens, drafts.parents, drafts.rows]).tolist()
        paths: dict[int, Path] = {}
        for draft, (token, parent, row) in enumerate(zip(tokens, parents, rows, strict=True)):
            if parent == ROOT or parent in paths:
                before = () if parent == ROOT else paths[parent]
                mask = self.mask(row, before)
                if mask is None or bool(mask[token]):
                    paths[draft] = (*before, token)
        if len(paths) == len(drafts):
            return drafts
        return drafts.take(torch.tensor(list(paths), dtype=torch.int64, device=drafts.tokens.device), num_rows)
