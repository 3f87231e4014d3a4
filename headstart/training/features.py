"""Features (tapped hidden states) of the target for texts: computed as needed, or read from a store that was written once.

A store is a folder of safetensors shards with a `store.json` that names its target and its texts. It is written shard by shard, so
that an interrupted pass continues. The module must not import drafters or the training loop.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headstart.drafters.parts.losses import Batch
from headstart.target.hidden_states import hidden_states
from headstart.text.jsonl import read_object
from headstart.training.dataset import Dataset, TextBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_TOKENS = 16_384  # 64 MiB at a hidden size of 1,024 in float32
MANIFEST = "store.json"


class Online:
    """Computes features and last hidden states with the model and its own attention.

    model: the target; it is frozen here.
    taps: layers that a drafter reads, as `Target.score` counts them.
    """

    def __init__(self, model: PreTrainedModel, taps: Sequence[int]) -> None:
        self.model = model.eval().requires_grad_(False)
        num_layers = int(model.config.get_text_config().num_hidden_layers)
        self.layers = layers(taps, num_layers)
        self._taps = [tap % num_layers for tap in taps]

    def __call__(self, texts: TextBatch) -> Batch:
        """The batch of a loss, on the model's device."""
        texts = texts.to(self.model.device)
        return as_batch(texts, self.states(texts.tokens), self._taps)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> dict[int, Tensor]:
        """[rows, length] -> the output of each tapped layer and of the last, which is normed, each [rows, length, hidden]."""
        with torch.autocast(tokens.device.type, enabled=False):
            return hidden_states(self.model, tokens, self.layers)


