"""How a model of transformers is asked for the outputs of some of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version


def _takes_a_list(release: str) -> bool:
    """Whether this version of transformers keeps only the states whose indices it is given; before 5.23 it keeps all or none."""
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2])
    return (major, minor) >= (5, 23)


TAKES_A_LIST = _takes_a_list(version("transformers"))


def asking_for(layers: Sequence[int]) -> list[int] | bool:
    """What to give a model's forward as `output_hidden_states`, for the outputs of these layers (0 is the first layer's).

    The output of layer `i` is then `hidden_states[i + 1]`, for transformers counts the embedding as state 0.
    """
    return [layer + 1 for layer in layers] if TAKES_A_LIST else True
