"""A feature store: the target's hidden states of all texts of a run, computed once and kept in a folder.

    store.json                   what is in it: target, layers, dtype, texts
    shard-00000.safetensors      texts one after another: tokens [n] int32, loss_mask [n] uint8, lengths [texts] int64,
                                 states [n, layers, hidden] in the target's dtype; metadata: the digests of target and texts

Shards are read through memory maps, so every process has all of them and the disk's cache is shared. `feature_writer` writes them.
The module must not import drafters or the training loop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headstart.drafters.parts.losses import Batch
from headstart.formats import TargetInfo
from headstart.text.jsonl import read_object
from headstart.training.dataset import Dataset, Text, TextBatch
from headstart.training.features import as_batch, layers

MANIFEST = "store.json"


class Manifest(BaseModel):
    """What a store holds.

    target: whose hidden states they are.
    dtype: of the states, and of the target that computed them.
    layers: whose outputs are stored, ascending; the last layer's, with the final norm, is among them.
    texts: hash of all tokens and loss masks, in order.
    length: tokens of a text at most.
    shards: number of texts of each shard.
    num_tokens: of all texts.
    data: names of the files that the texts are from.
    is_complete: whether all shards were written; training then needs the target's embedding and LM head only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headstart-features"] = "headstart-features"
    version: Literal[2] = 2
    target: TargetInfo
    dtype: str
    layers: tuple[int, ...]
    texts: str
    length: int
    shards: tuple[int, ...]
    num_tokens: int
    data: tuple[str, ...] = ()
    is_complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest in a folder. Raises ValueError for one that is damaged."""
        try:
            return cls.model_validate_json(json.dumps(read_object(folder / MANIFEST)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"]))
            what = f"{folder / MANIFEST} is of no store that can be read ({name}: {first['msg']})"
        except ValueError as error:
            what = str(error)
        raise ValueError(f"{what}; delete the folder, and the features are computed again") from None

    def difference(self, other: Manifest) -> str | None:
        """The first thing in which two stores differ, as a phrase; None where they hold the same."""
        if self.target.digest != other.target.digest:
            return f"target {self.target.name} ({self.target.digest}) instead of {other.target.name} ({other.target.digest})"
        for name in ("dtype", "layers", "texts", "shards"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} {_shown(getattr(self, name))} instead of {_shown(getattr(other, name))}"
        return None

    @property
    def num_bytes(self) -> int:
        """Size of all states on the disk."""
        return self.num_tokens * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        """Size of the states of one token."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return len(self.layers) * self.target.hidden * dtype.itemsize


class Store:
    """A folder of features, all of them written.

    Raises ValueError, naming the shard, where one is missing.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        missing = [number for number in range(len(manifest.shards)) if not shard_file(folder, number).is_file()]
        if missing:
            raise ValueError(
                f"{shard_file(folder, missing[0])} is missing ({len(missing)} of {len(manifest.shards)} are); write it again with "
                "`headstart features` and the options of the first time, which computes only what is missing"
            )
        self._first = [0, *accumulate(manifest.shards)]  # index of the first text of each shard
        self._open: dict[int, tuple[Any, list[int]]] = {}

    def texts(self) -> list[Text]:
        """All texts, in the order of the data."""
        texts: list[Text] = []
        for number in range(len(self.manifest.shards)):
            file, bounds = self._shard(number)
            tokens, mask = file.get_tensor("tokens").tolist(), file.get_tensor("loss_mask").tolist()
            texts += [Text(tuple(tokens[start:end]), tuple(map(bool, mask[start:end]))) for start, end in pairwise(bounds)]
        return texts

    def states(self, index: int) -> Tensor:
        """Hidden states of a text, [tokens, layers, hidden]."""
        number = next(number for number, end in enumerate(self._first[1:]) if index < end)
        file, bounds = self._shard(number)
        row = index - self._first[number]
        states: Tensor = file.get_slice("states")[bounds[row] : bounds[row + 1]]
        return states

    def _shard(self, number: int) -> tuple[Any, list[int]]:
        """An open shard, and where its texts begin and end. Raises ValueError for one that is damaged or of another store."""
        if number not in self._open:
            path = shard_file(self.folder, number)
            try:
                file: Any = safe_open(path, framework="pt")
                bounds = [0, *accumulate(file.get_tensor("lengths").tolist())]
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} is damaged ({error}); delete it, and write it again with `headstart features`") from None
            if (file.metadata() or {}).get("store") != shard_key(self.manifest, number):
                raise ValueError(f"{path} is of another store; delete it, and write it again with `headstart features`")
            self._open[number] = file, bounds
        return self._open[number]


class Stored:
    """Features from a store, as `Online` gives them.

    taps: layers that a drafter reads.
    device: of the batches.
    Raises ValueError where the store lacks a layer that is read.
    """

    def __init__(self, store: Store, taps: Sequence[int], device: torch.device) -> None:
        manifest = store.manifest
        num_layers = manifest.target.layers
        self.store, self.device = store, device
        self._taps = [tap % num_layers for tap in taps]
        self.layers = layers(taps, num_layers)
        if lacking := [layer for layer in self.layers if layer not in manifest.layers]:
            raise ValueError(
                f"these heads read layer {lacking[0]}, and the features in {store.folder} are of the layers "
                f"{_shown(manifest.layers)}; write others with `headstart features --method` or --taps"
            )

    def __call__(self, texts: TextBatch) -> Batch:
        """The batch of a loss; states of padding are zero."""
        manifest, shape = self.store.manifest, texts.tokens.shape
        states = torch.zeros(*shape, len(manifest.layers), manifest.target.hidden, dtype=getattr(torch, manifest.dtype))
        for row, index in enumerate(texts.indices):
            stored = self.store.states(index)  # [tokens, layers, hidden]
            states[row, : stored.shape[0]] = stored
        states = states.to(self.device, non_blocking=True)
        by_layer = {layer: states[:, :, manifest.layers.index(layer)] for layer in self.layers}
        return as_batch(texts.to(self.device), by_layer, self._taps)


def complete_store(folder: Path | None) -> Store | None:
    """The store in a folder; None where there is none, or where some of it was never written."""
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    manifest = Manifest.read(folder)
    return Store(folder, manifest) if manifest.is_complete else None


def texts_digest(texts: Sequence[Text]) -> str:
    """Hash of the tokens and loss masks of texts, in their order: 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for text in texts:
        sha.update(repr((text.tokens, text.mask)).encode())
    return sha.hexdigest()[:16]


def check_texts(store: Store, dataset: Dataset) -> None:
    """Raise ValueError where a dataset has other texts than a store."""
    if texts_digest(dataset.texts) != store.manifest.texts:
        names = ", ".join(store.manifest.data) or "other files"
        raise ValueError(
            f"the features in {store.folder} are of {sum(store.manifest.shards)} texts (from {names}, cut at "
            f"{store.manifest.length} tokens), and the data gives {len(dataset.texts)} others; leave --data out to train on "
            "those of the store"
        )


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def shard_key(manifest: Manifest, number: int) -> str:
    """What identifies a shard, in its metadata."""
    return f"{number} target {manifest.target.digest} layers {_shown(manifest.layers)} {manifest.dtype} texts {manifest.texts}"


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
