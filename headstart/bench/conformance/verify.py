"""`verify-export` as a function: an export's files, its heads imported again, and the engine beside this one, round by round."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headstart.bench.conformance import ours, vllm_process
from headstart.bench.conformance.manifest import file_errors, import_errors, imported, manifest_in, unread
from headstart.bench.conformance.rounds import Comparison, Decoded, compare
from headstart.formats.exports.launch import launch_command
from headstart.target.loading import embedded

VLLM_READS = ("vllm", "speculators")  # engines whose folders vLLM reads
OPTION = "--speculative-config"


@dataclass(frozen=True)
class Verification:
    """What was found of an export.

    folder, method, engine: of the export.
    reader: engine and version that it was written against.
    tensors: number of tensors that it names.
    errors: what is not as its manifest says, one sentence each.
    expected: acceptance by position that it promises; None: none.
    version: of the engine that decoded; None: none did.
    comparison: of its answers with this engine's; None: it did not decode.
    notes: what was not checked and why, one sentence each.
    """

    folder: str
    method: str
    engine: str
    reader: str
    tensors: int
    errors: tuple[str, ...]
    expected: tuple[float, ...] | None = None
    version: str | None = None
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether nothing differs, as far as it was checked."""
        return not self.errors and (self.comparison is None or self.comparison.is_equal)

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return asdict(self) | {"is_right": self.is_right}


def verify(folder: str | Path, plan: ours.Plan, python: str | None = None) -> Verification:
    """Compare an export with its manifest, with the heads that it was made of, and with what its engine makes of it.

    plan: what both engines decode; its `drafts` are replaced by the manifest's chain where they are None.
    python: that has the engine; None: this one.
    Raises ValueError for a folder that is no export, for one that cannot be imported, and where the engine fails.
    """
    folder, python = Path(folder), python or sys.executable
    manifest = manifest_in(folder)
    errors = file_errors(folder, manifest)
    notes = [f"{name} was compared only as the heads that are imported from it" for name in unread(manifest)]
    found = Verification(
        folder=str(folder),
        method=manifest["method"],
        engine=manifest["engine"],
        reader=manifest["reader"],
        tensors=len(manifest["tensors"]),
        errors=tuple(errors),
        expected=None if manifest.get("acceptance") is None else tuple(manifest["acceptance"]),
        notes=tuple(notes),
    )
    if errors:
        return found
    with tempfile.TemporaryDirectory(prefix="headstart-verify-") as temporary:
        heads = imported(folder, found.engine, plan.model, Path(temporary) / "heads", plan.trust_remote_code)
        found = replace(found, errors=tuple(import_errors(heads, manifest)))
        version, note = _engine(manifest, python)
        if version is None or found.errors:
            return replace(found, notes=(*notes, *([note] if note else [])))
        plan = replace(plan, drafts=plan.drafts or int(manifest["chain"]))
        comparison = against_vllm(plan, heads, speculation(manifest, folder, plan.drafts or 0), python)
    return replace(found, version=version, comparison=comparison)


def _engine(manifest: Mapping[str, Any], python: str) -> tuple[str | None, str]:
    """The version of the engine that can decode, or None and why."""
    engine, method = manifest["engine"], manifest["method"]
    if engine not in VLLM_READS:
        return None, f"{engine} was not run: only vLLM can be, so the files alone were checked, against {manifest['reader']}"
    if method == "mtp":
        return None, "vLLM was not run: modules inside a whole model are compared as files only"
    version = vllm_process.version(python)
    return version, "" if version else f"vLLM was not run: {python} has none; name the Python that has it with --python"


def speculation(manifest: Mapping[str, Any], folder: str | Path, drafts: int) -> dict[str, Any]:
    """vLLM's `speculative_config`, as the export's own launch command has it, with one length of chains for all batches."""
    command = launch_command(manifest["engine"], {**manifest, "chain": drafts, "chain_by_batch": None}, "MODEL", str(folder))
    config: dict[str, Any] = json.loads(command[command.index(OPTION) + 1])
    return config


def against_vllm(
    plan: ours.Plan, heads: str | Path, config: Mapping[str, Any], python: str, settings: Mapping[str, Any] | None = None
) -> Comparison:
    """vLLM's answers and ours, with the same heads.

    heads: folder of native heads.
    config: vLLM's `speculative_config`.
    settings: further arguments of `vllm.LLM`.
    Raises ValueError where vLLM fails.
    """
    prompts, mine = ours.decode(plan, heads)
    return compare(mine, vllm_answers(plan, prompts, config, python, settings), plan.drafts or 0)


def vllm_answers(
    plan: ours.Plan,
    prompts: Sequence[Sequence[int]],
    config: Mapping[str, Any] | None,
    python: str,
    settings: Mapping[str, Any] | None = None,
) -> list[Decoded]:
    """vLLM's answers in fp32. Arguments as for `against_vllm`; config: None: plain decoding."""
    job = vllm_process.Job(
        model=plan.model or str(embedded("target")),
        prompts=prompts,
        max_tokens=plan.max_tokens,
        speculation=config,
        threads=torch.get_num_threads(),
        settings=settings or {},
    )
    return [Decoded(tuple(one["tokens"]), tuple(one["rounds"])) for one in vllm_process.answers(python, job)]
