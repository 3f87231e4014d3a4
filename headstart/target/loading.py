"""A causal language model from a folder or the hub, or one sentence that says what is wrong with it.

This file knows files and configurations. It refuses to know what is done with a model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headstart.target import adapters
from headstart.text.jsonl import read_object, why

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 4096  # of each weight
DEVICE = re.compile(r"cpu(:0)?|cuda(:\d{1,3})?")
LAYER = re.compile(r"\.(\d+)\.")
GENERATION = "generation_config.json"
MOST_LAYERS = 100_000
LONGEST = 1024  # letters of a path


def digest(model: PreTrainedModel) -> str:
    """16 hex digits that tell a fine-tune: the weights of both ends and of the first, the middle and the last layer, sampled.

    Samples are rounded to bfloat16, and a packed linear shows its plain weight. So weights have one digest, whether loaded as
    stored or in a wider dtype, and whichever kernels a target has put in their place.
    """
    sha = hashlib.sha256()
    for name, module in _telling(model):
        weight: Any = module.weight.T if type(module).__name__ == "Conv1D" else module.weight  # GPT-2's is transposed
        weight = weight if type(weight.data) is torch.Tensor else weight.dequantize()  # torchao's, which cannot be sliced
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLES)].to(torch.bfloat16).float()
        sha.update(f"{name} {tuple(weight.shape)}".encode() + sample.cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def _telling(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """The modules with a matrix, by name, outside the layers and in three of them. A packed one has its matrix as a property."""
    matrices = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(type(module), "weight") or getattr(module._parameters.get("weight"), "ndim", 0) == 2
    ]
    layers = sorted({int(number[1]) for name, _ in matrices if (number := LAYER.search(name))})
    chosen = {layers[0], layers[len(layers) // 2], layers[-1]} if layers else set()
    return [(name, module) for name, module in matrices if not (number := LAYER.search(name)) or int(number[1]) in chosen]


@contextmanager
def no_weight_bars() -> Iterator[None]:
    """No "Loading weights" bars of transformers inside; the bars of downloads stay, and so do the user's own settings."""
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
    """A causal LM from a folder or the hub, or a folder with an adapter, together with the model that it adapts.

    trust_remote_code: whether Python files in that folder may run; nothing is ever asked. Raises ValueError in one sentence for
    everything that can be wrong with it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = _device(device)
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
            ignore_mismatched_sizes=True,  # they are told below, by name
            trust_remote_code=trust_remote_code,
        )
        model, info = loaded
    except Exception as error:  # safetensors, json and hub errors share no base class
        what = "its weights are damaged or cut short: " if "Safetensor" in type(error).__name__ else ""
        raise ValueError(f"model {path} cannot be loaded: {what}{why(error)}") from error
    if misshaped := sorted(info.get("mismatched_keys", ()), key=str):
        name, found, wanted = misshaped[0]
        said = (
            f"{len(misshaped)} tensors of other shapes than its config.json says, first {name}: {list(found)}, not {list(wanted)}"
        )
        raise ValueError(f"model {path} is not whole: {said}")
    if missing := sorted(info.get("missing_keys", ())):
        raise ValueError(f"model {path} is not whole: {len(missing)} missing keys, first {missing[0]}")
    if (number := _layer_left_out(model, info.get("unexpected_keys", ()))) is not None:
        raise ValueError(
            f"model {path} is not whole: its weights have a layer {number}, counted from 0, and its config.json says that it has "
            f"{model.config.get_text_config().num_hidden_layers} layers; set num_hidden_layers right"
        )
    placed: PreTrainedModel = model.to(place)
    return placed


def random_model(path: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal LM in float32 as a config.json, or a folder with one, describes it; its weights are drawn from torch's generator.

    Raises ValueError in one sentence for what is no such configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model folder {path} has no config.json")
    try:
        _check_numbers(file, read_object(file))
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _check_config(config)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a wrong number does in there
        raise ValueError(f"model {path} is no configuration of a causal language model: {why(error)}") from error
    return made


def _check_config(config: Any) -> None:
    """Raise ValueError for a configuration of something else, and for what would be taken from elsewhere without a word."""
    from transformers import AutoModelForCausalLM

    is_known = type(config) in AutoModelForCausalLM._model_mapping
    has_own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not (is_known or has_own) or not _is_causal(config.architectures):
        kind = (config.architectures or [config.model_type])[0]
        raise ValueError(f"it holds a {kind}, which is not a causal language model")
    if "/" in str(config._attn_implementation or ""):  # transformers would fetch a kernel by that name and run it
        raise ValueError(f"its config.json asks for attention by {config._attn_implementation}; remove attn_implementation")


def _layer_left_out(model: PreTrainedModel, unexpected: Iterable[str]) -> int | None:
    """The first layer that the weights have like any other and the model has not. Modules behind the last layer, which draft,
    have tensors that no layer has."""
    count = int(model.config.get_text_config().num_hidden_layers)
    parts = {_of_layer(name)[1] for name, _ in model.named_parameters() if LAYER.search(name)}
    found: dict[int, set[str]] = {}
    for name in unexpected:
        if LAYER.search(name):
            number, part = _of_layer(name)
            found.setdefault(number, set()).add(part)
    return next((number for number in sorted(found) if number >= count and found[number] <= parts), None)


def _of_layer(name: str) -> tuple[int, str]:
    """The number of the layer that a tensor is in, and its name without that number."""
    number = LAYER.search(name)
    assert number is not None, f"{name} is in no layer"
    return int(number[1]), f"{name[: number.start()]}.{name[number.end() :]}"


def _adapted(path: str | Path, base: str, dtype: str | torch.dtype, device: str, trust_remote_code: bool) -> PreTrainedModel:
    try:
        model = load_model(base, dtype, device, trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{path} is an adapter of {base}, and {error}; if that model is elsewhere, say where in {adapters.CONFIG} "
            "(base_model_name_or_path)"
        ) from error
    return adapters.adapt(model, path)


def stored_dtype(path: str | Path, trust_remote_code: bool = False) -> torch.dtype:
    """The precision in which a model, or the one that an adapter is of, is stored; float32 where its configuration does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(adapters.adapted_by(path) or path, trust_remote_code=trust_remote_code)
    dtype: torch.dtype | None = getattr(config, "dtype", None)
    return dtype or torch.float32


