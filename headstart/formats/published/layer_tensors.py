"""A decoder layer as checkpoints store it, and as transformers' modules have it: experts one by one, or all in one tensor.

transformers knows for each of its families how one becomes the other; here it is asked. This file knows one layer. It refuses to
know drafters, files, and what the tensors around the layer are called.
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

    block: made by `headstart.drafters.parts.decoder.decoder`, on any device; "meta" will do.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own = block.state_dict()
    return _of_layer(revert_weight_conversion(block, own)), _of_layer(own)


def _of_layer(state: Mapping[str, Tensor]) -> ShapesByName:
    return {name.removeprefix(LAYER): tuple(tensor.shape) for name, tensor in state.items() if name.startswith(LAYER)}


def filled(block: Any, layer: Mapping[str, Tensor], norm: Tensor) -> Any:
    """A decoder like `block`, on the CPU, with these tensors: of its layer, in either layout and all there, and of its norm."""
    config = copy.deepcopy(block.config)
    state = {LAYER + name: tensor for name, tensor in layer.items()}
    state |= {"norm.weight": norm, "embed_tokens.weight": torch.zeros(1, config.hidden_size, dtype=norm.dtype)}
    made, info = type(block).from_pretrained(None, config=config, state_dict=state, dtype=norm.dtype, output_loading_info=True)
    wrong = sorted(name for names in info.values() for name in names)
    assert not wrong, f"a layer that was whole cannot be loaded: {wrong[0]}"
    made.set_input_embeddings(None)
    return made.eval()
