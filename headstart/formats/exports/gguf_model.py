"""A target's weights and numbers as llama.cpp's GGUF files have them. Must not know heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from headstart.formats.gguf_file import TYPES, Entry, Value
from headstart.formats.gguf_names import ARCHITECTURES, ROPE_FACTORS, Architecture, expert_of, heads_of, interleave
from headstart.formats.weights import Weights

ROPE_TYPES = ("default", "linear", "llama3")
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # in the words of safetensors
_NARROW = (torch.float16, torch.bfloat16)
_WIDE_MATRICES = ("ffn_gate_inp.weight",)  # matrices that llama.cpp wants in float32


@dataclass(frozen=True)
class Source:
    """A tensor of a model in its files.

    read: gives it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Source:
        """The source of a tensor in memory."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def architecture_of(config: Any) -> Architecture:
    """llama.cpp's architecture of a language model's configuration.

    Raises ValueError where it is not known here, or the configuration says something that is not written here.
    """
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"a {kind!r} model cannot be written to a GGUF file here, only models of type {', '.join(ARCHITECTURES)}; "
            "llama.cpp's own convert_hf_to_gguf.py knows more"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    wrong = {
        "rope_type": rope.get("rope_type", "default") if rope.get("rope_type", "default") not in ROPE_TYPES else None,
        "sliding_window": _window(config),
        "hidden_act": config.hidden_act if config.hidden_act != "silu" else None,
        "mlp_bias": getattr(config, "mlp_bias", None) or None,
        "attention_bias": (getattr(config, "attention_bias", None) or None) if kind != "glm4_moe" else None,
    }
    for name, value in wrong.items():
        if value is not None:
            raise ValueError(
                f"{name} of this {kind!r} model is {value!r}, which is not written to GGUF files here; use llama.cpp's own "
                "convert_hf_to_gguf.py"
            )
    return ARCHITECTURES[kind]


def _window(config: Any) -> int | None:
    """The sliding window of a model, None where its layers see all tokens."""
    is_used = getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    return window if is_used and window is not None and window < config.max_position_embeddings else None


# -- numbers --


def fields(config: Any, num_blocks: int) -> dict[str, Value]:
    """The numbers that llama.cpp reads, by key. num_blocks: layers, those of modules included."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return {
        "%s.vocab_size": int(config.vocab_size),
        "%s.context_length": int(config.max_position_embeddings),
        "%s.embedding_length": int(config.hidden_size),
        "%s.block_count": num_blocks,
        "%s.feed_forward_length": int(config.intermediate_size),
        "%s.attention.head_count": heads,
        "%s.attention.head_count_kv": int(getattr(config, "num_key_value_heads", None) or heads),
        "%s.attention.key_length": head_dim,
        "%s.attention.value_length": head_dim,
        "%s.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "%s.rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1)),
        "%s.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        **_rope_scaling(rope),
        **(_expert_fields(config) if hasattr(config, "n_routed_experts") else {}),
    }


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Value]:
    return (
        {"%s.rope.scaling.type": "linear", "%s.rope.scaling.factor": float(rope["factor"])}
        if rope.get("rope_type") == "linear"
        else {}
    )


def _expert_fields(config: Any) -> dict[str, Value]:
    return {
        "%s.expert_count": int(config.n_routed_experts),
        "%s.expert_used_count": int(config.num_experts_per_tok),
        "%s.expert_feed_forward_length": int(config.moe_intermediate_size),
        "%s.expert_shared_count": int(config.n_shared_experts),
        "%s.leading_dense_block_count": int(config.first_k_dense_replace),
        "%s.expert_gating_func": 2,  # sigmoid
        "%s.expert_weights_scale": float(config.routed_scaling_factor),
        "%s.expert_weights_norm": bool(config.norm_topk_prob),
        "%s.expert_group_count": int(config.n_group),
        "%s.expert_group_used_count": int(config.topk_group),
    }


def rope_factors(config: Any) -> Tensor | None:
    """[rotated channels / 2] float32 by which llama.cpp divides the frequencies of a model; None where they are plain.

    config: of a language model, whose RoPE type is one of `ROPE_TYPES`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(len(scaled)).float() / len(scaled))
    factors: Tensor = (plain / scaled).float()
    return factors


# -- tensors --


def sources(weights: Weights) -> Iterator[Source]:
    """Yields the tensors of a model's safetensors. weights: under Hugging Face's names."""
    for path in weights.files:
        with safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        for name, kind in kinds.items():
            yield Source(name, weights.shapes[name], _STORED.get(kind, torch.uint8), partial(weights.__getitem__, name))


def entries(architecture: Architecture, config: Any, tensors: Iterable[Source], dtype: torch.dtype | None) -> list[Entry]:
    """What is written of these tensors, by llama.cpp's names and in its order of rows and dtypes.

    config: of the language model.
    dtype: of the matrices; None: as stored.
    Raises ValueError for a tensor that the architecture has no place for, and for another dtype than float32, float16 and bfloat16.
    """
    heads = int(config.num_attention_heads), int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    result = []
    for source in _stacked(tensors):
        name = architecture.to_gguf(source.name)
        count = heads_of(source.name, *heads) if architecture.interleaved else None
        written = written_dtype(name, len(source.shape), dtype or source.dtype)
        result.append(Entry(name, source.shape, written, partial(_read, source, count, written)))
    if (factors := rope_factors(config)) is not None:
        result.append(Entry.of(ROPE_FACTORS, factors))
    return result


def written_dtype(name: str, dims: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which llama.cpp wants a tensor: float32 for norms, biases and routers. name: llama.cpp's.

    Raises ValueError for a dtype that is not written.
    """
    if dtype not in TYPES:
        raise ValueError(
            f"weights of type {str(dtype).removeprefix('torch.')} are not written to GGUF files; give --dtype bfloat16"
        )
    is_wide = dtype in _NARROW and (dims < 2 or name.endswith(_WIDE_MATRICES))
    return torch.float32 if is_wide else dtype


def _read(source: Source, heads: int | None, dtype: torch.dtype) -> Tensor:
    tensor = source.read().to(dtype)
    return (tensor if heads is None else interleave(tensor, heads)).contiguous()


def _stacked(tensors: Iterable[Source]) -> list[Source]:
    """The tensors, with the matrices of a layer's experts as one."""
    result, stacks = [], {}  # type: ignore[var-annotated]
    for source in tensors:
        if (expert := expert_of(source.name)) is None:
            result.append(source)
        else:
            stacks.setdefault(expert[0], {})[expert[1]] = source
    for name, by_number in stacks.items():
        ordered = [by_number[number] for number in range(len(by_number))]
        first = ordered[0]
        result.append(Source(name, (len(ordered), *first.shape), first.dtype, partial(_stack, ordered)))
    return result


def _stack(ordered: list[Source]) -> Tensor:
    return torch.stack([source.read() for source in ordered])
