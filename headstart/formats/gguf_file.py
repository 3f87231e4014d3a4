"""GGUF files: named tensors and named numbers, read and written with the `gguf` package. Must not know what the names mean."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Value = bool | int | float | str | Sequence[int] | Sequence[str]
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_MISSING = "the package gguf is missing, which reads and writes llama.cpp's files; install it with `pip install 'headstart[gguf]'`"


def import_gguf() -> Any:
    """The `gguf` package. Raises ValueError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError(_MISSING) from None
    logging.getLogger("gguf").setLevel(logging.ERROR)  # it prints every key that it writes
    return gguf


class Vocabulary(Protocol):
    """A tokenizer that writes itself."""

    def add_to(self, writer: Any) -> None:
        """Add the tokens, merges and special tokens. writer: a `GGUFWriter`."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    read: gives it, contiguous, in `dtype`, when it is written: a large model is never in memory as a whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """The entry of a tensor in memory."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write(
    path: Path, architecture: str, fields: Mapping[str, Value], vocabulary: Vocabulary | None, entries: Sequence[Entry]
) -> None:
    """Write a file.

    architecture: in llama.cpp's words; it stands for `%s` in the keys.
    fields: named numbers, texts and lists.
    vocabulary: None: the file has no tokenizer.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        _add(writer, key.replace("%s", architecture), value)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        vocabulary.add_to(writer)
    for entry in entries:
        size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
        kind = gguf.GGMLQuantizationType[TYPES[entry.dtype]]
        writer.add_tensor_info(entry.name, _byte_shape(entry), _uint8(), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        tensor = entry.read()
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), f"{entry.name} is not what was announced"
        writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    writer.close()


def _add(writer: Any, key: str, value: Value) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _byte_shape(entry: Entry) -> tuple[int, ...]:
    return (*entry.shape[:-1], entry.shape[-1] * entry.dtype.itemsize)


def _uint8() -> Any:
    import numpy

    return numpy.dtype(numpy.uint8)


class GgufFile:
    """A file that is read.

    fields: its numbers, texts and lists by name, without the tokenizer's lists.
    shapes: of its tensors by name, in torch's order.
    Raises ValueError, naming the file, for one that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, reader = path, import_gguf().GGUFReader
        try:
            self._reader = reader(path)
        except (OSError, IndexError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no GGUF file: {error}; copy it again") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in self._tensors.items()}

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.field("general.architecture"))

    def field(self, key: str, default: Any = None) -> Any:
        """A number, text or list; `default` where there is none. Floats are the shortest decimals that float32 rounds to them.

        key: with `%s` for the architecture.
        """
        if "%s" in key:
            key = key.replace("%s", self.architecture)
        entry = self._reader.fields.get(key)
        if entry is None:
            return default
        value = entry.contents()
        return _shortest(value) if isinstance(value, float) else value

    def __getitem__(self, name: str) -> Tensor:
        """A tensor with its own memory. Raises ValueError for a quantized one."""
        tensor = self._tensors[name]
        dtypes = {kind: dtype for dtype, kind in TYPES.items()}
        if tensor.tensor_type.name not in dtypes:
            raise ValueError(f"{name} in {self.path} is quantized to {tensor.tensor_type.name}; quantized heads cannot be imported")
        raw = torch.from_numpy(tensor.data.copy().reshape(-1).view(_uint8()))
        return raw.view(dtypes[tensor.tensor_type.name]).reshape(self.shapes[name])

    def narrowed(self, name: str) -> Tensor:
        """A tensor in the dtype of the file's matrices where that loses nothing: llama.cpp wants norms and biases in float32."""
        tensor, kinds = self[name], {tensor.tensor_type.name for tensor in self._tensors.values() if len(tensor.shape) > 1}
        dtype = next((dtype for dtype in (torch.bfloat16, torch.float16) if TYPES[dtype] in kinds), torch.float32)
        if tensor.dtype is not torch.float32:
            return tensor
        narrow = tensor.to(dtype)
        return narrow if torch.equal(narrow.float(), tensor) else tensor


def _shortest(number: float) -> float:
    import numpy

    return float(str(numpy.float32(number)))
