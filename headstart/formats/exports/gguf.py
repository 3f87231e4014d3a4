"""Heads for llama.cpp: EAGLE-3 as a draft model of its own beside its target, MTP modules inside their target.

Read in the llama-cpp-python 0.3.36 source package: `src/models/eagle3.cpp`, `src/models/glm4-moe.cpp`, `common/speculative.cpp` and
`conversion/`. Files: `draft.gguf` and `model.gguf`, or `model.gguf` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from headstart.formats import gguf_file
from headstart.formats.exports import gguf_model
from headstart.formats.exports.base import RENAMED, Placed, Subject
from headstart.formats.exports.gguf_vocab import ByteLevelVocabulary, vocabulary
from headstart.formats.exports.hf import old_modules, source_weights
from headstart.formats.exports.stitched_modules import Stitched, family_of, model_settings, stitched
from headstart.formats.gguf_file import Entry, Value
from headstart.formats.gguf_names import (
    EAGLE3,
    HEADS,
    IDS,
    ROPE_FACTORS,
    ROPE_SETTINGS,
    Architecture,
    expert_of,
    heads_of,
    interleave,
)
from headstart.formats.weights import DRAFT_GGUF, MODEL_GGUF, config_in
from headstart.target.tokenizer_loading import load_tokenizer

_ORDER = "derived: rows of queries and keys in llama.cpp's order"
_WIDE = "derived: as float32"
_STACK = "derived: one part of all experts"
_INSIDE = "block.layers.0."
_MODULES = 1  # the most that llama.cpp runs


class Gguf:
    """EAGLE-3 heads and MTP modules for llama.cpp."""

    name: ClassVar[str] = "gguf"
    reader: ClassVar[str] = "the llama.cpp of the llama-cpp-python 0.3.36 source package"
    methods: ClassVar[tuple[str, ...]] = ("eagle3", "mtp")
    instead: ClassVar[Mapping[str, str]] = {}

    def check(self, subject: Subject) -> None:
        """Raise ValueError for heads that llama.cpp would run otherwise, and for a target or tokenizer that it would."""
        gguf_file.import_gguf()
        _check_eagle3(subject) if subject.method == "eagle3" else _check_mtp(subject)
        _vocabulary(subject)

    def write(self, subject: Subject, staged: Path) -> list[Placed]:
        """Write the draft model and the target, or the target with its modules."""
        return _write_eagle3(subject, staged) if subject.method == "eagle3" else _write_mtp(subject, staged)


# -- EAGLE-3 --


def _check_eagle3(subject: Subject) -> None:
    config, layers = subject.config, subject.target_info.layers
    for fault, way in _faults(config, layers):
        raise ValueError(f"{fault}; train heads with {way}")
    architecture = gguf_model.architecture_of(subject.text_config)
    if not architecture.has_taps:
        raise ValueError(
            f"llama.cpp's {architecture.name} does not give the inputs of its layers, which EAGLE-3 heads read; export MTP modules"
        )
    source_weights(subject)


def _faults(config: Any, layers: int) -> Iterator[tuple[str, str]]:
    """(what llama.cpp lacks, options of a training without it) of EAGLE-3 heads."""
    three = f"--set taps=[1,{layers // 2 - 1},{layers - 4}]" if layers >= 8 else "--set taps=[...] of three layers"
    plain = "--set fc_norm=false --set norm_output=false"
    if config.fc_norm:
        yield "fc_norm is true, and llama.cpp has no norm for each tap (EAGLE 3.1)", f"{plain} {three}"
    if config.norm_output:
        yield "norm_output is true, and llama.cpp's next layer input is the state before the norm (EAGLE 3.1)", f"{plain} {three}"
    if len(config.taps) != 3:
        yield f"these heads read {len(config.taps)} layers of the target, and llama.cpp exactly 3", three
    if layers - 1 in config.taps:
        yield f"these heads read layer {layers - 1}, the target's last, whose output llama.cpp does not give", three
    if config.fc_bias:
        yield "fc_bias is true, and llama.cpp's projection has no bias", "--set fc_bias=false"
    if config.context is not None:
        yield f"these heads draft up to position {config.context} only, a limit that llama.cpp lacks", "--set context=null"
    yield from _layer_faults(config.block)


def _layer_faults(block: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    plain = {"model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    rope = (block.get("rope_parameters") or {}).get("rope_type", "default")
    for name, only in plain.items():
        if (value := block.get(name, only)) != only:
            yield f"{name} of their layer is {value!r}, and llama.cpp's is {only!r}", "a Llama layer, as without --set block"
    if rope not in gguf_model.ROPE_TYPES:
        yield f"the positions of their layer are of type {rope!r}, which are not written here", "a layer with plain positions"


def _write_eagle3(subject: Subject, staged: Path) -> list[Placed]:
    layer = subject.heads.block.config  # type: ignore[union-attr]
    tokens = _vocabulary(subject)
    pairs = list(_draft_tensors(subject, layer))
    entries = [Entry.of(placed.theirs, tensor) for placed, tensor in pairs]
    if (factors := gguf_model.rope_factors(layer)) is not None:
        entries.append(Entry.of(ROPE_FACTORS, factors))
    gguf_file.write(staged / DRAFT_GGUF, EAGLE3, _draft_fields(subject, layer), tokens, entries)
    weights = source_weights(subject)
    architecture = gguf_model.architecture_of(subject.text_config)
    own = old_modules(weights, config_in(weights.files[0]))
    tensors = [source for source in gguf_model.sources(weights) if source.name not in own]
    _write_model(subject, staged, architecture, tensors, subject.target_info.layers, tokens)
    return [placed for placed, _ in pairs]


def _draft_fields(subject: Subject, layer: Any) -> dict[str, Value]:
    config = subject.config
    own = {**gguf_model.fields(layer, 1), "%s.vocab_size": subject.target_info.vocab}
    if (rope := dict(layer.rope_parameters)).get("rope_type", "default") != "default":
        own[ROPE_SETTINGS] = json.dumps(rope)
    return {
        **own,
        "general.name": f"EAGLE-3 heads of {subject.target_info.name}",
        "%s.target_layers": [tap + 1 for tap in config.taps],  # inputs of layers, where ours are outputs
        "%s.target_hidden_size": subject.target_info.hidden,
        "%s.norm_before_residual": config.norm_before_residual,
        "%s.norm_before_fc": config.norm_before_fc,
    }


def _draft_tensors(subject: Subject, layer: Any) -> Iterator[tuple[Placed, Tensor]]:
    """Yields the tensors of the heads as llama.cpp has them, and what became of each."""
    for ours, tensor in subject.tensors.items():
        if ours == "ids":
            yield Placed.of(ours, IDS, DRAFT_GGUF, tensor), tensor
            continue
        theirs = HEADS.to_gguf(_published_name(ours))
        yield _as_written(ours, theirs, DRAFT_GGUF, tensor, heads_of(ours, layer.num_attention_heads, layer.num_key_value_heads))


def _published_name(ours: str) -> str:
    """SafeAILab's name of a tensor of EAGLE-3 heads."""
    return ours.replace(_INSIDE, "midlayer.").replace("embedding.", "embed_tokens.")


