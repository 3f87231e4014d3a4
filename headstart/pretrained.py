"""A causal language model from a folder or the hub, or one sentence that says what is wrong with it.

This file knows files and configurations. It refuses to know what is done with a model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def digest(model: PreTrainedModel) -> str:
    """A fingerprint that tells a fine-tune: the LM head and three layers' weights, sampled."""
    sha = hashlib.sha256(json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str).encode())
    state = model.state_dict()
    names = sorted(state)
    head = [name for name in names if "lm_head" in name or "embed" in name]
    for name in [*head, *names[:: max(1, len(names) // 3)]]:
        flat = state[name].detach().reshape(-1)
        sha.update(flat[:: max(1, len(flat) // 4096)].float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def load_model(path: str | Path, dtype: str | torch.dtype = "auto", device: str = "auto") -> PreTrainedModel:
    """A causal LM from a folder or the hub. Raises ValueError in one sentence for everything that can be wrong with it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place = _device(device)
    check_folder(path)
    try:
        config = AutoConfig.from_pretrained(path)
        if type(config) not in AutoModelForCausalLM._model_mapping or not _is_causal(config.architectures):
            kind = (config.architectures or [config.model_type])[0]
            raise ValueError(f"it holds a {kind}, which is not a causal language model")
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        model, info = loaded
    except Exception as error:  # safetensors, json and hub errors share no base class
        why = "its weights are damaged or cut short: " if "Safetensor" in type(error).__name__ else ""
        raise ValueError(f"model {path} cannot be loaded: {why}{_first_line(error)}") from error
    broken = {kind: sorted(names) for kind, names in info.items() if names and kind in ("missing_keys", "mismatched_keys")}
    if broken:
        kind, names = next(iter(broken.items()))
        raise ValueError(f"model {path} is not whole: {len(names)} {kind.replace('_', ' ')}, first {names[0]}")
    placed: PreTrainedModel = model.to(place)
    return placed


def check_folder(path: str | Path) -> None:
    """Raise ValueError if `path` looks like a folder and holds no model; a hub id passes."""
    folder = Path(path)
    looks_local = folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if looks_local and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist" if not folder.exists() else "is not a folder"
        raise ValueError(f"model folder {path} {what}; a model is a folder with config.json, weights and tokenizer, or a hub id")


def _is_causal(architectures: Sequence[str] | None) -> bool:
    """By name: the same weights may be stored for another task, as a masked language model or a classifier."""
    return not architectures or any(re.search("CausalLM|LMHead|ConditionalGeneration", name) for name in architectures)


def _device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; write auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and (not has_cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not there; torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
