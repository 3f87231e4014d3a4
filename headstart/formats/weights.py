"""Named tensors in files of others: safetensors, and pickles that may hold tensors but run nothing.

This file knows files. It refuses to know what the names mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headstart.text.jsonl import read_object

TensorShape = tuple[int, ...]

PICKLES = (".pt", ".bin", ".pth")
HEADS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "hydra_lm_head.safetensors", "hydra_lm_head.pt")
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Weights:
    """Tensors by name, from one file or several, looked at without reading their values.

    files: of safetensors or pickles. Raises ValueError, naming the file, for one that is damaged, that wants to run code, or that
    holds something else than named tensors. `shapes`: of every tensor, by name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.shapes: dict[str, TensorShape] = {}
        self._read: dict[str, Callable[[], Tensor]] = {}
        for path in self.files:
            found = _pickled(path) if path.suffix in PICKLES else _safe(path)
            self.shapes |= {name: shape for name, (shape, _) in found.items()}
            self._read |= {name: read for name, (_, read) in found.items()}

    def __getitem__(self, name: str) -> Tensor:
        """A copy with memory of its own, for a name may be stored twice."""
        return self._read[name]().detach().clone()


def weights_in(path: Path) -> Weights | None:
    """The weights of a folder, heads before whole models, or one file itself; None where there are none."""
    if path.is_file():
        return Weights([path])
    for name in (*HEADS, *WHOLE):
        if (path / name).is_file():
            return Weights(_shards(path / name) if name.endswith(".index.json") else [path / name])
    loose = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", *PICKLES)] if path.is_dir() else []
    return Weights(loose[:1]) if len(loose) == 1 else None


def beside(model: str | Path) -> Path | None:
    """The folder with a model's files: its own, or where those of a hub id have been put; None where they are not here."""
    from transformers.utils.hub import cached_file

    if Path(model).is_dir():
        return Path(model)
    try:
        found = cached_file(str(model), "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None


def safe_in(folder: Path) -> Weights | None:
    """The safetensors of a whole model; None where it has none. Only their headers are read."""
    for name in WHOLE:
        if ".safetensors" in name and (folder / name).is_file():
            return Weights(_shards(folder / name) if name.endswith(".index.json") else [folder / name])
    return None


def config_in(path: Path) -> dict[str, Any]:
    """The `config.json` in a folder or beside a file; empty where there is none. Raises ValueError for one that is no object."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    found = read_object(file)
    named = found.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"{file}: architectures is {named!r}; it must be a list of names")
    return found


def _shards(index: Path) -> list[Path]:
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index} is no index of weights: its weight_map does not say in which file each tensor is")
    names = sorted({*named.values()})
    if strange := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names the file {strange[0]!r}, which is not in its folder")
    return [index.parent / name for name in names]


_Readers = dict[str, tuple[TensorShape, Callable[[], Tensor]]]  # shape and reader of each tensor, by name


def _safe(path: Path) -> _Readers:
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


def _pickled(path: Path) -> _Readers:
    found = _unpickle(path)
    if not isinstance(found, dict) or not all(isinstance(name, str) and _is_plain(value) for name, value in found.items()):
        raise ValueError(f"{path} holds something else than tensors by name")
    return {name: (tuple(tensor.shape), partial(found.__getitem__, name)) for name, tensor in found.items()}


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _unpickle(path: Path) -> object:
    """The content, mapped into memory where the file allows it; nothing in it is run."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6, or damaged
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of others can confuse the unpickler in every way there is
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} wants to run {wanted[1]} when it is read; code of others is never run here: ask its author for safetensors"
            ) from None
        raise ValueError(f"{path} is damaged or no file of tensors; copy it again") from None
