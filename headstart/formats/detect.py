"""Detection of what a folder holds: native heads, published heads, a model, or nothing known. Must not read tensors' values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headstart.formats import native
from headstart.formats.description import is_native
from headstart.formats.exports.record import read_record
from headstart.formats.exports.restore import restored, without_made_anew
from headstart.formats.published import eagle, eagle3, hydra, medusa, mtp
from headstart.formats.published.base import Published
from headstart.formats.target_info import model_option
from headstart.formats.weights import Weights, beside, config_in, safe_in, weights_in
from headstart.speculation.heads_plan import load_plan

# One function per method that can be imported, tried in this order: each returns heads of its method, or None.
FORMATS: tuple[Callable[[Weights, Mapping[str, Any]], Published | None], ...] = (
    hydra.match,
    medusa.match,
    eagle3.match,
    mtp.match,
    eagle.match,
)

# Formats that are detected and cannot be imported: (kind, words, pattern of a tensor's name, pattern of the configuration's names).
DETECTED_ONLY = (
    ("redrafter", "ReDrafter heads", r"rnn_[uw]\.weight", r"recurrent_drafting"),
    ("dflash", "DFlash heads", r"(model\.)?hidden_norm\.weight", r"(?i)dflash|dspark"),
    ("eagle", "heads of EAGLE's kind", r"(model\.)?fusion_fc\.weight", r"Eagle|eagle"),
    ("mtp", "MTP modules", r"mtp\.fc\.weight|.*\.(eh_proj|mtp_layers\.0\.input_proj)\.weight", r"NextN|MTP"),
)


@dataclass(frozen=True)
class Detected:
    """What a folder or file holds. Numbers are None where they are unknown.

    kind: "native", a method's name, "target" or "unknown".
    layout: the format in words.
    is_target: whether it holds a complete model, perhaps with heads inside.
    method: the method of the heads; None: there are none.
    num_heads, num_layers, num_modules: how many heads, layers of a head, MTP modules.
    hidden: width of the hidden states.
    vocab: of the heads' own projection to logits; None also where they have none.
    draft_vocab: size of a reduced draft vocabulary; None also where they draft all tokens.
    parameters: number of parameters of the heads.
    target: name of the model that the heads were made for.
    command: the command that uses or imports the heads; None: no command does.
    notes, problems: sentences for a person; heads with problems cannot be used.
    """

    kind: str
    layout: str
    is_target: bool = False
    method: str | None = None
    num_heads: int | None = None
    num_layers: int | None = None
    num_modules: int | None = None
    hidden: int | None = None
    vocab: int | None = None
    draft_vocab: int | None = None
    parameters: int | None = None
    target: str | None = None
    command: str | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def detect(path: str | Path) -> Detected:
    """What a folder, or one file of weights, holds. Raises ValueError where it does not exist or its files are damaged."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a folder of heads or of a model")
    config = config_in(path)
    if is_native(config):
        return _native(path)
    weights = weights_in(path)
    published = match_format(weights, config) if weights else None
    if published is not None:
        return _published(path, published)
    return _detected_only(weights, config) or _model(config, path) or _unknown(path)


