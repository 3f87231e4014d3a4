"""Published Medusa heads, as their authors, TGI and vLLM write them, in a separate file or inside a complete model.

Heads and layers are counted by the tensors' names: one published configuration says 2 where there are 5. With several layers, the
authors' code stores one block under several names; equal or not, every name becomes a separate block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from headstart.formats.published.base import Published, base_of, check_counts, disagreements, num_rows
from headstart.formats.weights import Weights


@dataclass(frozen=True)
class Form:
    """The tensor names of one format.

    words: the format, for a person.
    prefix: of all names of heads; it distinguishes them from other tensors.
    block: name of a block's weight or bias behind the prefix, with `{head}`, `{layer}` and `{part}`.
    projection: name of a head's projection behind the prefix, with `{head}` and `{layers}`.
    count_heads, count_layers: keys of its configuration with the numbers of heads and layers.
    has_bias: whether every block must have a bias.
    """

    words: str
    prefix: str
    block: str
    projection: str
    count_heads: str = "medusa_num_heads"
    count_layers: str = "medusa_num_layers"
    has_bias: bool = True

    def block_name(self, head: int | str, layer: int | str, part: str) -> str:
        """Name of a block's "weight" or "bias"."""
        return self.prefix + self.block.format(head=head, layer=layer, part=part)

    def blocks(self, weights: Weights) -> list[tuple[int, int]]:
        """(head, layer) of every block that the files have."""
        number = r"(\d{1,4})"
        name = re.escape(self.block_name("HEAD", "LAYER", "weight"))
        pattern = re.compile(name.replace("HEAD", number).replace("LAYER", number))
        blocks = (pattern.fullmatch(name) for name in weights.shapes)
        return [(int(block[1]), int(block[2])) for block in blocks if block]


_NUMBERED = ("{head}.{layer}.linear.{part}", "{head}.{layers}.weight")
_VLLM = ("lm_heads.{head}.weight", "num_heads", "num_hidden_layers", False)
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


def match(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """The Medusa heads that these weights are; None where they are none."""
    for form in FORMS:
        if blocks := form.blocks(weights):
            return _published(form, weights, config, blocks)
    return None


def _published(form: Form, weights: Weights, config: Mapping[str, Any], blocks: list[tuple[int, int]]) -> Published:
    num_heads, num_layers = 1 + max(head for head, _ in blocks), 1 + max(layer for _, layer in blocks)
    check_counts(weights, num_heads, num_layers)
    head_tensors = tuple(name for name in weights.shapes if name.startswith(form.prefix))
    projections = _projections(form, weights, num_heads, num_layers)
    has_bias = form.has_bias or any(name.endswith(".bias") for name in head_tensors) or bool(config.get("medusa_fc_bias"))
    return Published(
        weights=weights,
        method="medusa",
        layout=form.words + ("" if projections else ", version 2: they use the target's LM head"),
        settings={"num_heads": num_heads, "num_layers": num_layers, "projection": "own" if projections else "shared"},
        hidden=num_rows(weights, [form.block_name(*blocks[0], "weight")]),
        vocab=num_rows(weights, projections) if projections else None,
        names=dict(_names(form, num_heads, num_layers, projections, has_bias)),
        head_tensors=head_tensors,
        has_trunk=bool(form.prefix) and len(head_tensors) < len(weights.shapes),
        base=base_of(config),
        notes=disagreements(config, {form.count_heads: num_heads, form.count_layers: num_layers}),
        refused=_refused(config, head_tensors),
    )


def _projections(form: Form, weights: Weights, num_heads: int, num_layers: int) -> list[str]:
    """Name of each head's projection; empty where no head has one."""
    single = f"{form.prefix}lm_head.weight"  # vLLM's `original_lm_head`: one projection for all heads
    if single in weights.shapes and not form.has_bias:
        return [single] * num_heads
    names = [form.prefix + form.projection.format(head=head, layers=num_layers) for head in range(num_heads)]
    return names if any(name in weights.shapes for name in names) else []


def _names(form: Form, num_heads: int, num_layers: int, projections: list[str], has_bias: bool) -> Iterator[tuple[str, str | None]]:
    """Pairs of our tensor name and theirs; None for a bias that the format leaves out."""
    for head, layer in product(range(num_heads), range(num_layers)):
        ours = f"heads.{head}.blocks.{layer}.linear."
        yield f"{ours}weight", form.block_name(head, layer, "weight")
        yield f"{ours}bias", form.block_name(head, layer, "bias") if has_bias else None
    yield from ((f"heads.{head}.projection.weight", name) for head, name in enumerate(projections))


def _refused(config: Mapping[str, Any], head_tensors: tuple[str, ...]) -> str | None:
    """Why these heads cannot be imported, or None."""
    if any(name.endswith("token_map") for name in head_tensors):
        return "their token_map restricts them to a part of the vocabulary, which this method does not support"
    if config.get("logit_scale", 1) != 1:
        return f"their config.json scales logits by {config['logit_scale']}, which this method does not"
    return None
