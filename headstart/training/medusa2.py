"""Medusa-2: heads and trunk learn together, so that the trunk comes to say what its heads can guess (Cai et al. 2024).

    loss = base + lambda0 * ramp(progress) * sum_k decay^k * loss_k

The base term keeps the trunk what it was: cross-entropy with the texts, or with the laws of the model as it came, which under
LoRA is the same model with its adapters off. This file knows trunks and terms. It refuses to know methods, steps and files.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.drafters.parts.drafter_loss import chunked_loss
from headstart.drafters.parts.losses import Batch, Metrics, Objective, OutputHead
from headstart.target.embed_head import EmbedHead
from headstart.target.hidden_states import asking_for
from headstart.training.batching import evenly
from headstart.training.dataset import Dataset, TextBatch
from headstart.training.features import as_batch, layers
from headstart.training.frozen_target import parameter_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Medusa2Config(BaseModel):
    """How the trunk learns with the heads.

    mode: "lora" (peft, on every linear inside the layers; merged at the end) or "full". rank, alpha, dropout: of LoRA. base: "kl"
    to the model as it came, or "ce" with the texts. weight: lambda0 of the heads' losses. ramp: how that grows, "constant", or
    "sine" from 0 over the first `ramp_share` of the steps. head_rate: the heads' learning rate over the trunk's. Joint training
    should begin from heads that were trained with the trunk frozen: `start` of the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["lora", "full"] = "lora"
    rank: int = Field(default=32, ge=1)
    alpha: int = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    base: Literal["kl", "ce"] = "kl"
    weight: float = Field(default=0.2, gt=0)
    ramp: Literal["constant", "sine"] = "constant"
    ramp_share: float = Field(default=0.5, gt=0, le=1)
    head_rate: float = Field(default=4.0, gt=0)

    def lambda0(self, progress: float) -> float:
        """The weight of the heads' losses when this share of the run, in [0, 1], is done."""
        if self.ramp == "constant":
            return self.weight
        return self.weight * math.sin(math.pi / 2 * min(1.0, progress / self.ramp_share))


class Trunk(nn.Module):
    """A model that learns, beside what it was before. Raises ValueError where peft is missing or finds nothing to adapt, and for a
    model whose weights are quantised: what it learned would be rounded away."""

    def __init__(self, model: PreTrainedModel, config: Medusa2Config) -> None:
        super().__init__()
        if getattr(model.config, "quantization_config", None) is not None:
            raise ValueError(
                "a quantised target cannot learn with its heads; leave joint out, or name the target before quantising"
            )
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._embed_head = EmbedHead(model)
        original = None
        if config.mode == "lora":
            self.model: Any = _adapted(model.requires_grad_(False), config)
        else:
            original = copy.deepcopy(model).eval().requires_grad_(False)
            self.model = model.requires_grad_(True)
        self._original: tuple[Any, EmbedHead] | None = (
            None if original is None else (original, EmbedHead(original))
        )  # not a submodule

    def states(self, tokens: Tensor, wanted: Sequence[int]) -> dict[int, Tensor]:
        """[rows, length] -> the output of each layer in `wanted`, [rows, length, hidden], with gradients."""
        return _states(self.model, tokens, wanted)

    @torch.no_grad()
    def last_hidden_before(self, tokens: Tensor) -> Tensor:
        """[rows, length] -> the final states [rows, length, hidden] of the model as it came."""
        last = self.num_layers - 1
        if self._original is not None:
            return _states(self._original[0].to(tokens.device), tokens, [last])[last]
        is_training = self.model.training
        self.model.eval()
        with self.model.disable_adapter():
            found = _states(self.model, tokens, [last])[last]
        self.model.train(is_training)
        return found

    @property
    def output_head(self) -> OutputHead:
        """Its head now, which learns with the rest if nothing is adapted."""
        return OutputHead(self._embed_head.logits, self._embed_head.parameters)

    def logits_before(self, states: Tensor) -> Tensor:
        """The head of the model as it came: [n, hidden] -> [n, vocab]."""
        embed_head = self._embed_head if self._original is None else self._original[1]
        return embed_head.logits(states)

    def merged(self) -> PreTrainedModel:
        """An ordinary model: adapters become part of the weights they adapt, and are gone. For the end."""
        whole: PreTrainedModel = self.model.merge_and_unload() if hasattr(self.model, "merge_and_unload") else self.model
        return whole


