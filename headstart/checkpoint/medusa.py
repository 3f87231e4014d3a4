"""Published Medusa heads: as their authors, TGI and vLLM write them, in a file of their own or inside a whole model.

The number of heads and layers is counted in the tensors' names: a published configuration says 2 where there are 5. With several
layers, the authors' code stores one block under several names; equal or not, every name becomes a block of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headstart.checkpoint.published import Published, check_counts, disagreements
from headstart.checkpoint.weights import Weights


@dataclass(frozen=True)
class Form:
    """Names of a format: of a block's weight and bias, and of a projection. `prefix` tells heads from other tensors."""

    words: str
    prefix: str
    block: str
    projection: str
    count_heads: str = "medusa_num_heads"
    count_layers: str = "medusa_num_layers"

    def blocks(self, weights: Weights) -> list[tuple[int, int]]:
        """(head, layer) of every block's weight."""
        name = self.prefix + self.block.format(head="HEAD", layer="LAYER", part="weight")
        pattern = re.compile(re.escape(name).replace("HEAD", r"(\d{1,4})").replace("LAYER", r"(\d{1,4})"))
        found = (pattern.fullmatch(name) for name in weights.shapes)
        return [(int(one[1]), int(one[2])) for one in found if one]


_NUMBERED = ("{head}.{layer}.linear.{part}", "{head}.{layers}.weight")
_VLLM = ("lm_heads.{head}.weight", "num_heads", "num_hidden_layers")
FORMS = (
    Form("Medusa heads", "", *_NUMBERED),
    Form("Medusa heads inside a whole model", "medusa_head.", *_NUMBERED),
    Form("Medusa heads", "medusa_heads.", *_NUMBERED),
    *(
        Form("Medusa heads as vLLM stores them", prefix, f"blocks.{{head}}.layers.{{layer}}.{linear}{{part}}", *_VLLM)
        for prefix in ("", "medusa_heads.")
        for linear in ("", "linear.")
    ),
)


def understand(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """What these Medusa heads are; None where there are none."""
    for form in FORMS:
        if blocks := form.blocks(weights):
            return _published(form, weights, config, blocks)
    return None


def _published(form: Form, weights: Weights, config: Mapping[str, Any], blocks: list[tuple[int, int]]) -> Published:
    num_heads, num_layers = 1 + max(head for head, _ in blocks), 1 + max(layer for _, layer in blocks)
    check_counts(weights, num_heads, num_layers)
    ours = tuple(name for name in weights.shapes if name.startswith(form.prefix))
    projections = [form.prefix + form.projection.format(head=head, layers=num_layers) for head in range(num_heads)]
    is_single = f"{form.prefix}lm_head.weight" in weights.shapes and "blocks." in form.block
    if is_single:  # vLLM's `original_lm_head`: one projection for all heads
        projections = [f"{form.prefix}lm_head.weight"] * num_heads
    has_own = any(name in weights.shapes for name in projections)
    has_bias = any(name.endswith(".bias") for name in ours) or "blocks." not in form.block or bool(config.get("medusa_fc_bias"))
    names: dict[str, str | None] = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            for part in ("weight", "bias"):
                theirs = form.prefix + form.block.format(head=head, layer=layer, part=part)
                names[f"heads.{head}.blocks.{layer}.linear.{part}"] = theirs if part == "weight" or has_bias else None
        if has_own:
            names[f"heads.{head}.projection.weight"] = projections[head]
    first = weights.shapes[form.prefix + form.block.format(head=blocks[0][0], layer=blocks[0][1], part="weight")]
    return Published(
        weights=weights,
        method="medusa",
        layout=form.words + ("" if has_own else ", version 2: they speak through the target's head"),
        settings={"num_heads": num_heads, "num_layers": num_layers, "projection": "own" if has_own else "shared"},
        hidden=first[0],
        vocab=next((weights.shapes[name][0] for name in projections if name in weights.shapes), None),
        names=names,
        ours=ours,
        has_trunk=bool(form.prefix) and len(ours) < len(weights.shapes),
        base=config.get("base_model_name_or_path"),
        notes=disagreements(config, {form.count_heads: num_heads, form.count_layers: num_layers}),
        refused=_refused(config, ours),
    )


def _refused(config: Mapping[str, Any], ours: tuple[str, ...]) -> str | None:
    if any(name.endswith("token_map") for name in ours):
        return "their token_map says that they know a part of the vocabulary only, which this method cannot"
    if config.get("logit_scale", 1) != 1:
        return f"their config.json scales logits by {config['logit_scale']}, which this method does not"
    return None
