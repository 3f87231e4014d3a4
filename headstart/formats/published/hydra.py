"""Published Hydra heads: `mlp` and `prefix-mlp` (Hydra++), as the authors write them, with or without dropout between the blocks.

The file also keeps copies of embeddings that nothing reads; they are checked for their shape and left out. With several layers,
one block is stored under several names: each becomes a block of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headstart.formats.published.base import PREFIX, Published, base_of, check_counts, disagreements, num_rows
from headstart.formats.weights import TensorShape, Weights

_BLOCK = re.compile(r"hydra_mlp\.(\d{1,4})\.(\d{1,4})\.linear\.weight")
_PREFIXES = ("prefix_embeding_layer.", "prefix_embedding_layer.")  # the first is how it is published
_LAYER = (
    *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "layers.0.input_layernorm.weight",
    "layers.0.post_attention_layernorm.weight",
    "norm.weight",
)
_ROTARY = "layers.0.self_attn.rotary_emb.inv_freq"


def match(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """What these Hydra heads are; None where there are none."""
    blocks = [(int(found[1]), int(found[2])) for name in weights.shapes if (found := _BLOCK.fullmatch(name))]
    if not blocks and "hydra_head_arch" not in config and not any(name.startswith("hydra_") for name in weights.shapes):
        return None
    if refused := _refused(config, blocks):
        return _unreadable(weights, config, refused)
    num_heads, first, last = 1 + max(head for head, _ in blocks), min(at for _, at in blocks), max(at for _, at in blocks)
    step = 1 + first  # with dropout, blocks stand at 1, 3, 5, ...; without, at 0, 1, 2, ...
    num_layers = 1 + (last - first) // step
    check_counts(weights, num_heads, num_layers)
    projections = [f"hydra_lm_head.{head}.1." if first else f"hydra_lm_head.{head}." for head in range(num_heads)]
    has_bias = any(f"{projection}bias" in weights.shapes for projection in projections)
    names = dict(_names([first + step * layer for layer in range(num_layers)], projections, has_bias))
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in weights.shapes)), None)
    names |= {PREFIX + name: prefix + name for name in _LAYER} if prefix else {}
    hidden = num_rows(weights, [f"hydra_mlp.{head}.{at}.linear.weight" for head, at in blocks])
    vocab = num_rows(weights, said) if (said := _found(weights, projections)) else None
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


def _found(weights: Weights, projections: Sequence[str]) -> list[str]:
    return [f"{name}weight" for name in projections if f"{name}weight" in weights.shapes]


def _names(places: Sequence[int], projections: Sequence[str], has_bias: bool) -> Iterator[tuple[str, str]]:
    """places: of a head's blocks among its layers; projections: one per head."""
    for head, projection in enumerate(projections):
        mine, theirs = f"heads.{head}.", f"hydra_mlp.{head}."
        for part in ("weight", "bias"):
            yield f"{mine}fuse.linear.{part}", f"{theirs}{places[0]}.linear.{part}"
            yield f"{mine}fuse.residual.{part}", f"{theirs}{places[0]}.res_connection.{part}"
            for block, place in enumerate(places[1:]):
                yield f"{mine}blocks.{block}.linear.{part}", f"{theirs}{place}.linear.{part}"
            if part == "weight" or has_bias:
                yield f"{mine}projection.{part}", projection + part


def _unused(weights: Weights, prefix: str, hidden: int, vocab: int | None) -> dict[str, TensorShape]:
    """Copies of the target's embeddings, and of positions that a configuration gives."""
    copies: dict[str, TensorShape] = {}
    for name in ("input_embed_fn.weight", f"{prefix}embed_tokens.weight"):
        if name in weights.shapes:
            copies[name] = (vocab or weights.shapes[name][0], hidden)
    if (rotary := prefix + _ROTARY) in weights.shapes:
        copies[rotary] = weights.shapes[rotary]
    return copies


def _refused(config: Mapping[str, Any], blocks: list[tuple[int, int]]) -> str | None:
    arch = config.get("hydra_head_arch")
    if arch not in (None, "mlp", "prefix-mlp"):
        return f"their head architecture is {arch!r}; mlp and prefix-mlp can be imported"
    if config.get("grounded_heads") is False:
        return "their config.json says grounded_heads = false: they do not read what was drafted before, as Hydra here does"
    if config.get("hidden_state_offset"):
        return f"they read the state {config['hidden_state_offset']} layers below the last, which this method does not"
    return None if blocks else "no hydra_mlp.0.0.linear.weight or hydra_mlp.0.1.linear.weight is among their tensors"


def _unreadable(weights: Weights, config: Mapping[str, Any], why: str) -> Published:
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
        refused=why,
    )
