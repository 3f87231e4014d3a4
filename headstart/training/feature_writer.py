"""Writing a feature store: shard by shard, each complete or absent, so that an interrupted pass continues at the next missing one.

The module must not import drafters or the training loop.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from headstart.formats import TargetInfo
from headstart.formats.disk import sync
from headstart.training.dataset import Dataset
from headstart.training.feature_store import MANIFEST, Manifest, Store, shard_file, shard_key, texts_digest
from headstart.training.features import Online

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD_TOKENS = 16_384  # a shard is at most 1 GiB with four layers of 8,192 in bfloat16
BATCH_TOKENS = 8_192  # of one forward, with padding


class Writer:
    """Writes the features of a dataset into a folder.

    online: computes them.
    target: description of the model.
    length: tokens of a text at most. data: names of the files of the texts.
    """

    def __init__(
        self, folder: Path, online: Online, dataset: Dataset, target: TargetInfo, length: int, data: Sequence[str] = ()
    ) -> None:  # fmt: skip
        self.folder, self.online, self.dataset = folder, online, dataset
        self.shards = shard_indices(dataset)
        self.manifest = Manifest(
            target=target,
            dtype=str(online.model.dtype).removeprefix("torch."),
            layers=online.layers,
            texts=texts_digest(dataset.texts),
            length=length,
            shards=tuple(map(len, self.shards)),
            num_tokens=sum(len(text.tokens) for text in dataset.texts),
            data=tuple(data),
        )

    def fill(self, accelerator: Accelerator, report: Callable[[str], None]) -> Store:
        """Compute and write what is missing, each process its share; returns the store.

        report: prints a sentence, on the main process.
        Raises ValueError for a folder with something else in it, and where the disk has not enough room, before anything is
        computed; shards that are there stay in every case.
        """
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                self.claim()
        missing = self.missing()
        report(self.announcement(missing))
        self._check_room(missing)
        accelerator.wait_for_everyone()
        for done, number in enumerate(self._mine(missing, accelerator)):
            report(f"features: shard {done * accelerator.num_processes + 1} of {len(missing)}")
            self.write(number)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.finish()
        accelerator.wait_for_everyone()
        return Store(self.folder, self.manifest)

    def claim(self) -> None:
        """Mark a new folder as this store, or check that it is. Raises ValueError for a folder of something else."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / MANIFEST).exists():
                if any(self.folder.iterdir()):
                    raise ValueError(f"features folder {self.folder} holds other things and no {MANIFEST}; name a new folder")
                self._write_manifest(self.manifest)
            for leftover in self.folder.glob(".shard-*"):  # of a killed process
                leftover.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"features folder {self.folder} cannot be used: {error.strerror}") from None
        if (difference := Manifest.read(self.folder).difference(self.manifest)) is not None:
            raise ValueError(f"features in {self.folder} are of another run: {difference}; name another folder, or delete it")

    def missing(self) -> list[int]:
        """Numbers of the shards that are not written."""
        return [number for number in range(len(self.shards)) if not shard_file(self.folder, number).is_file()]

    def announcement(self, missing: Sequence[int]) -> str:
        """A sentence that says how much room the store takes, and how much of it is still to be written."""
        manifest = self.manifest
        return (
            f"features: {sum(manifest.shards):,} texts of {manifest.num_tokens:,} tokens, {len(manifest.layers)} layers of "
            f"{manifest.target.hidden:,} in {manifest.dtype}: {_gib(manifest.num_bytes)} GiB in {self.folder}, of which "
            f"{_gib(self._num_bytes(missing))} are still to be written and {_gib(shutil.disk_usage(self.folder).free)} are free"
        )

    def write(self, number: int) -> None:
        """Compute and write one shard."""
        texts = [self.dataset.texts[index] for index in self.shards[number]]
        states = torch.cat([state for _, state in sorted(self._states(self.shards[number]), key=lambda entry: entry[0])])
        tensors = {
            "tokens": torch.tensor([token for text in texts for token in text.tokens], dtype=torch.int32),
            "loss_mask": torch.tensor([is_answer for text in texts for is_answer in text.mask], dtype=torch.uint8),
            "lengths": torch.tensor([len(text.tokens) for text in texts]),
            "states": states,
        }
        write_shard(self.folder, self.manifest, number, tensors)

    def finish(self) -> None:
        """Mark the store as complete."""
        self.manifest = self.manifest.model_copy(update={"is_complete": True})
        self._write_manifest(self.manifest)

    def _states(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yields the index of each text and its hidden states, [tokens, layers, hidden], in batches of similar length."""
        for batch in _batches(self.dataset, indices):
            states = self.online.states(self.dataset.pad(batch).tokens.to(self.online.model.device))
            stacked = torch.stack([states[layer] for layer in self.online.layers], 2).cpu()
            for row, index in enumerate(batch):
                yield index, stacked[row, : len(self.dataset.texts[index].tokens)]

    def _mine(self, missing: Sequence[int], accelerator: Accelerator) -> Iterator[int]:
        """This process's shards; afterwards forwards of its shortest text, while others run a model that is divided among all."""
        rank, processes = accelerator.process_index, accelerator.num_processes
        forwards = [
            sum(len(list(_batches(self.dataset, self.shards[number]))) for number in missing[other::processes])
            for other in range(processes)
        ]
        yield from missing[rank::processes]
        for _ in range(max(forwards) - forwards[rank]):
            self.online.states(self.dataset.masked_batch().tokens.to(self.online.model.device))

    def _num_bytes(self, shards: Sequence[int]) -> int:
        tokens = sum(len(self.dataset.texts[index].tokens) for number in shards for index in self.shards[number])
        return tokens * self.manifest.bytes_per_token

    def _check_room(self, missing: Sequence[int]) -> None:
        needed, free = self._num_bytes(missing), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"the features that are missing need {_gib(needed)} GiB in {self.folder}, where {_gib(free)} are free; make room, "
                "or name another folder"
            )

    def _write_manifest(self, manifest: Manifest) -> None:
        temporary = self.folder / f".{MANIFEST}.{os.getpid()}"
        temporary.write_text(manifest.model_dump_json(indent=2) + "\n")
        os.replace(temporary, self.folder / MANIFEST)
        sync(self.folder)


def write_shard(folder: Path, manifest: Manifest, number: int, tensors: dict[str, Tensor]) -> None:
    """Write a shard, whole or not at all. tensors: those of `feature_store`. Raises ValueError where the disk is full."""
    path = shard_file(folder, number)
    temporary = folder / f".{path.name}.{os.getpid()}"
    metadata = {"store": shard_key(manifest, number), "target": manifest.target.model_dump_json()}
    try:
        save_file(tensors, temporary, metadata)
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"features cannot be written to {folder}: {error}; what is there stays, so make room and start again"
        ) from None


def shard_indices(dataset: Dataset) -> list[list[int]]:
    """Indices of all texts, in order, divided into shards of at most `SHARD_TOKENS` tokens, or of one text."""
    shards: list[list[int]] = [[]]
    size = 0
    for index, text in enumerate(dataset.texts):
        if shards[-1] and size + len(text.tokens) > SHARD_TOKENS:
            shards.append([])
            size = 0
        shards[-1].append(index)
        size += len(text.tokens)
    return shards


def _batches(dataset: Dataset, indices: Sequence[int]) -> Iterator[list[int]]:
    """The texts of a shard, sorted by length, in batches of at most `BATCH_TOKENS` tokens with padding."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda index: len(dataset.texts[index].tokens)):
        if batch and (len(batch) + 1) * len(dataset.texts[index].tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.{1 if num_bytes >= 2**30 else 4}f}"