def match_format(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """Published heads of a method that this package has; None where there are none.

    They may still have problems that prevent importing them. Of an export of ours, its `conformance.json` is read too.
    config: content of the `config.json` beside the weights.
    """
    record = read_record(weights.files[0].parent)
    weights = weights if record is None else without_made_anew(weights, record)
    published = next((published for match in FORMATS if (published := match(weights, config))), None)
    return published if published is None or record is None else restored(published, record)


def inside(model: str | Path) -> Published | None:
    """Heads in the same files as a model; None where there are none, or the files are not on this machine.

    model: a folder or a hub id. Only the headers of its safetensors are read.
    Raises ValueError where they are damaged.
    """
    folder = beside(model)
    weights = None if folder is None else safe_in(folder)
    published = match_format(weights, config_in(weights.files[0])) if weights else None
    return published if published is not None and published.has_trunk else None


def modules_lost(model: str | Path) -> str | None:
    """One sentence where a model's configuration declares MTP modules that its weights lack, with what to do; else None.

    model: a folder or a hub id.
    """
    folder = beside(model)
    declared = mtp.declared_modules(config_in(folder)) if folder is not None else None
    if declared is None or inside(model) is not None:
        return None
    return (
        f"its config.json says {declared}, but its weights have no such modules: transformers leaves them out when it saves a "
        f"model; import them from the makers' model: `headstart import ORIGINAL --target {model} --out FOLDER`"
    )


def published_in(path: str | Path) -> Published:
    """The published heads in a folder or file. Raises ValueError, saying what it holds instead, where there are none."""
    path = Path(path)
    if path.exists() and not is_native(config_in(path)):
        weights = weights_in(path)
        published = match_format(weights, config_in(path)) if weights else None
        if published is not None:
            return published
    detected = detect(path)
    if detected.kind == "native":
        raise ValueError(f"{path} already holds native heads; use them with `--drafter {path}`")
    yet = " yet" if detected.method else ""
    can = "heads of Medusa, Hydra and EAGLE and a model's MTP modules can"
    raise ValueError(f"{path} holds {detected.layout}, which cannot be imported{yet}; {can}")


def _native(path: Path) -> Detected:
    described = native.describe(path)
    weights = Weights([path / native.WEIGHTS])
    settings = described.settings
    return Detected(
        kind="native",
        layout=f"{described.method} heads of headstart",
        method=described.method,
        num_heads=settings.get("num_heads"),
        num_layers=settings.get("num_layers"),
        num_modules=settings.get("num_modules"),
        hidden=described.target.hidden,
        vocab=described.target.vocab,
        draft_vocab=settings.get("draft_vocab"),
        parameters=_num_parameters(weights),
        target=described.target.name,
        command=f"headstart generate {model_option(described.target.name)}--drafter {path}",
        problems=tuple(filter(None, [_plan_error(path)])),
    )


def _plan_error(path: Path) -> str | None:
    """What is wrong with the `plan.json` of native heads, or None."""
    try:
        load_plan(path)
    except ValueError as error:
        return str(error)
    return None


def _published(path: Path, published: Published) -> Detected:
    problems = tuple(published.problems())
    target = str(path) if published.has_trunk else published.base
    return Detected(
        kind=published.method,
        layout=published.layout,
        is_target=published.has_trunk,
        method=published.method,
        num_heads=published.settings.get("num_heads"),
        num_layers=published.settings.get("num_layers"),
        num_modules=published.settings.get("num_modules"),
        hidden=published.hidden or None,
        vocab=published.vocab,
        draft_vocab=published.settings.get("draft_vocab"),
        parameters=published.parameters or None,
        target=target,
        command=None if problems else f"headstart import {path} --target {target or 'MODEL'} --out FOLDER",
        notes=published.notes,
        problems=problems,
    )


def _detected_only(weights: Weights | None, config: Mapping[str, Any]) -> Detected | None:
    """Heads of a format in `DETECTED_ONLY`, alone or inside a model; None where there are none."""
    names = weights.shapes if weights else {}
    called = " ".join(
        [*(config.get("architectures") or []), str(config.get("model_type")), str(config.get("speculators_model_type"))]
    )
    for kind, words, tensor_pattern, config_pattern in DETECTED_ONLY:
        if not (any(re.fullmatch(tensor_pattern, name) for name in names) or re.search(config_pattern, called)):
            continue
        is_target = _is_model(config) and any(re.search(r"layers\.1\.", name) for name in names)
        return Detected(
            kind=kind,
            layout=words + (" inside a whole model" if is_target else ""),
            is_target=is_target,
            method=kind,
            hidden=_integer(config, "hidden_size"),
            vocab=_integer(config, "vocab_size"),
            parameters=None if is_target or not weights else _num_parameters(weights),
            notes=("they cannot be imported yet",),
        )
    return None


def _is_model(config: Mapping[str, Any]) -> bool:
    return "model_type" in config or "architectures" in config


def _model(config: Mapping[str, Any], path: Path) -> Detected | None:
    """A model, judged by its configuration alone; whether it can be a target shows when it is loaded."""
    if not _is_model(config):
        return None
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    return Detected(
        kind="target",
        layout=f"a model ({name})",
        is_target=True,
        hidden=_integer(config, "hidden_size"),
        notes=tuple(filter(None, [modules_lost(path)])),
    )


def _unknown(path: Path) -> Detected:
    return Detected(kind="unknown", layout="nothing that is known", notes=(f"{path} has neither a model's config.json nor heads",))


def _num_parameters(weights: Weights) -> int:
    return sum(torch.Size(shape).numel() for shape in weights.shapes.values())


def _integer(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) else None
