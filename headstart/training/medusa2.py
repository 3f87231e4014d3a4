"""Medusa-2: the trunk is trained with its heads, so that it produces what they can draft (Cai et al. 2024, arXiv 2401.10774).

    loss = base + lambda0 * ramp(progress) * sum_k decay^k * loss_k

The base term keeps the trunk close to the original model: cross-entropy with the texts, or with the original model's
distributions. Under LoRA, the original model is the trunk with its adapters disabled. The module must not import methods or the
training loop.
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
from headstart.target.hidden_states import hidden_states
from headstart.training.batching import evenly
from headstart.training.dataset import Dataset, TextBatch
from headstart.training.features import as_batch, layers
from headstart.training.frozen_target import parameter_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Medusa2Config(BaseModel):
    """How the trunk is trained with the heads.

    mode: "lora" (peft, on every linear layer inside the blocks; merged at the end) or "full".
    rank, alpha, dropout: of LoRA.
    base: the trunk's own loss, "kl" to the original model or "ce" (cross-entropy) with the texts.
    weight: lambda0 of the heads' losses.
    ramp: schedule of that weight, "constant", or "sine" from 0 over the first `ramp_share` of the steps.
    head_rate: learning rate of the heads over that of the trunk.

    Joint training should start from heads that were trained on the frozen trunk: `start` of the run.
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
    """A model that is trained, with access to what it was before.

    Raises ValueError if peft is missing or finds nothing to adapt, and for a model whose weights are quantised: training steps
    would be rounded away.
    """

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
        """Tokens [rows, length] -> the output of each layer in `wanted`, [rows, length, hidden], with gradients."""
        return hidden_states(self.model, tokens, wanted)

    @torch.no_grad()
    def last_hidden_before(self, tokens: Tensor) -> Tensor:
        """Tokens [rows, length] -> last hidden states of the original model, [rows, length, hidden]."""
        last = self.num_layers - 1
        if self._original is not None:
            return hidden_states(self._original[0].to(tokens.device), tokens, [last])[last]
        is_training = self.model.training
        self.model.eval()
        with self.model.disable_adapter():
            last_hidden = hidden_states(self.model, tokens, [last])[last]
        self.model.train(is_training)
        return last_hidden

    @property
    def output_head(self) -> OutputHead:
        """The LM head as it is now; it is trained with the rest unless LoRA is used."""
        return OutputHead(self._embed_head.logits, self._embed_head.parameters)

    def logits_before(self, states: Tensor) -> Tensor:
        """Logits by the LM head of the original model: [n, hidden] -> [n, vocab]."""
        embed_head = self._embed_head if self._original is None else self._original[1]
        return embed_head.logits(states)

    def merged(self) -> PreTrainedModel:
        """An ordinary model, with the adapters merged into its weights. The trunk cannot be trained afterwards."""
        model: PreTrainedModel = self.model.merge_and_unload() if hasattr(self.model, "merge_and_unload") else self.model
        return model


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
        """The trunk's own loss, a scalar, summed over the loss mask."""
        where = batch.loss_mask[:, 1:].nonzero(as_tuple=True)
        last_hidden, tokens = batch.last_hidden[where], batch.tokens[where[0], where[1] + 1]
        if self.config.base == "ce":
            return chunked_loss(self.trunk.output_head, last_hidden, tokens, None, Objective(hard=1), self.trunk.logits_before)[0]
        before = self.trunk.last_hidden_before(batch.tokens)[where]
        return chunked_loss(self.trunk.output_head, last_hidden, tokens, before, Objective(soft=1), self.trunk.logits_before)[0]

    @torch.no_grad()
    def cross_entropy(self, texts: TextBatch) -> tuple[float, int]:
        """Cross-entropy of the trunk in nats, summed over the loss mask, and the number of its tokens."""
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
        """Parameter groups for the optimizer: the trunk at `learning_rate`, the heads at `head_rate` times that."""
        heads = parameter_groups(self.drafter.parameters(), learning_rate * self.config.head_rate, weight_decay)
        return heads + parameter_groups(self.trunk.parameters(), learning_rate, weight_decay)


def _adapted(model: PreTrainedModel, config: Medusa2Config) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("mode=lora needs peft, which is not installed; pip install 'headstart[train]'") from None
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules="all-linear")
    with warnings.catch_warnings():  # peft asks transformers for an attribute by an old name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, lora)


def perplexity(loss_module: Medusa2, dataset: Dataset, rows: int) -> float | None:
    """Perplexity of the trunk on the answers of the held-out texts; None if nothing is held out. rows: texts of a batch."""
    if not dataset.held_out:
        return None
    loss_module.eval()
    lengths = [len(dataset.texts[index].tokens) for index in dataset.held_out]
    batches = [[dataset.held_out[index] for index in batch] for batch in evenly(lengths, rows)]
    losses, counts = zip(*(loss_module.cross_entropy(dataset.pad(batch)) for batch in batches), strict=True)
    return math.exp(sum(losses) / max(1, sum(counts)))
