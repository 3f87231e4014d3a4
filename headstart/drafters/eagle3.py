"""EAGLE-3 (Li et al. 2025, arXiv 2503.01840) and the norms of EAGLE 3.1: one decoder layer on features of several target layers.

It has an LM head of its own, of a reduced vocabulary perhaps, and its states need not resemble the target's: training unrolls it on
its own output. Settings are those of published checkpoints; see `headstart.formats.published.eagle3`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from headstart.drafters.parts.decoder import decoder, norm_like
from headstart.drafters.parts.llama_layer import widened
from headstart.drafters.parts.losses import OutputHead
from headstart.drafters.parts.recurrent import Recurrent, RecurrentConfig
from headstart.target.steps import Steps


class Eagle3Config(RecurrentConfig):
    """Settings of EAGLE-3, besides those of all drafters that read their own output.

    taps: target layers whose hidden states are read, from 0; empty: those of `default_taps`.
    draft_vocab: size of the reduced vocabulary, the most frequent tokens of its training texts; None: not reduced.
    norm_before_residual: see `Wide`.
    norm_before_fc: one norm over the features of all taps, before the projection.
    fc_bias: the projection that fuses the features has a bias.
    fc_norm: a norm for the features of each tap (3.1).
    norm_output: the next layer input is the normed state (3.1). Without both, EAGLE-3 as first published, which learns more
        slowly (docs/log.md).
    """

    depth: int = Field(default=6, ge=1, le=64)
    steps: int = Field(default=4, ge=1, le=64)
    taps: tuple[int, ...] = ()
    draft_vocab: int | None = Field(default=None, ge=1)
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_bias: bool = False
    fc_norm: bool = True
    norm_output: bool = True

    @field_validator("taps")
    @classmethod
    def _are_different(cls, taps: tuple[int, ...]) -> tuple[int, ...]:
        if len({*taps}) < len(taps):
            raise ValueError(f"layer {next(tap for tap in taps if taps.count(tap) > 1)} is named twice; name each once")
        return taps

    @model_validator(mode="after")
    def _has_one_norm_of_taps(self) -> Self:
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("norm_before_fc and fc_norm are both true, and nothing says which comes first; set one to false")
        return self


class Eagle3(Recurrent):
    """Drafts with a decoder layer that reads several layers of the target."""

    name = "eagle3"
    config_type = Eagle3Config
    loss_defaults: ClassVar = {"decay": 0.8}

    def __init__(self, config: Eagle3Config, hidden: int, vocab: int) -> None:
        super().__init__(config, hidden, vocab)
        config = self.config
        self.taps = config.taps or (-1,)
        block = decoder(config.block or {}, self.width)
        features_width = len(self.taps) * hidden
        if config.fc_norm:
            self.fc_norms = nn.ModuleList(norm_like(block, hidden) for _ in self.taps)
        if config.norm_before_fc:
            self.input_norm = norm_like(block, features_width)
        self.fc = nn.Linear(features_width, self.width, bias=config.fc_bias)
        self.norm = norm_like(block)
        self.block = widened(block, config.norm_before_residual)
        self.lm_head = nn.Linear(self.width, config.draft_vocab or vocab, bias=False)
        if config.draft_vocab is not None:
            self.ids = torch.arange(config.draft_vocab)

    @classmethod
    def resolve_config(cls, config: Any, target: Any) -> Any:
        config = super().resolve_config(config, target)
        count = int(target.get_text_config().num_hidden_layers)
        return config if config.taps else config.model_copy(update={"taps": default_taps(count)})

    def choose_vocab(self, counts: Tensor, special: Sequence[int]) -> None:
        """Choose the tokens of the reduced vocabulary: the special ones, and the most frequent.

        Raises ValueError where it cannot have `draft_vocab` tokens.
        """
        if self.ids is None:
            return
        size, least = len(self.ids), max(1, len({*special}))
        if not least <= size <= self.vocab:
            raise ValueError(
                f"draft_vocab is {size}; it must be at least {least}, the number of special tokens, and at most {self.vocab}, "
                "the number of all"
            )
        ranked = counts.clone()
        ranked[list(special)] = int(counts.max()) + 1
        best = ranked.sort(descending=True, stable=True).indices[:size]
        self.ids.copy_(best.sort().values)

    def coverage(self, counts: Tensor) -> float | None:
        if self.ids is None:
            return None
        return float(counts[self.ids.to(counts.device)].sum() / counts.sum().clamp(min=1))

    def init_from_target(self) -> Self:
        """Initialise the layer so that it passes the last tap's states on, and the LM head as the target's."""
        super().init_from_target()
        self.block.layers[0].init_self_attention()
        with torch.no_grad():
            self.fc.weight[:, -self.hidden :] = torch.eye(self.hidden)
            rows = self.embed_head.lm_head_weight
            self.lm_head.weight.copy_((rows if self.ids is None else rows[self.ids.to(rows.device)]) * self.embed_head.scale)
        return self

    def project_taps(self, features: Tensor) -> Tensor:
        """The features of all taps, fused into one state."""
        if self.config.fc_norm:
            parts = features.split(self.hidden, -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norms, parts, strict=True)], -1)
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        fused: Tensor = self.fc(features)
        return fused

    def layer_input(self, states: Tensor, embedded: Tensor) -> Tensor:
        """[embedding, state], side by side."""
        return torch.cat([embedded, states], -1)

    def next_state(self, states: Tensor) -> Tensor:
        result: Tensor = self.norm(states) if self.config.norm_output else states
        return result

    def record_input(self, steps: Steps, states: int, embedded: int) -> Sequence[int]:
        return embedded, states

    def record_output(self, steps: Steps, states: int) -> tuple[int, int]:
        normed = steps.norm(self.norm, states)
        return (normed if self.config.norm_output else states), steps.linear(self.lm_head, normed)

    def finish_logits(self, logits: Tensor) -> Tensor:
        return logits

    def output_head(self, depth: int) -> OutputHead:
        weights = [*self.lm_head.parameters()]
        if self.config.norm_output:
            return OutputHead(self.lm_head, weights, self.ids)
        return OutputHead(lambda states: self.lm_head(self.norm(states)), [*weights, *self.norm.parameters()], self.ids)


def default_taps(num_layers: int) -> Sequence[int]:
    """Three layers, low, middle and high, from 0; fewer where the target has fewer.

    For targets of at least 16 layers those of published checkpoints, else evenly spread: in shallow targets the published ones
    coincide or leave out the upper third (docs/log.md).
    """
    published = (1, num_layers // 2 - 1, num_layers - 4)
    if num_layers >= 16:
        return published
    top = max(0, num_layers - 2)  # not the last layer, whose hidden states are normed, unlike all others
    return tuple(sorted({round(half * top / 2) for half in range(3)}))
