"""A target without its layers, for training on a feature store: embedding, final norm and LM head are all that is loaded.

The module must not import drafters or the training loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from headstart.target import adapters
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import LAYER_NUMBER, check_folder, digest, keep_digest, load_model
from headstart.text.jsonl import read_object
from headstart.training.feature_store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


class StoredEmbedHead(EmbedHead):
    """Embedding and LM head of a target without layers; they were checked when its features were written.

    vocab: width of the logits.
    """

    def __init__(self, model: PreTrainedModel, vocab: int) -> None:
        self.vocab = vocab
        super().__init__(model)

    def _check(self, name: str) -> None:
        """Nothing: a model without layers has no forward."""


def load_without_layers(path: str, store: Store, device: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The embedding, the final norm and the LM head of a target, in a model whose lists of layers are empty.

    path: folder or hub id of the target.
    Raises ValueError where its weights are not those that the features are of.
    """
    manifest = store.manifest
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    model = _read(path, dtype, trust_remote_code)
    if model is None:  # packed, adapted or renamed weights: only the whole model can be loaded
        model = load_model(path, dtype, "cpu", trust_remote_code)
    if digest(model) != manifest.target.digest:
        raise ValueError(
            f"the features in {store.folder} are of {manifest.target.name} (digest {manifest.target.digest}), and the target "
            f"{path} has other weights (digest {digest(model)}); name the target that they are of, or write features of this one"
        )
    keep_digest(model)
    _remove_layers(model)
    on_device: PreTrainedModel = model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    return on_device


def _read(path: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel | None:
    """A model whose weights outside its layers are loaded, and those of the layers in its digest; the others are on no device.

    None where the files hold other names than the model, or weights that are not plain.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    check_folder(path)
    if adapters.adapted_by(path) is not None:
        return None
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    files = _files(path)
    if getattr(config, "quantization_config", None) is not None or files is None:
        return None
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    names = _wanted(model)
    if not names <= files.keys():
        return None
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in _tensors(names, files)}, strict=False, assign=True)
    model.tie_weights()
    loaded: PreTrainedModel = model
    return loaded


def _wanted(model: nn.Module) -> set[str]:
    """Names of the weights outside the layers, and of the matrices in the first, the middle and the last layer."""
    numbered = {name: LAYER_NUMBER.search(name) for name, _ in model.named_parameters()}
    is_sampled = {name: weight.ndim == 2 and name.endswith(".weight") for name, weight in model.named_parameters()}
    names = {name: number for name, number in numbered.items() if number is None or is_sampled[name]}
    numbers = sorted({int(number[1]) for number in names.values() if number})
    sampled = {numbers[0], numbers[len(numbers) // 2], numbers[-1]}
    return {name for name, number in names.items() if number is None or int(number[1]) in sampled}


def _files(path: str) -> Mapping[str, str] | None:
    """The file of each tensor, by name; None where the model is stored in another way. Tensors are read from a hub file by file."""
    from transformers.utils.hub import cached_file

    index = cached_file(path, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        return {name: f"{path}\n{file}" for name, file in read_object(Path(index))["weight_map"].items()}
    weights = cached_file(path, WEIGHTS, _raise_exceptions_for_missing_entries=False)
    if weights is None:
        return None
    with safe_open(weights, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), f"{path}\n{WEIGHTS}")


def _tensors(names: set[str], files: Mapping[str, str]) -> list[tuple[str, Tensor]]:
    """(name, tensor) of these tensors, memory-mapped where they need no conversion."""
    from transformers.utils.hub import cached_file

    tensors = []
    for place in sorted({files[name] for name in names}):
        with safe_open(cached_file(*place.split("\n")), framework="pt") as opened:
            tensors += [(name, opened.get_tensor(name)) for name in sorted(names) if files[name] == place]
    return tensors


def _remove_layers(model: nn.Module) -> None:
    """Empty the outermost lists of modules."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.ModuleList):
            setattr(model, name, nn.ModuleList())
        else:
            _remove_layers(child)
