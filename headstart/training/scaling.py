"""The arithmetic of training heads: memory of a process, features on the disk, and operations, from sizes alone.

Weights are counted in models that are on no device, so that sizes are those of the real modules. The module must not run a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headstart.drafters.parts.losses import CHUNK
from headstart.drafters.registry import method
from headstart.training.config_file import validate
from headstart.training.features import layers
from headstart.training.sharding import blocks

FLOAT32, BFLOAT16 = 4, 2  # bytes of a number
TRAINED = 4 * FLOAT32  # of a trained weight: itself, its gradient, and the two moments of AdamW
LOGITS = 4  # arrays of logits that exist at once: drafter's, target's, a distribution, a gradient


@dataclass(frozen=True)
class Sizes:
    """A target and heads for it, counted.

    in_layers, outside: weights of the target in its layers, and those of embedding, norm and LM head.
    layer: weights of its largest layer.
    heads: trained weights; vocab_weights of them are in embeddings and LM heads.
    hidden, intermediate, vocab: widths of the target.
    draft_vocab: width of the heads' logits.
    stored: layers whose outputs the heads read, with the last.
    guesses: guesses of a position that have a loss.
    passes: how often a position goes through the heads; with several modules that take turns, divided by their number.
    kept: numbers of a position that are kept for the backward of a pass: inputs and outputs of the linears.
    """

    in_layers: int
    outside: int
    layer: int
    heads: int
    vocab_weights: int
    hidden: int
    intermediate: int
    vocab: int
    draft_vocab: int
    stored: int
    guesses: int
    passes: float
    kept: int

    @classmethod
    def of(cls, target_config: Any, name: str, settings: Mapping[str, Any]) -> Sizes:
        """The sizes of a method's heads for a target. target_config: of transformers. settings: of the method."""
        from transformers import AutoModelForCausalLM

        config = target_config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(target_config)
            drafter: Any = method(name)
            chosen = drafter.resolve_config(validate(drafter.config_type, settings, name), target_config)
            heads = drafter(chosen, int(config.hidden_size), int(config.vocab_size))
        per_layer = [_count(block) for block in blocks(model)]
        draft_vocab = getattr(chosen, "draft_vocab", None) or int(config.vocab_size)
        wide = {int(config.vocab_size), draft_vocab}
        return cls(
            in_layers=sum(per_layer),
            outside=_count(model) - sum(per_layer),
            layer=max(per_layer),
            heads=_count(heads),
            vocab_weights=sum(weight.numel() for weight in heads.parameters() if weight.shape[0] in wide),
            hidden=int(config.hidden_size),
            intermediate=int(config.intermediate_size),
            vocab=int(config.vocab_size),
            draft_vocab=draft_vocab,
            stored=len(layers(heads.taps, int(config.num_hidden_layers))),
            guesses=getattr(chosen, "steps", None) or heads.depth,
            passes=heads.depth / len(heads.stages) if hasattr(heads, "stages") else getattr(chosen, "steps", None) or 1,
            kept=sum(
                linear.in_features + linear.out_features
                for linear in heads.modules()
                if isinstance(linear, nn.Linear) and linear.out_features not in wide
            ),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    target: its weights, and the layers that are gathered at once where they are divided.
    heads: weights, gradients and optimizer.
    activations: of the heads, for their backward, and of the target's forward.
    logits: of `CHUNK` positions.
    """

    target: float
    heads: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of it, without what libraries and fragments take."""
        return self.target + self.heads + self.activations + self.logits


def memory(sizes: Sizes, tokens: int, *, processes: int = 1, here: int = 1, is_stored: bool = False) -> Memory:
    """The memory of a process that trains heads in bfloat16 mixed precision on a target in bfloat16.

    tokens: of a batch, with padding.
    processes: of the run; more than 1: FSDP2. here: processes of a machine, which divide the target's layers.
    is_stored: whether features come from a store.
    """
    in_layers = 0.0 if is_stored else sizes.in_layers / here + (2 * sizes.layer if here > 1 else 0)
    gathered = 2 * FLOAT32 * sizes.heads if processes > 1 else 0
    forward = 0 if is_stored else tokens * (2 * sizes.intermediate + 6 * sizes.hidden) * BFLOAT16
    features = tokens * sizes.hidden * (sizes.stored * FLOAT32 + sizes.stored * BFLOAT16)
    backward = tokens * sizes.kept * sizes.passes * FLOAT32
    return Memory(
        target=(sizes.outside + in_layers) * BFLOAT16,
        heads=sizes.heads * TRAINED / processes + gathered,
        activations=forward + features + backward,
        logits=LOGITS * CHUNK * max(sizes.vocab, sizes.draft_vocab) * FLOAT32,
    )


def disk(sizes: Sizes) -> int:
    """Bytes of a token in a feature store, in bfloat16: layers * hidden * 2."""
    return sizes.stored * sizes.hidden * BFLOAT16


def operations(sizes: Sizes) -> tuple[float, float]:
    """Floating-point operations of a token: of the target's forward, and of the heads' forward and backward with all logits.

    2 a weight forward, 4 more backward; attention over the context is left out, which is small below some thousand tokens.
    """
    target = 2 * sizes.in_layers
    body = 6 * (sizes.heads - sizes.vocab_weights) * sizes.passes
    trained = 6 if sizes.vocab_weights else 4  # the target's own LM head has no gradient
    logits = sizes.guesses * sizes.hidden * (2 * sizes.vocab + trained * sizes.draft_vocab)
    return target, body + logits


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
