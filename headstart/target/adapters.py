"""Adapters of peft: reading adapter_config.json, and making an adapter a part of its base model.

A merged adapter costs nothing per token. An adapter stays unmerged where merging would change the output: quantised weights
would be rounded once more, and with a tied LM head the embedding would change too. This module must not load models.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.text.jsonl import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def adapted_by(path: str | Path) -> str | None:
    """The base model, a folder or a hub id, of the adapter in a folder; None where there is no adapter.

    Raises ValueError where the folder does not name one, or also holds the weights of a model.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        return None
    if weights := [name for name in WEIGHT_FILES if (folder / name).is_file()]:
        raise ValueError(f"model folder {path} holds a whole model ({weights[0]}) and an adapter ({CONFIG}); move one of them away")
    config = read_object(folder / CONFIG)
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{folder / CONFIG} does not say which model it adapts; write that model into base_model_name_or_path")
    if is_own_base(folder):
        raise ValueError(f"{folder / CONFIG} adapts itself (through {base}); write the full model into base_model_name_or_path")
    if config.get("megatron_config"):  # peft would import whatever module `megatron_core` names
        raise ValueError(f"{folder / CONFIG} asks for layers of Megatron (megatron_config), which are not supported; remove it")
    return base


def is_own_base(folder: Path) -> bool:
    """Whether following the base models of an adapter leads in a circle. folder: of the adapter."""
    visited: set[Path] = set()
    while folder.resolve() not in visited and (folder / CONFIG).is_file():
        visited.add(folder.resolve())
        folder = Path(str(read_object(folder / CONFIG).get("base_model_name_or_path")))
    return folder.resolve() in visited


def adapt(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """The model with the adapter in the folder `path`, as an ordinary model whose name is the adapter's path.

    Raises ValueError where peft is missing, where the adapter is damaged or belongs to another model, and where it adds tokens to
    the text instead of changing weights.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(f"{path} holds an adapter, which needs peft; pip install 'headstart[train]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute of transformers by an old name
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # see `_can_be_merged`
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted: Any = PeftModel.from_pretrained(model, path)
    except Exception as error:  # peft, safetensors and json errors share no base class
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the adapter in {path} cannot be used with its model: {reason or type(error).__name__}") from error
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.peft_config["default"].peft_type.value
        raise ValueError(f"the adapter in {path} is of type {kind}, which puts tokens of its own before a text; use one like LoRA")
    base_model = adapted.get_base_model()
    try:
        merged: PreTrainedModel = adapted.merge_and_unload() if _can_be_merged(base_model) else base_model
    except NotImplementedError as error:
        raise ValueError(f"the adapter in {path} cannot be merged into its model: {error}") from error
    merged.config._name_or_path = str(path)
    merged.eval()
    return merged


def _can_be_merged(model: Any) -> bool:
    """Whether merging an adapter into this model's weights leaves its output as it is with the adapter beside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    embedding_and_head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    is_adapted = any(isinstance(module, BaseTunerLayer) for module in embedding_and_head)
    return getattr(model.config, "quantization_config", None) is None and not (is_tied and is_adapted)
