"""An export's files against its `conformance.json`, and against the heads that are made of them when they are imported again.

Must not run an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.formats.exports.base import AS_IT_IS, RENAMED, sha256
from headstart.formats.exports.record import CONFORMANCE, read_record
from headstart.formats.weights import PICKLES, Weights

READABLE = (".safetensors", *PICKLES)  # GGUF files are read under other names than they hold
WITH_TARGET = ("hf",)  # engines for which the target's own checkpoint is written too


def manifest_in(folder: Path) -> dict[str, Any]:
    """The manifest of an export. Raises ValueError for a folder without one, and for one that lacks its keys."""
    manifest = read_record(folder) if folder.is_dir() else None
    if manifest is None:
        raise ValueError(f"{folder} is no export of headstart: it has no {CONFORMANCE}; make one with `headstart export`")
    if missing := [key for key in ("engine", "reader", "method", "target", "chain", "tensors") if key not in manifest]:
        raise ValueError(f"{folder / CONFORMANCE} lacks {missing[0]!r}; export the heads again")
    return manifest


def file_errors(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is not as the manifest says, one sentence each: tensors that are missing, changed, or more than it names."""
    errors: list[str] = []
    for name in sorted({entry["file"] for entry in manifest["tensors"]}):
        entries = {entry["theirs"]: entry for entry in manifest["tensors"] if entry["file"] == name}
        if not (folder / name).is_file():
            errors.append(f"{name} is missing, with {len(entries)} tensors")
        elif (folder / name).suffix in READABLE:
            errors += _tensor_errors(Weights([folder / name]), name, entries, is_whole=manifest["engine"] not in WITH_TARGET)
    return errors


def unread(manifest: Mapping[str, Any]) -> list[str]:
    """The files that `file_errors` does not open."""
    return sorted({entry["file"] for entry in manifest["tensors"] if Path(entry["file"]).suffix not in READABLE})


def _tensor_errors(weights: Weights, file: str, entries: Mapping[str, Any], is_whole: bool) -> Iterator[str]:
    """is_whole: whether the file holds nothing else."""
    for name, entry in entries.items():
        if name not in weights.shapes:
            yield f"{file} lacks {name}"
        elif sha256(weights[name]) != entry["sha256"]:
            yield f"{file} has other numbers in {name} than were written"
    if is_whole and (extra := sorted(weights.shapes.keys() - entries.keys())):
        yield f"{file} has {len(extra)} tensors that the manifest does not name, first {extra[0]}"


def import_errors(heads: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Where heads that were imported from the export differ from those that were exported, one sentence each.

    heads: folder of native heads.
    """
    weights = Weights([heads / "model.safetensors"])
    entries = {entry["ours"]: entry for entry in manifest["tensors"] if entry["ours"] is not None}
    errors = [f"imported again, the heads lack {name}" for name in entries if name not in weights.shapes]
    for name in sorted(weights.shapes.keys() & entries.keys()):
        if entries[name]["how"] in (AS_IT_IS, RENAMED) and _hash(weights[name], entries[name]["dtype"]) != entries[name]["sha256"]:
            errors.append(f"imported again, {name} has other numbers than were written")
    return errors + [
        f"imported again, the heads have {name}, which was not exported" for name in sorted(weights.shapes.keys() - entries.keys())
    ]


def _hash(tensor: Tensor, dtype: str) -> str:
    """The hash of a tensor in the dtype in which it was written: some formats want norms in float32, whatever they were."""
    return sha256(tensor.to(getattr(torch, dtype)))


def imported(folder: Path, engine: str, model: str | None, out: Path, trust_remote_code: bool) -> Path:
    """Native heads in `out`, imported from an export for an engine. Raises ValueError where they cannot be imported.

    model: their target; None: the embedded one, or the one in the export.
    """
    from headstart.formats.importing import import_heads
    from headstart.target.loading import embedded

    target = model or (None if engine in WITH_TARGET else str(embedded("target")))
    import_heads(str(folder), target, str(out), trust_remote_code=trust_remote_code)
    return out
