"""Decoders of Llama-like families, and the two changes that EAGLE makes to them: a layer without its first norm, and a layer whose
attention reads embedding and state. Must not import a method.

A Llama-like layer is an attention and an MLP with a norm before each, so it runs without the model's `forward` around it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from headstart.target.attention import AttentionMetadata
    from headstart.target.cache import KVCache
    from headstart.target.steps import Steps

# Model types whose decoders are rotary embeddings, then layers of a normed attention and a normed MLP, then a norm.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_SIZES = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
MOST_POSITIONS = 2**15  # of a table of cosines and sines
STEADY = ("default", "linear", "llama3", "yarn")  # RoPE types whose frequencies do not depend on the positions in a forward


def llama_block(hidden: int) -> dict[str, Any]:
    """Settings for `decoder` of one Llama layer for a hidden size.

    The size of an attention head is 64 where that divides the hidden size, else the largest power of two that does.
    """
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
    """Settings for `decoder` of one Llama layer with the sizes and the RoPE of a model's own layers.

    Where a Llama layer cannot have these sizes, the settings are those of `llama_block`.
    """
    text = config.get_text_config()
    block = llama_block(int(text.hidden_size))
    sizes = {name: value for name in _SIZES if (value := getattr(text, name, None)) is not None}
    if not {"num_attention_heads", "intermediate_size"} <= sizes.keys() or getattr(text, "kv_lora_rank", None):
        return block
    sizes.setdefault("head_dim", block["hidden_size"] // sizes["num_attention_heads"])
    sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
    return {**block, **sizes, **_rope_settings(getattr(text, "rope_parameters", None) or {})}


def _rope_settings(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE settings; of types that a Llama layer cannot have, only the base."""
    if not isinstance(rope.get("rope_theta"), float | int):
        return {}
    is_possible = rope.get("rope_type") in STEADY and rope.get("partial_rotary_factor", 1) == 1
    return {"rope_parameters": dict(rope) if is_possible else {"rope_type": "default", "rope_theta": rope["rope_theta"]}}


class Wide(nn.Module):
    """A Llama-like decoder layer whose attention reads [embedding, state], each normed (EAGLE-3, arXiv 2503.01840).

    layer: a decoder layer of transformers; its modules are reused, so it must not be used afterwards.
    norm_before_residual: the residual is the normed state; False: the state itself.
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
    def init_self_attention(self) -> None:
        """Initialise the attention so that each token attends mostly to itself, and passes its input on at full size.

        Only through the attention does the embedding reach the residual, and an attention with transformers' initial weights, which
        attends to all tokens alike, learns that slowly.
        """
        attention, size = self.self_attn, int(self.self_attn.head_dim)
        key, query = attention.k_proj.weight, attention.q_proj.weight
        for weight in (key, attention.v_proj.weight, attention.o_proj.weight):
            weight.normal_(0, weight.shape[1] ** -0.5)
        query.copy_(key.unflatten(0, (-1, size)).repeat_interleave(len(query) // len(key), 0).flatten(0, 1))

    def forward(self, hidden_states: Tensor, **attention_inputs: Any) -> Tensor:
        """[rows, length, 2 * hidden] -> [rows, length, hidden].

        attention_inputs: what a decoder passes to its layers' attention.
        """
        embedded, states = hidden_states.chunk(2, -1)
        normed = self.hidden_norm(states)
        attended, _ = self.self_attn(hidden_states=torch.cat([self.input_layernorm(embedded), normed], -1), **attention_inputs)
        states = (normed if self.norm_before_residual else states) + attended
        result: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return result


def without_norms(model: Any) -> Any:
    """The decoder, changed: no norm before the first layer's attention, and none at the end (EAGLE, arXiv 2401.15077).

    Raises ValueError where it is not Llama-like.
    """
    _require_llama_like(model)
    model.layers[0].input_layernorm = nn.Identity()
    model.norm = nn.Identity()
    return model


def widened(model: Any, norm_before_residual: bool = False) -> Any:
    """The decoder, changed: its first layer is a `Wide` one, which reads [embedding, state], and it has no norm at the end.

    Raises ValueError where it is not Llama-like.
    """
    _require_llama_like(model)
    model.layers[0] = Wide(model.layers[0], norm_before_residual)
    model.norm = nn.Identity()
    return model


def _require_llama_like(model: Any) -> None:
    if (kind := model.config.model_type) not in LLAMA_LIKE:
        raise ValueError(
            f"a drafter of this method needs a Llama-like decoder layer ({', '.join(LLAMA_LIKE)}), but its block is of {kind!r}"
        )


def is_llama_like(model: Any) -> bool:
    """Whether `run_layers` can run the decoder."""
    return model.config.model_type in LLAMA_LIKE


def run_layers(model: Any, inputs: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
    """The output of a Llama-like decoder, as its `forward` gives it: [1, n, input width] -> [1, n, hidden].

    It skips the mask, cache and output classes of `forward`, whose cost is a large share of that of a small layer.

    positions: [1, n].
    """
    named = {"position_ids": positions, "position_embeddings": model.rotary_emb(inputs, positions), "headstart": metadata}
    for layer in model.layers:
        # Families differ in which of these have a default; the mask, which is in `metadata`, has none in Qwen's and Mistral's.
        inputs = layer(inputs, attention_mask=None, **named) if isinstance(layer, Wide) else _run_layer(layer, inputs, named)
    states: Tensor = model.norm(inputs)
    return states


def _run_layer(layer: Any, states: Tensor, attention_inputs: Mapping[str, Any]) -> Tensor:
    """[1, n, hidden] -> [1, n, hidden], as the layer's `forward`."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(states), attention_mask=None, **attention_inputs)
    states = states + attended
    result: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return result