def layers(taps: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The tapped layers and the last, ascending, each once. Raises ValueError if the target has too few layers."""
    if missing := [tap for tap in taps if not -num_layers <= tap < num_layers]:
        raise ValueError(
            f"these heads read layer {missing[0]}, and the target has {num_layers}; choose another method, or more layers"
        )
    return tuple(sorted({*(tap % num_layers for tap in taps), num_layers - 1}))


def as_batch(texts: TextBatch, states: dict[int, Tensor], taps: Sequence[int]) -> Batch:
    """The batch of a loss.

    states: output of each layer in `layers`, [rows, length, hidden].
    taps: layers whose states are joined into features, [rows, length, taps * hidden].

    Features are float32, like the weights that are trained; last hidden states keep the dtype of the target.
    """
    last = states[max(states)]
    features = torch.cat([states[tap] for tap in taps], -1) if taps else last[..., :0]
    return Batch(texts.tokens, texts.loss_mask, features.float(), last)


class Store:
    """Reads the hidden states of every text from a folder. Open one with `Store.filled`."""

    def __init__(self, folder: Path, online: Online, shards: Sequence[Sequence[int]]) -> None:
        self.folder, self._online = folder, online
        self._shard_of = {index: number for number, shard in enumerate(shards) for index in shard}
        self._open: dict[int, Any] = {}

    @classmethod
    def claim(cls, folder: Path, online: Online, dataset: Dataset, target: str) -> None:
        """Mark a new folder as the store of these states. target: its digest. Raises ValueError for another run's store."""
        key = {
            "format": "headstart-features",
            "version": 1,
            "target": target,
            "dtype": str(online.model.dtype).removeprefix("torch."),
            "layers": list(online.layers),
            "texts": dataset.digest(),
            "shards": len(shard_indices(dataset)),
        }
        _claim(folder, key)

    @classmethod
    def filled(
        cls, folder: Path, online: Online, dataset: Dataset, share: tuple[int, int] = (0, 1),
        on_progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> Store:  # fmt: skip
        """The store in a claimed folder; missing shards are computed and written first.

        share: (index of this process, number of processes); each process writes its share of the missing shards.
        on_progress: called with the number of shards written and the number to write.

        Raises ValueError if the disk has not enough room.
        """
        shards = shard_indices(dataset)
        missing = [number for number in range(len(shards)) if not _file(folder, number).is_file()]
        _check_room(folder, online, sum(len(dataset.texts[i].tokens) for number in missing for i in shards[number]))
        mine = [number for number in missing if number % share[1] == share[0]]
        for done, number in enumerate(mine):
            on_progress(done, len(mine))
            _write(folder, number, {str(index): _states_of(online, dataset, index) for index in shards[number]})
        return cls(folder, online, shards)

    def __call__(self, texts: TextBatch) -> Batch:
        """The batch of a loss, on the model's device; states of padding are zero."""
        device = self._online.model.device
        length, taps = texts.tokens.shape[1], self._online._taps
        states = torch.zeros(*texts.tokens.shape, len(self._online.layers), self._width, dtype=self._online.model.dtype)
        for row, index in enumerate(texts.indices):
            stored = self._read(index)  # [tokens, layers, hidden]
            if stored.shape[0] > length:
                raise AssertionError(f"text {index} has {length} tokens at most, the store has {stored.shape[0]}")
            states[row, : stored.shape[0]] = stored
        states = states.to(device, non_blocking=True)
        by_layer = {layer: states[:, :, number] for number, layer in enumerate(self._online.layers)}
        return as_batch(texts.to(device), by_layer, taps)

    @property
    def _width(self) -> int:
        return int(self._online.model.config.get_text_config().hidden_size)

    def _read(self, index: int) -> Tensor:
        number = self._shard_of[index]
        if number not in self._open:
            try:
                self._open[number] = safe_open(_file(self.folder, number), framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{_file(self.folder, number)} is damaged ({error}); delete it, and it is written again") from None
        stored: Tensor = self._open[number].get_tensor(str(index))
        return stored


def shard_indices(dataset: Dataset) -> list[list[int]]:
    """Indices of all texts, in order, divided into shards of about `SHARD_TOKENS` tokens."""
    shards: list[list[int]] = [[]]
    size = 0
    for index, text in enumerate(dataset.texts):
        if shards[-1] and size + len(text.tokens) > SHARD_TOKENS:
            shards.append([])
            size = 0
        shards[-1].append(index)
        size += len(text.tokens)
    return shards


def _states_of(online: Online, dataset: Dataset, index: int) -> Tensor:
    """Hidden states of one text, [length, layers, hidden], in the dtype of the model."""
    states = online.states(dataset.pad([index]).tokens.to(online.model.device))
    return torch.stack([states[layer][0] for layer in online.layers], 1).cpu()


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    temporary = folder / f".{_file(folder, number).name}.{os.getpid()}"
    try:
        save_file(tensors, temporary)
        os.replace(temporary, _file(folder, number))
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"features cannot be written to {folder}: {error}; what is there stays, so make room and start again"
        ) from None


def _file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """Mark a new folder as the store of `key`, or check that it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / MANIFEST
        if not manifest.exists():
            if any(folder.iterdir()):
                raise ValueError(f"features folder {folder} holds other things and no {MANIFEST}; name a new folder")
            temporary = folder / f".{MANIFEST}.{os.getpid()}"
            temporary.write_text(json.dumps(key))
            os.replace(temporary, manifest)
    except OSError as error:
        raise ValueError(f"features folder {folder} cannot be used: {error.strerror}") from None
    try:
        stored = read_object(manifest)
    except ValueError as error:
        raise ValueError(f"{error}; delete the folder, and the features are computed again") from None
    wrong = [f"{name} {stored.get(name)} instead of {value}" for name, value in key.items() if stored.get(name) != value]
    if wrong:
        raise ValueError(f"features in {folder} are of another run: {', '.join(wrong)}; name another folder, or delete it")


def _check_room(folder: Path, online: Online, num_tokens: int) -> None:
    config = online.model.config.get_text_config()
    needed = num_tokens * len(online.layers) * int(config.hidden_size) * online.model.dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"features of {num_tokens:,} tokens need {needed / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} are free"
        )