def embedded(part: str) -> Path:
    """The folder of the embedded model ("target"), of its draft sibling ("draft"), or of its heads of some method."""
    folder = Path(str(files("headstart") / "embedded" / part))
    if not (folder / "config.json").is_file():
        raise ValueError(f"this installation lacks its embedded model ({folder}); name a model, or install the package again")
    return folder


def check_folder(path: str | Path) -> None:
    """Raise ValueError if `path` looks like a folder and holds no model; a hub id passes."""
    folder = Path(path)
    if len(str(path)) > LONGEST:
        raise ValueError(f"model {str(path)[:40]!r}... is a name of {len(str(path))} letters, which no folder and no hub id has")
    looks_local = folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if looks_local and not any((folder / name).is_file() for name in ("config.json", adapters.CONFIG)):
        what = "has no config.json" if folder.is_dir() else "does not exist" if not folder.exists() else "is not a folder"
        raise ValueError(f"model folder {path} {what}; a model is a folder with config.json, weights and tokenizer, or a hub id")
    for name in ("config.json", GENERATION):  # transformers leaves the second out without a word where it is damaged
        if (folder / name).is_file():
            _check_numbers(folder / name, read_object(folder / name))
    if (folder / GENERATION).is_file():
        _check_generation(folder / GENERATION)


def _check_numbers(file: Path, said: Mapping[str, Any]) -> None:
    """Raise ValueError for a number of layers that no model has: transformers would make them one by one, without an end."""
    for name, value in [*said.items(), *dict(said.get("text_config") or {}).items()]:
        if "layer" in name and isinstance(value, int | float) and abs(value) > MOST_LAYERS:
            raise ValueError(f"{file} says {name}: {value:g}; it must be at most {MOST_LAYERS}")


def _check_generation(file: Path) -> None:
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(file.parent)
    except Exception as error:  # whatever a wrong value does in there
        raise ValueError(f"{file} is damaged: {why(error)}; correct it, or delete it") from error


def _is_causal(architectures: Sequence[str] | None) -> bool:
    """By name: the same weights may be stored for another task, as a masked language model or a classifier."""
    return not architectures or any(re.search("CausalLM|LMHead|ConditionalGeneration", name) for name in architectures)


def _device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if not DEVICE.fullmatch(name):
        raise ValueError(f"device {name!r} is unknown here; write auto, cpu, cuda or cuda:NUMBER")
    device = torch.device(name)
    if device.type == "cuda" and (not has_cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not there; torch sees {torch.cuda.device_count()} CUDA devices")
    return device
