"""Replay: the target runs at full cost, and a reference answer replaces its tokens.

Small models cannot copy an article or edit code, so drafters are measured on such tasks with reference answers: forward, acceptance
rule and noise are computed, then each token is replaced by the reference's. Such measurements are labelled `replay`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.speculation.rows import Rows
from headstart.speculation.tree import Forest
from headstart.speculation.verify import Asked, Decisions, Rule


class Replay:
    """The acceptance rule of one request at a time, whose text is known: call `follow`, then run the request.

    inner: the rule that is computed, for its cost, and whose tokens are discarded.
    """

    def __init__(self, inner: Rule) -> None:
        self._inner = inner
        self._text = torch.empty(0, dtype=torch.int64)
        self.rule = Rule(self._judge, inner.noise)

    def follow(self, prompt: Sequence[int], reference: Sequence[int]) -> None:
        """Set the answer to `prompt` to `reference`, both token ids."""
        self._text = torch.tensor([*prompt, *reference])

    def _judge(self, forest: Forest, asked: Asked, logits: Tensor, rows: Rows, in_full: bool) -> Decisions:
        assert len(rows) == 1, "a replay follows one text, so it runs one request at a time"
        decided = self._inner.judge(forest, asked, logits, rows, in_full)
        text = self._text.to(logits.device)
        following = rows.positions[asked.rows] + asked.levels + 1  # a node at position j decides index j + 1
        tokens = text[following.clamp(max=len(text) - 1)]
        return Decisions(tokens, tokens[asked.parents] == forest.drafts.tokens, decided.is_sure)
