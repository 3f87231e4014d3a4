"""What an exporter is: the files of one engine, made of heads and their target. One file per engine; must not import a method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from headstart.target.embed_head import EmbedHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headstart.drafters.parts.heads import Heads
    from headstart.formats.target_info import TargetInfo

CONFIG, WEIGHTS = "config.json", "model.safetensors"
AS_IT_IS, RENAMED, DERIVED = "as it is", "renamed", "derived: "


@dataclass(frozen=True)
class Placed:
    """One tensor of an export.

    ours: its name in native heads; None: it is the target's, or made anew.
    theirs: its name in the export.
    file: that holds it, inside the export's folder.
    how: "as it is", "renamed", or "derived: " and what was computed.
    dtype, shape: as written, in the words of torch.
    sha256: of its numbers as written, in row-major order and little-endian.
    """

    ours: str | None
    theirs: str
    file: str
    how: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, ours: str | None, theirs: str, file: str, tensor: Tensor, how: str | None = None) -> Placed:
        """The entry of a tensor. how: None: the tensor is unchanged, and the two names say whether it was renamed."""
        how = how or (AS_IT_IS if ours == theirs else RENAMED)
        return cls(ours, theirs, file, how, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), sha256(tensor))

    def as_dict(self) -> dict[str, Any]:
        """The entry for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """The heads that are exported, and their target.

    heads: bound to the target, on the CPU, not packed for drafting.
    target_info: of the target, as `describe_target` gives it.
    model: the target, on the CPU, in the dtype in which it is stored.
    source: folder or hub id of the target.
    dtype: of the exported heads; None: as they are stored.
    chain: number of drafts per round for which the export is written.
    """

    heads: Heads
    target_info: TargetInfo
    model: PreTrainedModel
    source: str
    dtype: torch.dtype | None = None
    chain: int = 3

    @property
    def method(self) -> str:
        """The method of the heads, as "medusa"."""
        return self.heads.name

    @property
    def config(self) -> Any:
        """The settings of the heads, of the method's `config_type`."""
        return self.heads.config

    @property
    def text_config(self) -> Any:
        """The target's configuration of its language model."""
        return self.model.config.get_text_config()

    @property
    def embed_head(self) -> EmbedHead:
        """The target's embedding and LM head."""
        return self.heads.embed_head

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the heads by our names; floating-point ones in `dtype`."""
        return {name: self.cast(tensor) for name, tensor in self.heads.state_dict().items()}

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor as it is written: on the CPU, contiguous, floating-point ones in `dtype`."""
        is_cast = self.dtype is not None and tensor.is_floating_point()
        return tensor.detach().to("cpu", self.dtype if is_cast else tensor.dtype).contiguous()

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the exported heads' weights."""
        return next(tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point())


class Exporter(Protocol):
    """Writes heads in the format of one engine.

    name: of the engine, as `--to` takes it.
    reader: engine and version whose reader it was written against.
    methods: names of the methods that it takes.
    instead: for methods that it does not take, a sentence with the way out; others are refused in general words.
    """

    name: ClassVar[str]
    reader: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    instead: ClassVar[Mapping[str, str]]

    def check(self, subject: Subject) -> None:
        """Raise ValueError, in one sentence, for what the engine would drop, ignore or change silently.

        The sentence names the setting and the way out. Nothing is written before.
        """

    def write(self, subject: Subject, staged: Path) -> list[Placed]:
        """Write all files but `conformance.json` and `README.md` to an empty folder, and return where the heads' tensors went."""
        ...


@dataclass
class TensorFile:
    """Tensors that go into one safetensors file.

    name: of the file.
    """

    name: str = WEIGHTS
    _tensors: dict[str, Tensor] = field(default_factory=dict)
    _placed: list[Placed] = field(default_factory=list)

    def put(self, ours: str | None, theirs: str, tensor: Tensor, how: str | None = None) -> None:
        """Add a tensor. how: see `Placed.of`."""
        assert theirs not in self._tensors, f"{theirs} is written twice"
        self._tensors[theirs] = tensor
        self._placed.append(Placed.of(ours, theirs, self.name, tensor, how))

    def save(self, staged: Path) -> list[Placed]:
        """Write the file, and return its entries."""
        # Two names may share one tensor in memory, which safetensors refuses.
        save_file({name: tensor.clone() for name, tensor in self._tensors.items()}, staged / self.name, metadata={"format": "pt"})
        return self._placed


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sha256(tensor: Tensor) -> str:
    """The hash of a tensor's numbers, in row-major order: 64 hexadecimal digits."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def source_path(source: str) -> str:
    """A model's name as an engine finds it from anywhere: a folder by its whole path, a hub id as it is."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source
