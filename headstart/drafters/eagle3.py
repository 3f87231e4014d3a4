"""EAGLE-3 (Li et al. 2025, arXiv 2503.01840), and the norms that 3.1 adds: one decoder layer on states from several depths of the
target, with a head of its own over the words that matter.

It need not resemble any state of the target: it learns by being unrolled on its own output as it will be when it drafts. Settings
are those of published checkpoints; see `headstart.formats.published.eagle3`.
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


class Eagle3Config(RecurrentConfig):
    """taps: target layers whose output is read, from 0; empty for three that suit the target. draft_vocab: how many tokens it can
    say, the most frequent of its texts; None for all. norm_before_residual: see `Wide`. fc_bias: of the projection that fuses
    the taps. norm_before_fc: one norm over all taps together. 3.1: fc_norm, a norm for each tap; norm_output, its states are
    handed on normed; without them it is EAGLE-3 as first published, which learns more slowly (docs/log.md)."""

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
    """Drafts with a layer that reads several depths of the target."""

    name = "eagle3"
    config_type = Eagle3Config
    loss_defaults: ClassVar = {"decay": 0.8}

    def __init__(self, config: Eagle3Config, hidden: int, vocab: int) -> None:
        super().__init__(config, hidden, vocab)
        config = self.config
        self.taps = config.taps or (-1,)
        block = decoder(config.block or {}, self.width)
        together = len(self.taps) * hidden
        if config.fc_norm:
            self.fc_norms = nn.ModuleList(norm_like(block, hidden) for _ in self.taps)
        if config.norm_before_fc:
            self.input_norm = norm_like(block, together)
        self.fc = nn.Linear(together, self.width, bias=config.fc_bias)
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
        """Choose its tokens: the special ones, and the most frequent. Raises ValueError where there is no such number of them."""
        if self.ids is None:
            return
        wanted, least = len(self.ids), max(1, len({*special}))
        if not least <= wanted <= self.vocab:
            raise ValueError(
                f"draft_vocab is {wanted}; it must be at least {least}, the number of special tokens, and at most {self.vocab}, "
                "the number of all"
            )
        order = counts.clone()
        order[list(special)] = int(counts.max()) + 1
        best = order.sort(descending=True, stable=True).indices[:wanted]
        self.ids.copy_(best.sort().values)

    def coverage(self, counts: Tensor) -> float | None:
        if self.ids is None:
            return None
        return float(counts[self.ids.to(counts.device)].sum() / counts.sum().clamp(min=1))

    def init_from_target(self) -> Self:
        """It begins by handing the highest tap on, each place on its own, and with the target's own head."""
        super().init_from_target()
        self.block.layers[0].init_self_attention()
        with torch.no_grad():
            self.fc.weight[:, -self.hidden :] = torch.eye(self.hidden)
            rows = self.embed_head.lm_head_weight
            self.lm_head.weight.copy_((rows if self.ids is None else rows[self.ids.to(rows.device)]) * self.embed_head.scale)
        return self

    def project_taps(self, features: Tensor) -> Tensor:
        """The taps, fused."""
        if self.config.fc_norm:
            parts = features.split(self.hidden, -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norms, parts, strict=True)], -1)
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        fused: Tensor = self.fc(features)
        return fused

    def layer_input(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Side by side, the embedding first."""
        return torch.cat([embedded, states], -1)

    def next_state(self, states: Tensor) -> Tensor:
        normed: Tensor = self.norm(states) if self.config.norm_output else states
        return normed

    def output_head(self, depth: int) -> OutputHead:
        weights = [*self.lm_head.parameters()]
        if self.config.norm_output:
            return OutputHead(self.lm_head, weights, self.ids)
        return OutputHead(lambda states: self.lm_head(self.norm(states)), [*weights, *self.norm.parameters()], self.ids)


def default_taps(num_layers: int) -> Sequence[int]:
    """Outputs of three layers, low, middle and high: as published for deep targets; spread evenly over shallow ones, of which the
    published layers coincide or leave out the upper third (docs/log.md). Fewer than three where there are not as many."""
    published = (1, num_layers // 2 - 1, num_layers - 4)
    if num_layers >= 16:
        return published
    top = max(0, num_layers - 2)  # the last layer's output is normed, unlike all others
    return tuple(sorted({round(place * top / 2) for place in range(3)}))
