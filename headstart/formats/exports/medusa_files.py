"""What the exports of Medusa heads have in common: the names of their blocks, and the target's LM head where they share it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from torch import Tensor

from headstart.formats.exports.base import Subject


def blocks(subject: Subject) -> Iterator[tuple[int, int, str, str]]:
    """(head, layer, "weight" or "bias", our name) of the tensors of all blocks."""
    config = subject.config
    for head, layer, part in product(range(config.num_heads), range(config.num_layers), ("weight", "bias")):
        yield head, layer, part, f"heads.{head}.blocks.{layer}.linear.{part}"


def is_shared(subject: Subject) -> bool:
    """Whether the heads use the target's LM head."""
    return bool(subject.config.projection == "shared")


def target_head(subject: Subject) -> Tensor:
    """[vocab, hidden] the target's LM head, in the dtype of the heads."""
    return subject.embed_head.lm_head_weight.to("cpu", subject.stored_dtype).contiguous()


def check_copy(subject: Subject, engine: str) -> None:
    """Raise ValueError where the target's LM head has a bias, which a copy of its weights lacks.

    Its scale and its soft cap do not matter: engines draft the most probable token, which these do not change.
    """
    if is_shared(subject) and getattr(subject.embed_head.lm_head, "bias", None) is not None:
        raise ValueError(
            f"these heads share the target's LM head, whose bias {engine} does not add for them; train heads with LM heads of "
            "their own (`headstart train medusa --set projection=own`)"
        )
