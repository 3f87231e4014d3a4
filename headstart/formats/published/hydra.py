"""Published Hydra heads: `mlp` and `prefix-mlp` (Hydra++), as the authors write them, with or without dropout between the blocks.

Files also hold copies of embeddings that nothing reads; their shapes are checked and they are left out. With several layers, one
block is stored under several names: each becomes a separate block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headstart.formats.published.base import PREFIX, Published, base_of, check_counts, disagreements, num_rows
from headstart.formats.weights import TensorShape, Weights

_BLOCK = re.compile(r"hydra_mlp\.(\d{1,4})\.(\d{1,4})\.linear\.weight")
_PREFIXES = ("prefix_embeding_layer.", "prefix_embedding_layer.")  # published files have the first spelling
_LAYER = (
    *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "layers.0.input_layernorm.weight",
    "layers.0.post_attention_layernorm.weight",
    "norm.weight",
)
_ROTARY = "layers.0.self_attn.rotary_emb.inv_freq"


def match(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """The Hydra heads that these weights are; None where they are none."""
    blocks = [(int(block[1]), int(block[2])) for name in weights.shapes if (block := _BLOCK.fullmatch(name))]
    if not blocks and "hydra_head_arch" not in config and not any(name.startswith("hydra_") for name in weights.shapes):
        return None
    if refused := _refused(config, blocks):
        return _unreadable(weights, config, refused)
    num_heads = 1 + max(head for head, _ in blocks)
    first, last = min(index for _, index in blocks), max(index for _, index in blocks)
    step = 1 + first  # with dropout, blocks have the indices 1, 3, 5, ...; without, 0, 1, 2, ...
    num_layers = 1 + (last - first) // step
    check_counts(weights, num_heads, num_layers)
    projections = [f"hydra_lm_head.{head}.1." if first else f"hydra_lm_head.{head}." for head in range(num_heads)]
    has_bias = any(f"{projection}bias" in weights.shapes for projection in projections)
    names = dict(_names([first + step * layer for layer in range(num_layers)], projections, has_bias))
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in weights.shapes)), None)
    names |= {PREFIX + name: prefix + name for name in _LAYER} if prefix else {}
    hidden = num_rows(weights, [f"hydra_mlp.{head}.{index}.linear.weight" for head, index in blocks])
    stored = [f"{name}weight" for name in projections if f"{name}weight" in weights.shapes]
    vocab = num_rows(weights, stored) if stored else None
    return Published(
        weights=weights,
        method="hydra++" if prefix else "hydra",
        layout="Hydra++ heads (prefix-mlp)" if prefix else "Hydra heads (mlp)",
        settings={"num_heads": num_heads, "num_layers": num_layers, "projection_bias": has_bias},
        hidden=hidden,
        vocab=vocab,
        names=names,
        head_tensors=tuple(weights.shapes),
        unused=_unused(weights, prefix or "", hidden, vocab),
        has_prefix=prefix is not None,
        base=base_of(config),
        notes=disagreements(config, {"hydra_num_heads": num_heads, "hydra_num_layers": num_layers}),
    )


def _names(indices: Sequence[int], projections: Sequence[str], has_bias: bool) -> Iterator[tuple[str, str]]:
    """Pairs of our tensor name and theirs.

    indices: of a head's blocks in its `nn.Sequential`.
    projections: prefix of the names of each head's projection.
    """
    for head, projection in enumerate(projections):
        ours, theirs = f"heads.{head}.", f"hydra_mlp.{head}."
        for part in ("weight", "bias"):
            yield f"{ours}fuse.linear.{part}", f"{theirs}{indices[0]}.linear.{part}"
            yield f"{ours}fuse.residual.{part}", f"{theirs}{indices[0]}.res_connection.{part}"
            for block, index in enumerate(indices[1:]):
                yield f"{ours}blocks.{block}.linear.{part}", f"{theirs}{index}.linear.{part}"
            if part == "weight" or has_bias:
                yield f"{ours}projection.{part}", projection + part


def _unused(weights: Weights, prefix: str, hidden: int, vocab: int | None) -> dict[str, TensorShape]:
    """Expected shapes of copies of the target's embedding and of rotary frequencies."""
    copies: dict[str, TensorShape] = {}
    for name in ("input_embed_fn.weight", f"{prefix}embed_tokens.weight"):
        if name in weights.shapes:
            copies[name] = (vocab or weights.shapes[name][0], hidden)
    if (rotary := prefix + _ROTARY) in weights.shapes:
        copies[rotary] = weights.shapes[rotary]
    return copies


def _refused(config: Mapping[str, Any], blocks: list[tuple[int, int]]) -> str | None:
    """Why these heads cannot be imported, or None."""
    arch = config.get("hydra_head_arch")
    if arch not in (None, "mlp", "prefix-mlp"):
        return f"their head architecture is {arch!r}; mlp and prefix-mlp can be imported"
    if config.get("grounded_heads") is False:
        return "their config.json says grounded_heads = false: they do not read the tokens drafted before, as Hydra here does"
    if config.get("hidden_state_offset"):
        return f"they read the state {config['hidden_state_offset']} layers below the last, which this method does not"
    return None if blocks else "no hydra_mlp.0.0.linear.weight or hydra_mlp.0.1.linear.weight is among their tensors"


def _unreadable(weights: Weights, config: Mapping[str, Any], reason: str) -> Published:
    """Hydra heads that cannot be imported, and the reason."""
    return Published(
        weights=weights,
        method="hydra",
        layout=f"Hydra heads ({config.get('hydra_head_arch', 'of no known kind')})",
        settings={},
        hidden=0,
        vocab=None,
        names={},
        head_tensors=(),
        base=base_of(config),
        refused=reason,
    )