def record_layers(model: Any, steps: Steps, cache: KVCache, inputs: Sequence[int]) -> int:
    """As `run_layers`, as steps. inputs: values; of a `Wide` first layer, the embedding and the state. Returns a value.

    Raises UnsupportedError where some module is not a compiled one.
    """
    *embedded, states = inputs
    for layer in model.layers:
        if isinstance(layer, Wide):
            normed = steps.norm(layer.hidden_norm, states)
            attended = steps.attention(layer.self_attn, cache, steps.join(steps.norm(layer.input_layernorm, embedded[0]), normed))
            states = steps.add(normed if layer.norm_before_residual else states, attended)
        else:
            states = steps.add(states, steps.attention(layer.self_attn, cache, steps.norm(layer.input_layernorm, states)))
        states = steps.add(states, steps.mlp(layer.mlp, steps.norm(layer.post_attention_layernorm, states)))
    return steps.norm(model.norm, states)


class RopeTable(nn.Module):
    """The cosines and sines of a rotary embedding, computed once for each position; for the CPU.

    module: of a type in `STEADY`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._tables: tuple[Tensor, Tensor] | None = None  # [positions, head dim] each

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, n] position_ids -> [rows, n, head dim] cosines, and sines, in the dtype of `x`."""
        try:
            return self._read(x, position_ids)
        except IndexError:
            if self.tables(x, int(position_ids.max()) + 1) is None:
                angles: tuple[Tensor, Tensor] = self.module(x, position_ids)
                return angles
        return self._read(x, position_ids)

    def tables(self, x: Tensor, positions: int) -> tuple[Tensor, Tensor] | None:
        """[at least `positions`, head dim] cosines, and sines, in the dtype of `x`; None where they would be too large."""
        if self._tables is None or self._tables[0].dtype is not x.dtype or len(self._tables[0]) < positions:
            size = 1 << (positions - 1).bit_length()
            if size > MOST_POSITIONS:
                return None
            cos, sin = self.module(x, torch.arange(max(size, 512))[None])
            self._tables = cos[0], sin[0]
        return self._tables

    def _read(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Raises IndexError where the tables lack a position."""
        if self._tables is None or self._tables[0].dtype is not x.dtype:
            raise IndexError
        cos, sin = self._tables
        return nn.functional.embedding(positions, cos), nn.functional.embedding(positions, sin)


def input_width(model: Any) -> int:
    """Width of a decoder's input."""
    hidden = int(model.config.hidden_size)
    return 2 * hidden if isinstance(getattr(model, "layers", [None])[0], Wide) else hidden
