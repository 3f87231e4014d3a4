"""The one forward of a transformers model that returns hidden states: the outputs of the layers that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from headstart.target.attention import AttentionMetadata


def _takes_a_list(release: str) -> bool:
    """Whether this version of transformers returns only the hidden states whose indices it gets; before 5.23: all or none."""
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2])
    return (major, minor) >= (5, 23)


TAKES_A_LIST = _takes_a_list(version("transformers"))


def forward_with_hidden_states(model: Any, layers: Sequence[int], **inputs: Any) -> tuple[Any, dict[int, Tensor]]:
    """The output of a model's forward, and the hidden states [rows, length, hidden] after each of these layers.

    model: a causal LM of transformers, or a wrapper of one that passes keyword arguments on.
    layers: indices of decoder layers, 0 is the first. The last layer's hidden states come with the final norm applied, as
        transformers returns them. None are returned where this is empty.
    inputs: keyword arguments of the forward.
    """
    if not layers:
        return model(**inputs), {}
    # transformers counts the embedding as hidden state 0, so layer i is state i + 1.
    output = model(**inputs, output_hidden_states=[layer + 1 for layer in layers] if TAKES_A_LIST else True)
    return output, {layer: output.hidden_states[layer + 1] for layer in layers}


def logits_and_features(
    model: Any, layers: Sequence[int], tokens: Tensor, positions: Tensor, asked: Tensor, metadata: AttentionMetadata
) -> tuple[Tensor, ...]:
    """[asked, vocab] logits of the asked nodes and, if there are any `layers`, their hidden states of all nodes side by side.

    tokens, positions: [nodes] int64. asked: [asked] int64, indices of nodes. metadata: for the attention of every layer.
    """
    out, states = forward_with_hidden_states(
        model,
        layers,
        input_ids=tokens[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=asked,
        headstart=metadata,
    )
    return (out.logits[0], torch.cat([states[layer][0] for layer in layers], -1)) if layers else (out.logits[0],)


def hidden_states(model: Any, tokens: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """The hidden states [rows, length, hidden] after each of these layers, for texts read from their start without a KV cache.

    tokens: [rows, length] int64. model, layers: as for `forward_with_hidden_states`.
    """
    return forward_with_hidden_states(model, layers, input_ids=tokens, use_cache=False, logits_to_keep=1)[1]
