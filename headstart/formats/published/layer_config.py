"""Settings of a drafter's decoder layers, read from the `config.json` that comes with them.

What the tensors say counts: sizes, biases, norms. The rest, heads and positions, only a configuration can say, and only the
drafter's own: its layers may turn at other angles than the target's. Layers that compute otherwise than a Llama's are refused by
name. This file knows configurations of layers. It refuses to know drafters and files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from headstart.drafters.parts.llama_layer import STEADY
from headstart.formats.weights import TensorShape

DYNAMIC = "dynamic"  # positions that are plain up to `max_position_embeddings`, and behind that stretched anew at every length
THETA = 10000.0  # of rotary positions, where nothing is said: what every published implementation falls back to
_PLAIN = {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}  # their drafters have a Llama's layers


def block(config: Mapping[str, Any], layer: Mapping[str, TensorShape], hidden: int, count: int) -> dict[str, Any]:
    """Settings for `headstart.drafters.parts.decoder.decoder`.

    layer: shapes of the first layer's tensors, by their names inside it; hidden: width of the layers; count: how many. Raises
    ValueError, saying of what, where they are none that can be made.
    """
    _require_plain(config)
    heads = _positive(config, "num_attention_heads")
    gate = layer.get("mlp.gate_proj.weight", ())
    return {
        **_kind(layer),
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
    """What a configuration leaves open or says wrongly, and how it was read."""
    if _theta(config) is None:
        yield f"their config.json says no rope_theta: {THETA:g}, whatever the target's is"
    if (most := limit(config)) is not None:
        yield (
            f"their positions are of the type {DYNAMIC!r}, the same as plain ones in the first {most} tokens: behind these nothing "
            "is drafted"
        )
    if config.get("model_type") in ("qwen3", "qwen3_moe") and _kind(layer)["model_type"] != "qwen3":
        yield f"their config.json says model_type {config['model_type']}, but no queries or keys have norms; the tensors count"


def limit(config: Mapping[str, Any]) -> int | None:
    """How many positions their layers can be used for, where that are not all. Raises ValueError where nothing says it."""
    if _kind_of_positions(section(config, "rope_parameters")) != DYNAMIC != _kind_of_positions(section(config, "rope_scaling")):
        return None
    if config.get("max_position_embeddings") is None:
        raise ValueError(f"their config.json does not say max_position_embeddings, up to which {DYNAMIC!r} positions can be used")
    return _positive(config, "max_position_embeddings")


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a configuration, empty where there is none. Raises ValueError where it is something else."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"their config.json says {key} = {found!r}, which should be an object")
    return found


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Positions, from `rope_parameters`, or from `rope_theta` and `rope_scaling` of older files; dynamic ones as they are up to
    `limit`. Raises ValueError for kinds that cannot be used, and where both are there and differ."""
    older, newer = section(config, "rope_scaling"), section(config, "rope_parameters")
    _require_agreement(older, newer)
    found = {name: value for name, value in {**older, **newer}.items() if name not in ("type", "rope_type", "rope_theta")}
    kind = _kind_of_positions(newer) or _kind_of_positions(older) or "default"
    if kind not in (*STEADY, DYNAMIC) or "mrope_section" in found or any(isinstance(value, dict) for value in found.values()):
        known = ", ".join(sorted((*STEADY, DYNAMIC)))
        raise ValueError(f"their positions are of the type {kind!r} with {sorted(found)}; those of type {known} can be imported")
    if kind != "default" and not found.get("factor"):
        raise ValueError(f"their positions are of the type {kind!r}, but their config.json says no factor")
    if (part := found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))) not in (None, 1):
        raise ValueError(f"only {part} of each of their heads has positions, which cannot be imported")
    if kind in ("default", DYNAMIC):
        return {"rope_type": "default", "rope_theta": _theta(config) or THETA}
    return {**found, "rope_type": kind, "rope_theta": _theta(config) or THETA}


def _require_agreement(older: Mapping[str, Any], newer: Mapping[str, Any]) -> None:
    named = [(_kind_of_positions(each), each.get("factor")) for each in (older, newer) if each]
    if older and len({*named}) > 1:
        raise ValueError(f"their config.json says rope_scaling = {older} and rope_parameters = {newer}; remove the wrong one")


def _kind_of_positions(said: Mapping[str, Any]) -> str | None:
    return said.get("rope_type") or said.get("type")


def _theta(config: Mapping[str, Any]) -> float | None:
    older, newer = config.get("rope_theta"), section(config, "rope_parameters").get("rope_theta")
    if None not in (older, newer) and older != newer:
        raise ValueError(f"their config.json says rope_theta = {older} and, in rope_parameters, {newer}; remove the wrong one")
    said = newer if older is None else older
    return None if said is None else float(said)


def _kind(layer: Mapping[str, TensorShape]) -> dict[str, Any]:
    """The family whose layers have these norms and biases."""
    has_bias, has_output_bias = "self_attn.q_proj.bias" in layer, "self_attn.o_proj.bias" in layer
    if "self_attn.q_norm.weight" in layer or "self_attn.k_norm.weight" in layer:
        return {"model_type": "qwen3", "attention_bias": has_bias}
    if has_bias and not has_output_bias:
        return {"model_type": "qwen2"}
    return {"model_type": "llama", "attention_bias": has_output_bias, "mlp_bias": "mlp.gate_proj.bias" in layer}


def _require_plain(config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if kind is not None and kind not in _PLAIN:
        raise ValueError(f"their config.json says model_type {kind!r}, whose layers are not known to compute as a Llama's do")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError("their config.json says that they see a sliding window only, which these heads here do not")


def _head_dim(config: Mapping[str, Any], layer: Mapping[str, TensorShape], hidden: int, heads: int) -> int:
    said = config.get("head_dim")
    size = _positive(config, "head_dim", hidden // heads or 1)
    rows = layer.get("self_attn.q_proj.weight", (heads * size,))[0]
    if rows != heads * size:
        whence = "" if said else f", {hidden} divided by {heads}, for it names no head_dim"
        raise ValueError(f"their queries are {rows} wide, but their config.json says {heads} heads of {size}{whence}")
    return size


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"their config.json does not say {key}, without which nothing can be made of their tensors")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"their config.json says {key} = {value!r}, which should be a whole number above 0")
    return value
