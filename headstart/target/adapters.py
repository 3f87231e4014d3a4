"""Adapters as peft writes them: a folder that says which model it changes, and how it becomes a part of that model.

Merged, an adapter costs nothing per token. It stays beside the weights where merging would say something else: weights that are
quantised would be rounded once more, and a head that is also the embedding would change both.
This file knows adapter_config.json. It refuses to know how models are loaded.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.text.jsonl import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def adapted_by(path: str | Path) -> str | None:
    """The model, a folder or a hub id, that the adapter in a folder changes; None where there is no adapter.

    Raises ValueError where the folder does not say, or holds a whole model, too.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        return None
    if both := [name for name in WHOLE if (folder / name).is_file()]:
        raise ValueError(f"model folder {path} holds a whole model ({both[0]}) and an adapter ({CONFIG}); move one of them away")
    said = read_object(folder / CONFIG)
    base = said.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{folder / CONFIG} does not say which model it adapts; write that model into base_model_name_or_path")
    if is_own_base(folder):
        raise ValueError(f"{folder / CONFIG} adapts itself (by way of {base}); write the whole model into base_model_name_or_path")
    if said.get("megatron_config"):  # peft would import whatever module `megatron_core` names
        raise ValueError(f"{folder / CONFIG} asks for layers of Megatron (megatron_config), which are not supported; remove it")
    return base


def is_own_base(folder: Path) -> bool:
    """Whether going from an adapter to what it adapts, and on from there, leads in a circle."""
    seen: set[Path] = set()
    while folder.resolve() not in seen and (folder / CONFIG).is_file():
        seen.add(folder.resolve())
        folder = Path(str(read_object(folder / CONFIG).get("base_model_name_or_path")))
    return folder.resolve() in seen


def adapt(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """The model with the adapter in `path`, as an ordinary model that goes by the adapter's name.

    Raises ValueError where peft is missing, where the adapter is damaged or not this model's, and where it is of a kind that adds
    tokens instead of changing weights.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(f"{path} holds an adapter, which needs peft; pip install 'headstart[train]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by an old name
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # see `_can_be_merged`
            warnings.filterwarnings("error", message="Found missing adapter keys")
            whole: Any = PeftModel.from_pretrained(model, path)
    except Exception as error:  # peft, safetensors and json errors share no base class
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"the adapter in {path} cannot be used with its model: {said or type(error).__name__}") from error
    if not hasattr(whole, "merge_and_unload"):
        kind = whole.peft_config["default"].peft_type.value
        raise ValueError(f"the adapter in {path} is of type {kind}, which puts tokens of its own before a text; use one like LoRA")
    try:
        plain: PreTrainedModel = whole.merge_and_unload() if _can_be_merged(whole.get_base_model()) else whole.get_base_model()
    except NotImplementedError as error:
        raise ValueError(f"the adapter in {path} cannot be made a part of its model: {error}") from error
    plain.config._name_or_path = str(path)
    plain.eval()
    return plain


def _can_be_merged(model: Any) -> bool:
    """Whether weights with an adapter merged into them say what both say side by side."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = model.get_input_embeddings(), model.get_output_embeddings()
    is_shared = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    has_adapted_ends = any(isinstance(end, BaseTunerLayer) for end in ends)
    return getattr(model.config, "quantization_config", None) is None and not (is_shared and has_adapted_ends)
