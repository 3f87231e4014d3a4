"""Loading a causal LM from a folder or the hub; every fault of a folder is a ValueError of one sentence.

This module must not import targets, caches or kernels.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from headstart.target import adapters
from headstart.text.jsonl import read_object, why

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 4096  # numbers of each weight that go into a digest
DEVICE = re.compile(r"cpu(:0)?|cuda(:\d{1,3})?")
LAYER_NUMBER = re.compile(r"\.(\d+)\.")
GENERATION_CONFIG = "generation_config.json"
MAX_LAYERS = 100_000
MAX_PATH = 1024  # characters

_KEPT_DIGESTS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def digest(model: PreTrainedModel) -> str:
    """Hash of 16 hex digits that distinguishes a fine-tune from its base model.

    Covers samples of the weights outside the layers and of the first, the middle and the last layer. Samples are rounded to
    bfloat16, and a packed linear gives its plain weight: the digest depends neither on the dtype in which a model was loaded nor on
    the kernels that a target has chosen. After `keep_digest` it stays as it was.
    """
    if model in _KEPT_DIGESTS:
        return _KEPT_DIGESTS[model]
    sha = hashlib.sha256()
    for name, module in _sampled_modules(model):
        weight: Any = module.weight.T if type(module).__name__ == "Conv1D" else module.weight  # GPT-2's is transposed
        weight = weight if type(weight.data) is torch.Tensor else weight.dequantize()  # torchao's, which cannot be sliced
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLES)].to(torch.bfloat16).float()
        sha.update(f"{name} {tuple(weight.shape)}".encode() + sample.cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def keep_digest(model: PreTrainedModel) -> None:
    """Let the digest be that of the weights now, whatever they are rounded to later: heads for the model still fit it."""
    _KEPT_DIGESTS[model] = digest(model)


def _sampled_modules(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """(name, module) of the modules with a matrix, outside the layers and in three of them.

    A packed linear has its matrix as a property.
    """
    matrices = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(type(module), "weight") or getattr(module._parameters.get("weight"), "ndim", 0) == 2
    ]
    layers = sorted({int(number[1]) for name, _ in matrices if (number := LAYER_NUMBER.search(name))})
    chosen = {layers[0], layers[len(layers) // 2], layers[-1]} if layers else set()
    return [(name, module) for name, module in matrices if not (number := LAYER_NUMBER.search(name)) or int(number[1]) in chosen]


@contextmanager
def no_weight_bars() -> Iterator[None]:
    """A context without the "Loading weights" progress bars of transformers; other bars and the user's settings stay."""
    from transformers.utils import logging

    def without_weights(factory: Any, args: Any, options: dict[str, Any]) -> Any:
        if options.get("desc") == "Loading weights":
            options = {**options, "disable": True}
        return factory(*args, **options) if before is None else before(factory, args, options)

    before = logging.set_tqdm_hook(without_weights)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


