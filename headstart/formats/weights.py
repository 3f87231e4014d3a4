"""Named tensors in published files: safetensors, and pickles of tensors, of which no code is run.

Must not know what the names mean; the modules of `headstart.formats.published` do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headstart.formats import gguf_reader
from headstart.text.jsonl import read_object

TensorShape = tuple[int, ...]

GGUF = ".gguf"
PICKLES = (".pt", ".bin", ".pth")
HEADS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "hydra_lm_head.safetensors", "hydra_lm_head.pt")
DRAFT_GGUF, MODEL_GGUF = "draft.gguf", "model.gguf"  # heads, and a model with heads inside, for llama.cpp
MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Weights:
    """Tensors by name, from one file or several; their values are read only when asked for.

    files: safetensors, pickles, or GGUF files, whose tensors have Hugging Face's names here.
    shapes: shape of every tensor, by name.
    Raises ValueError, naming the file, for one that is damaged, wants to run code, or holds something else than named tensors.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.shapes: dict[str, TensorShape] = {}
        self._read: dict[str, Callable[[], Tensor]] = {}
        for path in self.files:
            readers = _readers(path)
            self.shapes |= {name: shape for name, (shape, _) in readers.items()}
            self._read |= {name: read for name, (_, read) in readers.items()}

    def without(self, names: Collection[str]) -> Weights:
        """The same files without the tensors of these names."""
        rest = Weights([])
        rest.files = self.files
        rest.shapes = {name: shape for name, shape in self.shapes.items() if name not in names}
        rest._read = {name: self._read[name] for name in rest.shapes}
        return rest

    def __getitem__(self, name: str) -> Tensor:
        """A tensor with its own memory, on the CPU: two names may share one storage in the file."""
        return self._read[name]().detach().clone()


def weights_in(path: Path) -> Weights | None:
    """The weights of a folder, or of one file; None where there are none.

    In a folder, files of heads come before those of a model; a single file of any other name is taken too.
    """
    if path.is_file():
        return Weights([path])
    for name in (*HEADS, DRAFT_GGUF, *MODELS, MODEL_GGUF):
        if (path / name).is_file():
            return Weights(_shards(path / name) if name.endswith(".index.json") else [path / name])
    others = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", GGUF, *PICKLES)] if path.is_dir() else []
    return Weights(others[:1]) if len(others) == 1 else None


def beside(model: str | Path) -> Path | None:
    """The local folder with a model's files, None where they are not on this machine.

    model: a folder, or a hub id whose files are in the hub's cache.
    """
    from transformers.utils.hub import cached_file

    if Path(model).is_dir():
        return Path(model)
    try:
        config_file = cached_file(str(model), "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(config_file).parent if config_file else None


def safe_in(folder: Path) -> Weights | None:
    """The safetensors of a model's folder; None where it has none. Only their headers are read."""
    for name in MODELS:
        if ".safetensors" in name and (folder / name).is_file():
            return Weights(_shards(folder / name) if name.endswith(".index.json") else [folder / name])
    return None


def config_in(path: Path) -> dict[str, Any]:
    """The `config.json` in a folder, or in the folder of a file; of a GGUF file what it says itself; empty where there is none.

    Raises ValueError for one that is no JSON object, or whose `architectures` is no list of names.
    """
    if (gguf := _gguf_in(path)) is not None:
        return gguf_reader.config(gguf)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    config = read_object(file)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{file}: architectures is {names!r}; it must be a list of names")
    return config


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path names, or that `weights_in` finds in a folder; None where it is none."""
    if path.is_file():
        return path if path.suffix == GGUF else None
    if any((path / name).is_file() for name in ("config.json", *HEADS)):
        return None
    return next((path / name for name in (DRAFT_GGUF, MODEL_GGUF) if (path / name).is_file()), None)


def _shards(index: Path) -> list[Path]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is no index of weights: its weight_map does not say in which file each tensor is")
    names = sorted({*weight_map.values()})
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names the file {elsewhere[0]!r}, which is not in its folder")
    return [index.parent / name for name in names]


_Readers = dict[str, tuple[TensorShape, Callable[[], Tensor]]]  # shape and reader of each tensor, by name


def _readers(path: Path) -> _Readers:
    if path.suffix == GGUF:
        return gguf_reader.readers(path)
    return _pickle_readers(path) if path.suffix in PICKLES else _safetensors_readers(path)


def _safetensors_readers(path: Path) -> _Readers:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy it again") from None
    return {name: (shape, partial(_read_one, path, name)) for name, shape in shapes.items()}


def _read_one(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _pickle_readers(path: Path) -> _Readers:
    content = _unpickle(path)
    if not isinstance(content, dict) or not all(isinstance(name, str) and _is_strided(value) for name, value in content.items()):
        raise ValueError(f"{path} holds something else than tensors by name")
    return {name: (tuple(tensor.shape), partial(content.__getitem__, name)) for name, tensor in content.items()}


def _is_strided(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _unpickle(path: Path) -> object:
    """The content, mapped into memory where the file allows it; no code in it is run."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6, or damaged
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} wants to run {code[1]} when it is read; code of others is never run here: ask its author for safetensors"
            ) from None
        raise ValueError(f"{path} is damaged or no file of tensors; copy it again") from None
