"""One decoder layer in two layouts: as checkpoints store it, and as transformers' modules have it (experts fused in one tensor).

transformers converts between the two for each family. Must not know drafters, files, or the names of tensors around the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headstart.formats.weights import TensorShape

LAYER = "layers.0."
ShapesByName = dict[str, TensorShape]


def layouts(block: Any) -> tuple[ShapesByName, ShapesByName]:
    """Names and shapes of the tensors of a decoder's only layer: as published, and as its module has them.

    block: made by `headstart.drafters.parts.decoder.decoder`, on any device, "meta" included.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = block.state_dict()
    return _of_layer(revert_weight_conversion(block, state)), _of_layer(state)


def _of_layer(state: Mapping[str, Tensor]) -> ShapesByName:
    return {name.removeprefix(LAYER): tuple(tensor.shape) for name, tensor in state.items() if name.startswith(LAYER)}


def filled(block: Any, layer: Mapping[str, Tensor], norm: Tensor) -> Any:
    """A decoder like `block`, on the CPU, in evaluation mode, with these tensors.

    layer: all tensors of its layer, by their names inside it, in either layout.
    norm: of its final norm, [hidden].
    """
    config = copy.deepcopy(block.config)
    state = {LAYER + name: tensor for name, tensor in layer.items()}
    state |= {"norm.weight": norm, "embed_tokens.weight": torch.zeros(1, config.hidden_size, dtype=norm.dtype)}
    decoder, info = type(block).from_pretrained(None, config=config, state_dict=state, dtype=norm.dtype, output_loading_info=True)
    wrong = sorted(name for names in info.values() for name in names)
    assert not wrong, f"a layer with all its tensors cannot be loaded: {wrong[0]}"
    decoder.set_input_embeddings(None)
    return decoder.eval()