@no_weight_bars()
def load_model(
    path: str | Path, dtype: str | torch.dtype = "auto", device: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal LM from a folder or the hub; for a folder with an adapter, its base model with the adapter applied.

    path: a folder or a hub id.
    dtype: of the weights; "auto": as stored.
    device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:NUMBER".
    trust_remote_code: whether Python files in that folder may run; the user is never asked.
    Raises ValueError, in one sentence, for a folder, weights or a device that cannot be used.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch_device = _device(device)
    check_folder(path)
    if (base := adapters.adapted_by(path)) is not None:
        return _adapted(path, base, dtype, device, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _check_config(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            trust_remote_code=trust_remote_code,
        )
        model, info = loaded
    except Exception as error:  # safetensors, json and hub errors share no base class
        what = "its weights are damaged or cut short: " if "Safetensor" in type(error).__name__ else ""
        raise ValueError(f"model {path} cannot be loaded: {what}{why(error)}") from error
    _check_weights(path, model, info)
    on_device: PreTrainedModel = model.to(torch_device)
    return on_device


def _check_weights(path: str | Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise ValueError where weights and configuration do not fit each other. info: what transformers says of the loading."""
    if mismatched := sorted(info.get("mismatched_keys", ()), key=str):
        name, actual, expected = mismatched[0]
        shapes = f"first {name}: {list(actual)}, not {list(expected)}"
        raise ValueError(
            f"model {path} is incomplete: {len(mismatched)} tensors have other shapes than in its config.json, {shapes}"
        )
    if missing := sorted(info.get("missing_keys", ())):
        raise ValueError(f"model {path} is incomplete: {len(missing)} missing keys, first {missing[0]}")
    if (number := _unused_layer(model, info.get("unexpected_keys", ()))) is not None:
        raise ValueError(
            f"model {path} is inconsistent: its weights have a layer {number}, counted from 0, and its config.json says that it "
            f"has {model.config.get_text_config().num_hidden_layers} layers; correct num_hidden_layers"
        )


def random_model(path: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal LM in float32 with random weights, drawn from torch's generator.

    path: its config.json, or a folder with one.
    trust_remote_code: whether Python files in that folder may run.
    Raises ValueError, in one sentence, for what is no configuration of a causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model folder {path} has no config.json")
    try:
        _check_numbers(file, read_object(file))
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _check_config(config)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong number may raise anything in transformers
        raise ValueError(f"model {path} is no configuration of a causal language model: {why(error)}") from error
    return model


def _check_config(config: Any) -> None:
    """Raise ValueError for a configuration that is not of a causal LM, or that would make transformers download a kernel."""
    from transformers import AutoModelForCausalLM

    is_known = type(config) in AutoModelForCausalLM._model_mapping
    has_own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not (is_known or has_own) or not _is_causal(config.architectures):
        kind = (config.architectures or [config.model_type])[0]
        raise ValueError(f"it holds a {kind}, which is not a causal language model")
    if "/" in str(config._attn_implementation or ""):  # transformers would fetch a kernel by that name and run it
        raise ValueError(f"its config.json asks for attention by {config._attn_implementation}; remove attn_implementation")


def _unused_layer(model: PreTrainedModel, unexpected: Iterable[str]) -> int | None:
    """Number of the first layer in the weights that the model does not have; None where there is none.

    unexpected: names of weights that were not used. Modules behind the last layer, for drafting, have tensors that no layer has.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    parts = {_layer_and_part(name)[1] for name, _ in model.named_parameters() if LAYER_NUMBER.search(name)}
    unused: dict[int, set[str]] = {}
    for name in unexpected:
        if LAYER_NUMBER.search(name):
            number, part = _layer_and_part(name)
            unused.setdefault(number, set()).add(part)
    return next((number for number in sorted(unused) if number >= count and unused[number] <= parts), None)


def _layer_and_part(name: str) -> tuple[int, str]:
    """The number of the layer that a tensor is in, and its name without that number."""
    number = LAYER_NUMBER.search(name)
    assert number is not None, f"{name} is in no layer"
    return int(number[1]), f"{name[: number.start()]}.{name[number.end() :]}"


def _adapted(path: str | Path, base: str, dtype: str | torch.dtype, device: str, trust_remote_code: bool) -> PreTrainedModel:
    try:
        model = load_model(base, dtype, device, trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{path} is an adapter of {base}, and {error}; if that model is elsewhere, correct base_model_name_or_path in "
            f"{adapters.CONFIG}"
        ) from error
    return adapters.adapt(model, path)


def stored_dtype(path: str | Path, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype in which a model, or the base model of an adapter, is stored; float32 where its configuration does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(adapters.adapted_by(path) or path, trust_remote_code=trust_remote_code)
    dtype: torch.dtype | None = getattr(config, "dtype", None)
    return dtype or torch.float32


def embedded(part: str) -> Path:
    """The folder of a part of the embedded model. Raises ValueError where this installation lacks it.

    part: "target", "draft" for its draft model, or a method's name for its heads.
    """
    folder = Path(str(files("headstart") / "embedded" / part))
    if not (folder / "config.json").is_file():
        raise ValueError(f"this installation lacks its embedded model ({folder}); name a model, or install the package again")
    return folder


def check_folder(path: str | Path) -> None:
    """Raise ValueError if `path` looks like a folder and has no model in it; a hub id passes."""
    folder = Path(path)
    if len(str(path)) > MAX_PATH:
        raise ValueError(f"model {str(path)[:40]!r}... is a name of {len(str(path))} characters; it must be at most {MAX_PATH}")
    looks_local = folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if looks_local and not any((folder / name).is_file() for name in ("config.json", adapters.CONFIG)):
        what = "has no config.json" if folder.is_dir() else "does not exist" if not folder.exists() else "is not a folder"
        raise ValueError(f"model folder {path} {what}; a model is a folder with config.json, weights and tokenizer, or a hub id")
    for name in ("config.json", GENERATION_CONFIG):  # transformers ignores the second one where it is damaged
        if (folder / name).is_file():
            _check_numbers(folder / name, read_object(folder / name))
    if (folder / GENERATION_CONFIG).is_file():
        _check_generation_config(folder / GENERATION_CONFIG)


def _check_numbers(file: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a number of layers that no model has: transformers would allocate them one by one without end."""
    for name, value in [*config.items(), *dict(config.get("text_config") or {}).items()]:
        if "layer" in name and isinstance(value, int | float) and abs(value) > MAX_LAYERS:
            raise ValueError(f"{file} says {name}: {value:g}; it must be at most {MAX_LAYERS}")


def _check_generation_config(file: Path) -> None:
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(file.parent)
    except Exception as error:  # a wrong value may raise anything in transformers
        raise ValueError(f"{file} is damaged: {why(error)}; correct it, or delete it") from error


def _is_causal(architectures: Sequence[str] | None) -> bool:
    """Whether these class names are of causal LMs: the same weights may be stored as a masked LM or a classifier."""
    return not architectures or any(re.search("CausalLM|LMHead|ConditionalGeneration", name) for name in architectures)


def _device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if not DEVICE.fullmatch(name):
        raise ValueError(f"device {name!r} is not supported; write auto, cpu, cuda or cuda:NUMBER")
    device = torch.device(name)
    if device.type == "cuda" and (not has_cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} does not exist; torch sees {torch.cuda.device_count()} CUDA devices")
    return device