def _as_written(ours: str, theirs: str, file: str, tensor: Tensor, heads: int | None) -> tuple[Placed, Tensor]:
    dtype = gguf_model.written_dtype(theirs, tensor.dim(), tensor.dtype)
    how = _ORDER if heads is not None else _WIDE if dtype is not tensor.dtype else RENAMED
    written = (tensor if heads is None else interleave(tensor, heads)).to(dtype).contiguous()
    return Placed.of(ours, theirs, file, written, how), written


# -- MTP modules --


def _check_mtp(subject: Subject) -> None:
    architecture = gguf_model.architecture_of(subject.text_config)
    if not architecture.has_modules:
        raise ValueError(
            f"llama.cpp has no MTP modules in its architecture {architecture.name}, only in a few, of which glm4moe can be written "
            "here; export EAGLE-3 heads"
        )
    family_of(subject)
    model_settings(subject)
    if subject.config.num_modules > _MODULES:
        raise ValueError(
            f"these heads have {subject.config.num_modules} modules, and llama.cpp runs one; train them with --set num_modules=1"
        )
    source_weights(subject)


def _write_mtp(subject: Subject, staged: Path) -> list[Placed]:
    architecture, weights = gguf_model.architecture_of(subject.text_config), source_weights(subject)
    own = old_modules(weights, config_in(weights.files[0]))
    tensors = [source for source in gguf_model.sources(weights) if source.name not in own]
    modules = [*stitched(subject, family_of(subject).naming)]
    placed = [_placed(architecture, name, group) for name, group in _by_stack(modules)]
    tensors += [gguf_model.Source.of(module.theirs, module.tensor) for module in modules]
    blocks = subject.target_info.layers + int(subject.config.num_modules)
    _write_model(subject, staged, architecture, tensors, blocks, _vocabulary(subject))
    return placed


def _by_stack(modules: Sequence[Stitched]) -> Iterator[tuple[str, list[Stitched]]]:
    """Yields a published name and its tensor, or the name of a layer's stack of experts and their tensors in its order."""
    stacks: dict[str, list[tuple[int, Stitched]]] = {}
    for module in modules:
        if (expert := expert_of(module.theirs)) is None:
            yield module.theirs, [module]
        else:
            stacks.setdefault(expert[0], []).append((expert[1], module))
    for name, numbered in stacks.items():
        yield name, [module for _, module in sorted(numbered, key=itemgetter(0))]


def _placed(architecture: Architecture, name: str, group: Sequence[Stitched]) -> Placed:
    """Where one tensor, or those of a stack of experts, went."""
    is_stack, theirs = ".experts." in name, architecture.to_gguf(name)
    tensor = torch.stack([module.tensor for module in group]) if is_stack else group[0].tensor
    dtype = gguf_model.written_dtype(theirs, tensor.dim(), tensor.dtype)
    how = _STACK if is_stack else _WIDE if dtype is not tensor.dtype else RENAMED
    return Placed.of(group[0].ours, theirs, MODEL_GGUF, tensor.to(dtype), how)


# -- the target --


def _write_model(
    subject: Subject,
    staged: Path,
    architecture: Architecture,
    tensors: list[gguf_model.Source],
    blocks: int,
    tokens: ByteLevelVocabulary,
) -> None:
    """Write the target. blocks: its layers and those of its modules."""
    config = subject.text_config
    fields = {**gguf_model.fields(config, blocks), "general.name": subject.target_info.name}
    if modules := blocks - subject.target_info.layers:
        fields["%s.nextn_predict_layers"] = modules
    entries = gguf_model.entries(architecture, config, tensors, subject.dtype)
    gguf_file.write(staged / MODEL_GGUF, architecture.name, fields, tokens, entries)


def _vocabulary(subject: Subject) -> ByteLevelVocabulary:
    return vocabulary(source_weights(subject).files[0].parent, load_tokenizer(subject.source), subject.text_config)
