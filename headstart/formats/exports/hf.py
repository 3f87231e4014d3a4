"""MTP modules stitched into a copy of their target's Hugging Face checkpoint, under their publishers' names.

The target's own weights stay as they are: their files are linked or copied, and the modules go into one more file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file

from headstart.formats.exports.base import CONFIG, WEIGHTS, Placed, Subject, TensorFile, write_json
from headstart.formats.exports.stitched_modules import family_of, model_settings, stitched
from headstart.formats.published import mtp
from headstart.formats.weights import Weights, beside, config_in, safe_in
from headstart.text.jsonl import read_object

MODULES, TRUNK = "model-mtp.safetensors", "model-target.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_BESIDE = (".json", ".jinja", ".model", ".txt", ".py")  # of a tokenizer, a template or a model's code
_LEFT_OUT = (CONFIG, INDEX, "conformance.json")


class HuggingFace:
    """A complete checkpoint with MTP modules, as transformers, vLLM and SGLang read it."""

    name: ClassVar[str] = "hf"
    reader: ClassVar[str] = "transformers 5.23 (use_mtp), and the checkpoints of the model's publishers"
    methods: ClassVar[tuple[str, ...]] = ("mtp",)
    instead: ClassVar[Mapping[str, str]] = {
        method: f"{method} heads are no part of a Hugging Face checkpoint, only MTP modules are; export them with --to vllm"
        for method in ("eagle", "eagle3", "medusa", "hydra", "mtp-parallel")
    }

    def check(self, subject: Subject) -> None:
        """Raise ValueError for a target whose checkpoint cannot have these modules, and for one without safetensors."""
        family_of(subject)
        model_settings(subject)
        source_weights(subject)

    def write(self, subject: Subject, staged: Path) -> list[Placed]:
        """Write the target's files, the modules' file, the index and the changed configuration."""
        weights, modules = source_weights(subject), TensorFile(MODULES)
        for tensor in stitched(subject, family_of(subject).naming):
            modules.put(tensor.ours, tensor.theirs, tensor.tensor, tensor.how)
        placed = modules.save(staged)
        files = _target_files(weights, staged) | {entry.theirs: MODULES for entry in placed}
        write_json(staged / INDEX, {"metadata": {"total_size": _total_size(staged)}, "weight_map": dict(sorted(files.items()))})
        folder = weights.files[0].parent
        write_json(staged / CONFIG, with_modules(read_object(folder / CONFIG), model_settings(subject)))
        for path in _files_beside(folder):
            shutil.copy(path, staged / path.name)
        return placed


def source_weights(subject: Subject) -> Weights:
    """The target's own safetensors. Raises ValueError where it has none on this machine."""
    folder = beside(subject.source)
    weights = safe_in(folder) if folder is not None else None
    if weights is None:
        raise ValueError(
            f"the target {subject.source} has no safetensors on this machine to stitch modules into; save it with save_pretrained "
            "and name its folder with --model"
        )
    return weights


def with_modules(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A model's `config.json` that declares modules, and no others. settings: its new keys."""
    inner = {name: value for name, value in (config.get("text_config") or config).items() if name not in mtp.COUNTS}
    changed = {**inner, **settings}
    return {**config, "text_config": changed} if config.get("text_config") else changed


def _target_files(weights: Weights, staged: Path) -> dict[str, str]:
    """Link or copy the target's files, without modules that it has already. Returns the file of every tensor, by name."""
    placed: dict[str, str] = {}
    for path in weights.files:
        own = Weights([path])
        names = [name for name in own.shapes if name not in old_modules(weights, config_in(path))]
        file = TRUNK if path.name == WEIGHTS else path.name
        if len(names) == len(own.shapes):
            _link(path, staged / file)
        elif names:
            save_file({name: own[name] for name in names}, staged / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
    return placed


def old_modules(weights: Weights, config: Mapping[str, Any]) -> frozenset[str]:
    """Names of the tensors of modules that a model has."""
    published = mtp.match(weights, config)
    return frozenset(published.head_tensors) if published is not None else frozenset()


def _link(path: Path, to: Path) -> None:
    """A second name for a file, or a copy where the disk is another one."""
    try:
        os.link(path.resolve(), to)
    except OSError:
        shutil.copy(path, to)


def _files_beside(folder: Path) -> Iterator[Path]:
    """The files of the tokenizer, the template and the model's code."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _BESIDE and path.name not in _LEFT_OUT and ".index." not in path.name:
            yield path


def _total_size(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors: their sizes without the headers, whose length is in the first 8 bytes."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total