class Medusa2(nn.Module):
    """A loss module that trains trunk and heads.

    Metrics are those of the heads. The base term is summed over the loss mask and shares the heads' divisor.
    """

    def __init__(self, drafter: Any, model: PreTrainedModel, objective: Objective, config: Medusa2Config) -> None:
        super().__init__()
        self.drafter = drafter
        self.trunk = Trunk(model, config)
        self.objective = objective
        self.config = config
        self._taps = [tap % self.trunk.num_layers for tap in drafter.taps]

    def forward(self, texts: TextBatch, progress: float = 0.0) -> tuple[Tensor, Metrics]:
        """The summed loss, a scalar, and metrics. progress: share of the run that is done, in [0, 1]."""
        texts = texts.to(next(self.parameters()).device)
        batch = as_batch(texts, self.trunk.states(texts.tokens, layers(self._taps, self.trunk.num_layers)), self._taps)
        heads, metrics = self.drafter.loss(batch, self.objective)
        return self.base(batch) + self.config.lambda0(progress) * heads, metrics

    def base(self, batch: Batch) -> Tensor:
        """The trunk's own loss, summed over an assistant's tokens."""
        where = batch.loss_mask[:, 1:].nonzero(as_tuple=True)
        own, tokens = batch.last_hidden[where], batch.tokens[where[0], where[1] + 1]
        if self.config.base == "ce":
            return chunked_loss(self.trunk.output_head, own, tokens, None, Objective(hard=1), self.trunk.logits_before)[0]
        before = self.trunk.last_hidden_before(batch.tokens)[where]
        return chunked_loss(self.trunk.output_head, own, tokens, before, Objective(soft=1), self.trunk.logits_before)[0]

    @torch.no_grad()
    def cross_entropy(self, texts: TextBatch) -> tuple[float, int]:
        """Summed cross-entropy of the trunk with an assistant's tokens, nats, and their number: perplexity = exp(sum / number)."""
        texts = texts.to(next(self.parameters()).device)
        last = self.trunk.num_layers - 1
        last_hidden = self.trunk.states(texts.tokens, [last])[last]
        where = texts.loss_mask[:, 1:].nonzero(as_tuple=True)
        tokens = texts.tokens[where[0], where[1] + 1]
        loss, _ = chunked_loss(
            self.trunk.output_head, last_hidden[where], tokens, None, Objective(hard=1), self.trunk.logits_before
        )
        return float(loss), len(tokens)

    def groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The trunk at `learning_rate`, the heads at `head_rate` times that."""
        heads = parameter_groups(self.drafter.parameters(), learning_rate * self.config.head_rate, weight_decay)
        return heads + parameter_groups(self.trunk.parameters(), learning_rate, weight_decay)


def _states(model: Any, tokens: Tensor, wanted: Sequence[int]) -> dict[int, Tensor]:
    out = model(input_ids=tokens, use_cache=False, logits_to_keep=1, output_hidden_states=asking_for(wanted))
    return {layer: out.hidden_states[layer + 1] for layer in wanted}


def _adapted(model: PreTrainedModel, config: Medusa2Config) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("mode=lora needs peft, which is not installed; pip install 'headstart[train]'") from None
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules="all-linear")
    with warnings.catch_warnings():  # peft asks transformers for an attribute by an old name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, lora)


def perplexity(joint: Medusa2, dataset: Dataset, rows: int) -> float | None:
    """Of the trunk as it is, on the answers of the held-out texts; None where nothing is held out."""
    if not dataset.held_out:
        return None
    joint.eval()
    lengths = [len(dataset.texts[index].tokens) for index in dataset.held_out]
    batches = [[dataset.held_out[place] for place in batch] for batch in evenly(lengths, rows)]
    losses, counts = zip(*(joint.cross_entropy(dataset.pad(batch)) for batch in batches), strict=True)
    return math.exp(sum(losses) / max(1, sum(counts)))
