"""Exporting native heads: checked for what the engine would lose, written in its format, with a launch command and a report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from headstart.formats import native
from headstart.formats.exports import exporter_for
from headstart.formats.exports.base import AS_IT_IS, DERIVED, RENAMED, Exporter, Placed, Subject, write_json
from headstart.formats.exports.chain_plan import ChainPlan, plan_chains
from headstart.formats.exports.launch import launch_command, launch_notes
from headstart.formats.exports.readme import readme
from headstart.formats.exports.record import CONFORMANCE, FILES, FORMAT, VERSION
from headstart.formats.exports.staging import README, require_export_or_empty, staged_folder
from headstart.formats.target_info import EMBEDDED, describe_target, model_option
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import embedded, load_model
from headstart.target.tokenizer_loading import load_tokenizer

DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_heads(
    folder: str | Path,
    target: str | None,
    engine: str,
    out: str | Path,
    dtype: str = "stored",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write native heads in an engine's format, and return a summary for printing or JSON.

    folder: of the heads.
    target: folder or hub id of the model that they draft for; None: the embedded one.
    engine: as `--to` takes it.
    out: folder to write, which is new, empty, or an earlier export.
    dtype: of the exported heads, as "bfloat16"; "stored": as they are.
    Raises ValueError, before anything is written, for what the engine would drop, ignore or change silently, for heads of another
    target, and for a folder that holds something else; and where the folder cannot be written, which is then as it was before.
    """
    folder, out, source = Path(folder), Path(out), target or str(embedded("target"))
    exporter = exporter_for(engine, native.describe(folder).method)
    require_export_or_empty(out)
    model = load_model(source, "auto", "cpu", trust_remote_code)
    target_info = describe_target(model, load_tokenizer(source, trust_remote_code))
    heads = native.load(folder, target_info).bind(EmbedHead(model))
    plan = plan_chains(folder, heads.depth, f"headstart tune HEADS {model_option(target_info.name)}".strip())
    subject = Subject(heads, target_info, model, source, _dtype(dtype), plan.length)
    exporter.check(subject)
    with staged_folder(out) as staged:
        placed = exporter.write(subject, staged)
        report = _report(exporter, subject, plan, placed, out)
        (staged / README).write_text(readme(report), encoding="utf-8")
        report[FILES] = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
        write_json(staged / CONFORMANCE, report)
    return _summary(report, out)


def _dtype(name: str) -> torch.dtype | None:
    """The dtype of a name; None for "stored". Raises ValueError for another name."""
    if name not in DTYPES:
        raise ValueError(f"--dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _report(exporter: Exporter, subject: Subject, plan: ChainPlan, placed: Sequence[Placed], out: Path) -> dict[str, Any]:
    """The content of `conformance.json`."""
    target = subject.target_info
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "engine": exporter.name,
        "reader": exporter.reader,
        "method": subject.method,
        "target": target.name,
        "digest": target.digest,
        "settings": subject.config.model_dump(mode="json"),
        "chain": plan.length,
        "chain_by_batch": plan.by_batch,
        "chain_source": plan.source,
        "acceptance": plan.acceptance,
        "acceptance_source": plan.acceptance_source,
        "notes": launch_notes(exporter.name, subject.method),
        "tensors": [_entry(one, subject.dtype) for one in placed],
    }
    option = "" if target.name == EMBEDDED else f" --model {shlex.quote(subject.source)}"
    report["launch"] = shlex.join(launch_command(exporter.name, report, subject.source, str(out)))
    report["check"] = f"headstart verify-export {shlex.quote(str(out))}{option}"
    return report


def _entry(placed: Placed, dtype: torch.dtype | None) -> dict[str, Any]:
    """A tensor's entry. dtype: to which the heads were cast; None: they were not."""
    is_cast = dtype is not None and placed.how in (AS_IT_IS, RENAMED) and placed.dtype == str(dtype).removeprefix("torch.")
    return {**placed.as_dict(), **({"how": f"{DERIVED}cast to {placed.dtype}"} if is_cast else {})}


def _summary(report: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What the command prints."""
    kept = (
        "engine",
        "reader",
        "method",
        "target",
        "chain",
        "chain_source",
        "acceptance",
        "acceptance_source",
        "notes",
        "launch",
        "check",
    )
    tensors = report["tensors"]
    return {
        "out": str(out),
        "files": [*report[FILES], CONFORMANCE],
        "tensors": len(tensors),
        "derived": [f"{one['theirs']} ({one['how'].removeprefix(DERIVED)})" for one in tensors if one["how"].startswith(DERIVED)],
        **{name: report[name] for name in kept},
    }
