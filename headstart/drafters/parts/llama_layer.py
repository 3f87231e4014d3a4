"""Decoders of the plainest families, and what EAGLE makes of them: a layer without its first norm, a layer with a wider attention.

Their layers are an attention and an MLP, each behind a norm, so that they may be taken apart and run without the shell around them.
This file knows layers. It refuses to know seats, methods and losses.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from headstart.target.attention import AttentionMetadata

# Families whose decoders are nothing but angles, then layers of a normed attention and a normed MLP, then a norm.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_SIZES = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
STEADY = ("default", "linear", "llama3", "yarn")  # rotary positions that do not depend on the others in a forward


def llama_block(hidden: int) -> dict[str, Any]:
    """Settings for `decoder` of one Llama layer that suits a hidden size: heads of 64 where that divides it, else of the largest
    power of two that does."""
    size = next(size for size in (64, 32, 16, 8, 4, 2, 1) if hidden % size == 0)
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": hidden // size,
        "num_key_value_heads": hidden // size,
        "head_dim": size,
        "intermediate_size": -(-8 * hidden // 3 // 32) * 32,
        "max_position_embeddings": 2**20,
        "rms_norm_eps": 1e-5,
    }


def llama_block_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings for `decoder` of one Llama layer with the sizes and rotary positions of a model's own layers, where those are
    such a layer's; else as `llama_block` has them."""
    text = config.get_text_config()
    block = llama_block(int(text.hidden_size))
    own = {name: value for name in _SIZES if (value := getattr(text, name, None)) is not None}
    if not {"num_attention_heads", "intermediate_size"} <= own.keys() or getattr(text, "kv_lora_rank", None):
        return block
    own.setdefault("head_dim", block["hidden_size"] // own["num_attention_heads"])
    own.setdefault("num_key_value_heads", own["num_attention_heads"])
    return {**block, **own, **_angles(getattr(text, "rope_parameters", None) or {})}


def _angles(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The setting of rotary positions; of kinds that a plain layer cannot have, the base alone."""
    if not isinstance(rope.get("rope_theta"), float | int):
        return {}
    is_fit = rope.get("rope_type") in STEADY and rope.get("partial_rotary_factor", 1) == 1
    return {"rope_parameters": dict(rope) if is_fit else {"rope_type": "default", "rope_theta": rope["rope_theta"]}}


class Wide(nn.Module):
    """One of transformers' decoder layers whose attention reads [embedding, state], each normed (EAGLE-3, arXiv 2503.01840).

    layer: is taken apart. norm_before_residual: the residual is the normed state, not the state itself.
    """

    def __init__(self, layer: Any, norm_before_residual: bool) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.hidden_norm = copy.deepcopy(layer.input_layernorm)
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            wide = nn.Linear(2 * narrow.in_features, narrow.out_features, bias=narrow.bias is not None)
            setattr(self.self_attn, name, wide.to(narrow.weight.dtype))

    @torch.no_grad()
    def look_at_itself(self) -> None:
        """Begin with an attention that sees little but its own place, and hands on what is there at full size: that is the only way
        for the embedding into the residual, and a new attention, which sees everything a little, takes long to find it."""
        attention, size = self.self_attn, int(self.self_attn.head_dim)
        key, query = attention.k_proj.weight, attention.q_proj.weight
        for weight in (key, attention.v_proj.weight, attention.o_proj.weight):
            weight.normal_(0, weight.shape[1] ** -0.5)
        query.copy_(key.unflatten(0, (-1, size)).repeat_interleave(len(query) // len(key), 0).flatten(0, 1))

    def forward(self, hidden_states: Tensor, **seen: Any) -> Tensor:
        """[rows, length, 2 * hidden] -> [rows, length, hidden]. seen: what a decoder hands to its layers' attention."""
        embedded, states = hidden_states.chunk(2, -1)
        normed = self.hidden_norm(states)
        attended, _ = self.self_attn(hidden_states=torch.cat([self.input_layernorm(embedded), normed], -1), **seen)
        states = (normed if self.norm_before_residual else states) + attended
        result: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return result


def without_norms(model: Any) -> Any:
    """A decoder whose first layer has no norm before its attention, and which ends without one (EAGLE, arXiv 2401.15077)."""
    _require_llama_like(model)
    model.layers[0].input_layernorm = nn.Identity()
    model.norm = nn.Identity()
    return model


def widened(model: Any, norm_before_residual: bool = False) -> Any:
    """A decoder that reads [embedding, state], 2 * hidden wide, and ends without a norm; see `Wide`."""
    _require_llama_like(model)
    model.layers[0] = Wide(model.layers[0], norm_before_residual)
    model.norm = nn.Identity()
    return model


def _require_llama_like(model: Any) -> None:
    """Raise ValueError where a decoder's layers are not made of an attention, an MLP and a norm before each."""
    if (kind := model.config.model_type) not in LLAMA_LIKE:
        raise ValueError(
            f"a drafter of this method needs a Llama-like decoder layer ({', '.join(LLAMA_LIKE)}), but its block is of {kind!r}"
        )


def is_llama_like(model: Any) -> bool:
    return model.config.model_type in LLAMA_LIKE


def run_layers(model: Any, inputs: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
    """What a plain decoder makes of its input [1, n, its width], [1, n, hidden], without asking for masks, caches and outputs of
    which it has none: that takes as long as a good part of a small layer."""
    angles = model.rotary_emb(inputs, positions)
    for layer in model.layers:
        # Families differ in which of these have a default; the mask, which is in `metadata`, has none in Qwen's and Mistral's.
        inputs = layer(inputs, attention_mask=None, position_ids=positions, position_embeddings=angles, headstart=metadata)
    states: Tensor = model.norm(inputs)
    return states


def width_of(model: Any) -> int:
    """Of what a decoder reads."""
    hidden = int(model.config.hidden_size)
    return 2 * hidden if isinstance(getattr(model, "layers", [None])[0], Wide) else hidden
