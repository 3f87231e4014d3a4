"""What a folder holds: our heads, heads of others, a model to be drafted for, or nothing known.

This file knows names of formats and of the tensors that tell them. It reads no weights and runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headstart.formats import native
from headstart.formats.description import is_native
from headstart.formats.published import eagle, eagle3, hydra, medusa, mtp
from headstart.formats.published.base import Published
from headstart.formats.target_info import model_option
from headstart.formats.weights import Weights, beside, config_in, safe_in, weights_in
from headstart.speculation.calibration import load_plan

METHODS: tuple[Callable[[Weights, Mapping[str, Any]], Published | None], ...] = (
    hydra.understand,
    medusa.understand,
    eagle3.understand,
    mtp.understand,
    eagle.understand,
)

# Formats that are known by name only: (kind, words, a pattern that one tensor's name fits, a pattern of the configuration's names).
NAMED = (
    ("redrafter", "ReDrafter heads", r"rnn_[uw]\.weight", r"recurrent_drafting"),
    ("dflash", "DFlash heads", r"(model\.)?hidden_norm\.weight", r"(?i)dflash|dspark"),
    ("eagle", "heads of EAGLE's kind", r"(model\.)?fusion_fc\.weight", r"Eagle|eagle"),
    ("mtp", "MTP modules", r"mtp\.fc\.weight|.*\.(eh_proj|mtp_layers\.0\.input_proj)\.weight", r"NextN|MTP"),
)


@dataclass(frozen=True)
class Detected:
    """What `detect` found.

    kind: "native", a method's name, "target" or "unknown". layout: in words. is_target: whether a whole model is there, perhaps
    with heads inside. target: the model that the heads were made for, by name. command: brings them in, None where nothing does.
    num_heads, num_layers, num_modules, hidden, vocab, draft_vocab, parameters: None where unknown; vocab of heads is also None
    where they have no projection of their own, draft_vocab where they can say all of it. notes, problems: sentences for a person.
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
    found = understand(weights, config) if weights else None
    if found is not None:
        return _published(path, found)
    return _named(weights, config) or _model(config, path) or _unknown(path)


def understand(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """Heads that can be brought in, or at least are named by a method of ours."""
    return next((found for method in METHODS if (found := method(weights, config))), None)


def inside(model: str | Path) -> Published | None:
    """Heads in the same files as a model, a folder or a hub id; None where there are none, or the files are not here.

    Only safetensors are looked at, and only their headers. Raises ValueError where they are damaged.
    """
    folder = beside(model)
    weights = None if folder is None else safe_in(folder)
    found = understand(weights, config_in(weights.files[0])) if weights else None
    return found if found is not None and found.has_trunk else None


def modules_lost(model: str | Path) -> str | None:
    """Where a model's configuration says that it has modules that its weights lack, and what to do: one sentence, else None."""
    folder = beside(model)
    said = mtp.declared_modules(config_in(folder)) if folder is not None else None
    if said is None or inside(model) is not None:
        return None
    return (
        f"its config.json says {said}, but there are no such modules in its weights: transformers leaves them out when it saves a "
        f"model; bring them in from the model that its makers publish: `headstart import ORIGINAL --target {model} --out FOLDER`"
    )


def published_in(path: str | Path) -> Published:
    """The heads of others in a folder or file. Raises ValueError, saying what it is instead, where there are none."""
    path = Path(path)
    if path.exists() and not is_native(config_in(path)):
        weights = weights_in(path)
        found = understand(weights, config_in(path)) if weights else None
        if found is not None:
            return found
    known = detect(path)
    if known.kind == "native":
        raise ValueError(f"{path} already holds native heads; use them with `--drafter {path}`")
    yet = " yet" if known.method else ""
    can = "heads of Medusa, Hydra and EAGLE and a model's MTP modules can"
    raise ValueError(f"{path} holds {known.layout}, which cannot be imported{yet}; {can}")


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
        parameters=_numbers(weights),
        target=described.target.name,
        command=f"headstart generate {model_option(described.target.name)}--drafter {path}",
        problems=tuple(filter(None, [_fault_of_plan(path)])),
    )


def _fault_of_plan(path: Path) -> str | None:
    """What is wrong with what was measured of our heads."""
    try:
        load_plan(path)
    except ValueError as error:
        return str(error)
    return None


def _published(path: Path, found: Published) -> Detected:
    problems = tuple(found.problems())
    target = str(path) if found.has_trunk else found.base
    return Detected(
        kind=found.method,
        layout=found.layout,
        is_target=found.has_trunk,
        method=found.method,
        num_heads=found.settings.get("num_heads"),
        num_layers=found.settings.get("num_layers"),
        num_modules=found.settings.get("num_modules"),
        hidden=found.hidden or None,
        vocab=found.vocab,
        draft_vocab=found.settings.get("draft_vocab"),
        parameters=found.parameters or None,
        target=target,
        command=None if problems else f"headstart import {path} --target {target or 'MODEL'} --out FOLDER",
        notes=found.notes,
        problems=problems,
    )


def _named(weights: Weights | None, config: Mapping[str, Any]) -> Detected | None:
    """Heads of methods that are known by name only. A model may have some inside."""
    names = weights.shapes if weights else {}
    said = " ".join(
        [*(config.get("architectures") or []), str(config.get("model_type")), str(config.get("speculators_model_type"))]
    )
    for kind, words, tensor, called in NAMED:
        if not (any(re.fullmatch(tensor, name) for name in names) or re.search(called, said)):
            continue
        is_target = _is_model(config) and any(re.search(r"layers\.1\.", name) for name in names)
        return Detected(
            kind=kind,
            layout=words + (" inside a whole model" if is_target else ""),
            is_target=is_target,
            method=kind,
            hidden=_number(config, "hidden_size"),
            vocab=_number(config, "vocab_size"),
            parameters=None if is_target or not weights else _numbers(weights),
            notes=("they cannot be imported yet",),
        )
    return None


def _is_model(config: Mapping[str, Any]) -> bool:
    return "model_type" in config or "architectures" in config


def _model(config: Mapping[str, Any], path: Path) -> Detected | None:
    """A model by its configuration; whether it can be a target is for the one who loads it to say."""
    if not _is_model(config):
        return None
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else config.get("model_type")
    return Detected(
        kind="target",
        layout=f"a model ({architecture})",
        is_target=True,
        hidden=_number(config, "hidden_size"),
        notes=tuple(filter(None, [modules_lost(path)])),
    )


def _unknown(path: Path) -> Detected:
    return Detected(kind="unknown", layout="nothing that is known", notes=(f"{path} has neither a model's config.json nor heads",))


def _numbers(weights: Weights) -> int:
    return sum(torch.Size(shape).numel() for shape in weights.shapes.values())


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) else None
