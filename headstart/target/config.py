"""What a target reads from a model's configuration: the window of each layer, and the longest text."""

from __future__ import annotations

from typing import Any

from headstart.target.row_mask import Window


def window_of_layer(config: Any, layer: int, sliding_window: int | None) -> Window:
    """How far back a layer attends.

    config: the model's text configuration.
    sliding_window: what the layer passed to its attention, in tokens; None: nothing.
    """
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[layer] if layer_types else None
    if layer_type == "chunked_attention":
        return Window(chunk=int(config.attention_chunk_size))
    if layer_type == "sliding_attention" and sliding_window is None:
        sliding_window = int(config.sliding_window)
    return Window(sliding=sliding_window)


def context_length(config: Any, name: str) -> int:
    """The longest text that a target scores exactly, in tokens.

    config: the model's text configuration. name: the model's, for messages.
    Raises ValueError where the configuration has no `max_position_embeddings`, or one below 2.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        raise ValueError(f"{name} does not say how long a text it takes (max_position_embeddings is missing in its config)")
    for rope in _rope_parameters(config):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            # Frequencies follow the longest position of the whole forward: beyond this, one row would change the others.
            original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            longest = min(longest, original or longest)
    if getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale"):
        longest = min(longest, int(config.floor_scale) - 1)  # from here on Llama 4 counts nodes, not positions
    require_two_tokens(longest, name)
    return int(longest)


def require_two_tokens(longest: int | None, name: str) -> None:
    """Raise ValueError where a text has no room for a prompt and an answer.

    longest: in tokens; None where the configuration does not say. name: the model's, for the message.
    """
    if longest is not None and longest < 2:
        raise ValueError(f"{name} takes texts of {longest} tokens (max_position_embeddings in its config), and an answer needs 2")


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of the model, or those of each kind of layer where they differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [rope for rope in parameters.values() if isinstance(rope, dict)] or [parameters]
