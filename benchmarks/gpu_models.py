"""The models that `gpu_check.py` runs: the target under test and a smaller draft model, with plain torch operations."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.target.loading import embedded
from headstart.target.target import Target, load_model


def targets(options: Namespace, dtype: torch.dtype, device: torch.device) -> tuple[Target, Target]:
    """The model under test and a smaller draft model, with plain torch operations, so that all devices run the same ones."""
    if options.random:
        layers, hidden = map(int, options.random.split("x"))
        model = random_llama(layers, hidden, dtype, device)
    else:
        model = load_model(options.model or embedded("target"), dtype, str(device))
    draft = options.draft or (None if options.model or options.random else embedded("draft"))
    if draft is None:
        return Target(model), Target(first_layers(model, 2))
    return Target(model), Target(load_model(draft, dtype, str(device)))


def random_llama(layers: int, hidden: int, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A Llama with random weights."""
    heads = max(1, hidden // (128 if hidden >= 2048 else 64))
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=-(-8 * hidden // 3 // 256) * 256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        max_position_embeddings=4096,
        initializer_range=0.05,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def first_layers(model: Any, layers: int) -> Any:
    """A draft model that is often right: the first layers of the same model. The weights are shared."""
    config = type(model.config).from_dict(model.config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        cut = type(model)(config)
    cut.load_state_dict(model.state_dict(), strict=False, assign=True)
    cut.tie_weights()
    cut.model.rotary_emb = model.model.rotary_emb  # its buffers are computed, not loaded
    return cut
