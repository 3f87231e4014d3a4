"""Settings of a drafter's decoder layers, read from the `config.json` that is published with them. Must not import a method.

Tensors decide sizes, biases and norms. Attention heads and positions are taken from the drafter's own configuration: its layers may
have other positions than the target's. Layers that compute differently from a Llama's are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from headstart.drafters.parts.llama_layer import STEADY
from headstart.formats.weights import TensorShape

DYNAMIC = "dynamic"  # positions that are plain up to `max_position_embeddings`; beyond it they are rescaled at every length
THETA = 10000.0  # base of rotary positions where the file gives none: the fallback of every published implementation
_LLAMA_LIKE = {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}  # their drafters have a Llama's layers


def block(config: Mapping[str, Any], layer: Mapping[str, TensorShape], hidden: int, count: int) -> dict[str, Any]:
    """Settings for `headstart.drafters.parts.decoder.decoder`.

    layer: shapes of the first layer's tensors, by their names inside it.
    hidden: width of the layers.
    count: number of layers.
    Raises ValueError, naming the key, for layers that cannot be built.
    """
    _require_llama_like(config)
    heads = _positive(config, "num_attention_heads")
    gate = layer.get("mlp.gate_proj.weight", ())
    return {
        **_family(layer),
        "hidden_size": hidden,
        "num_hidden_layers": count,
        "num_attention_heads": heads,
        "num_key_value_heads": _positive(config, "num_key_value_heads", heads),
        "head_dim": _head_dim(config, layer, hidden, heads),
        "intermediate_size": gate[0] if gate else _positive(config, "intermediate_size"),
        "hidden_act": str(config.get("hidden_act") or "silu"),
        "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-6),
        "max_position_embeddings": _positive(config, "max_position_embeddings", 2**20),
        "rope_parameters": rope(config),
    }


def doubts(config: Mapping[str, Any], layer: Mapping[str, TensorShape]) -> Iterator[str]:
    """What a configuration leaves open or gives wrongly, and how it is read, one sentence each. layer: as of `block`."""
    if _theta(config) is None:
        yield f"their config.json says no rope_theta: {THETA:g}, whatever the target's is"
    if (most := limit(config)) is not None:
        yield (
            f"their positions are of the type {DYNAMIC!r}, the same as plain ones in the first {most} tokens: beyond these nothing "
            "is drafted"
        )
    if config.get("model_type") in ("qwen3", "qwen3_moe") and _family(layer)["model_type"] != "qwen3":
        yield f"their config.json says model_type {config['model_type']}, but no queries or keys have norms; the tensors count"


def limit(config: Mapping[str, Any]) -> int | None:
    """Number of positions at which the layers can be used; None for all.

    Raises ValueError for dynamic positions without `max_position_embeddings`.
    """
    if _rope_type(section(config, "rope_parameters")) != DYNAMIC != _rope_type(section(config, "rope_scaling")):
        return None
    if config.get("max_position_embeddings") is None:
        raise ValueError(f"their config.json does not say max_position_embeddings, up to which {DYNAMIC!r} positions can be used")
    return _positive(config, "max_position_embeddings")


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside a configuration; empty where there is none. Raises ValueError where it is something else."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"their config.json says {key} = {value!r}, which should be an object")
    return value


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary positions as `rope_parameters`, also from `rope_theta` and `rope_scaling` of older files.

    Dynamic positions are returned as the plain ones that they are up to `limit`.
    Raises ValueError for types that cannot be used, and where both forms are given and differ.
    """
    older, newer = section(config, "rope_scaling"), section(config, "rope_parameters")
    _require_agreement(older, newer)
    values = {name: value for name, value in {**older, **newer}.items() if name not in ("type", "rope_type", "rope_theta")}
    kind = _rope_type(newer) or _rope_type(older) or "default"
    if kind not in (*STEADY, DYNAMIC) or "mrope_section" in values or any(isinstance(value, dict) for value in values.values()):
        known = ", ".join(sorted((*STEADY, DYNAMIC)))
        raise ValueError(f"their positions are of the type {kind!r} with {sorted(values)}; those of type {known} can be imported")
    if kind != "default" and not values.get("factor"):
        raise ValueError(f"their positions are of the type {kind!r}, but their config.json says no factor")
    if (part := values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))) not in (None, 1):
        raise ValueError(f"only {part} of each of their heads has positions, which cannot be imported")
    if kind in ("default", DYNAMIC):
        return {"rope_type": "default", "rope_theta": _theta(config) or THETA}
    return {**values, "rope_type": kind, "rope_theta": _theta(config) or THETA}


def _require_agreement(older: Mapping[str, Any], newer: Mapping[str, Any]) -> None:
    named = [(_rope_type(each), each.get("factor")) for each in (older, newer) if each]
    if older and len({*named}) > 1:
        raise ValueError(f"their config.json says rope_scaling = {older} and rope_parameters = {newer}; remove the wrong one")


def _rope_type(parameters: Mapping[str, Any]) -> str | None:
    return parameters.get("rope_type") or parameters.get("type")


def _theta(config: Mapping[str, Any]) -> float | None:
    """Base of the rotary positions; None where the configuration gives none."""
    older, newer = config.get("rope_theta"), section(config, "rope_parameters").get("rope_theta")
    if None not in (older, newer) and older != newer:
        raise ValueError(f"their config.json says rope_theta = {older} and, in rope_parameters, {newer}; remove the wrong one")
    theta = newer if older is None else older
    return None if theta is None else float(theta)


def _family(layer: Mapping[str, TensorShape]) -> dict[str, Any]:
    """The family of models whose layers have these norms and biases: its `model_type` and its settings of biases."""
    has_bias, has_output_bias = "self_attn.q_proj.bias" in layer, "self_attn.o_proj.bias" in layer
    if "self_attn.q_norm.weight" in layer or "self_attn.k_norm.weight" in layer:
        return {"model_type": "qwen3", "attention_bias": has_bias}
    if has_bias and not has_output_bias:
        return {"model_type": "qwen2"}
    return {"model_type": "llama", "attention_bias": has_output_bias, "mlp_bias": "mlp.gate_proj.bias" in layer}


def _require_llama_like(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type is not None and model_type not in _LLAMA_LIKE:
        raise ValueError(f"their config.json says model_type {model_type!r}, whose layers are not known to compute as a Llama's do")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError("their config.json says that they see a sliding window only, which these heads here do not")


def _head_dim(config: Mapping[str, Any], layer: Mapping[str, TensorShape], hidden: int, heads: int) -> int:
    size = _positive(config, "head_dim", hidden // heads or 1)
    rows = layer.get("self_attn.q_proj.weight", (heads * size,))[0]
    if rows != heads * size:
        reason = "" if config.get("head_dim") else f", {hidden} divided by {heads}, for it names no head_dim"
        raise ValueError(f"their queries are {rows} wide, but their config.json says {heads} heads of {size}{reason}")
    return size


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"their config.json does not say {key}, without which nothing can be made of their tensors")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"their config.json says {key} = {value!r}, which should be a whole number above 0")
    return value
