"""MTP modules as tensors under their publishers' names: the inverse of `headstart.formats.published.mtp`. Must not write files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstart.drafters.parts.decoder import decoder
from headstart.formats.exports.base import RENAMED
from headstart.formats.published.layer_tensors import LAYER
from headstart.formats.published.mtp import COUNTS, NAMINGS, Naming, layer_settings

if TYPE_CHECKING:
    from headstart.formats.exports.base import Subject

COUNT = "num_nextn_predict_layers"  # key of a configuration with the number of modules, in every family here
_AROUND = ("enorm", "hnorm", "eh_proj")
_LAYER_KINDS = {"layer_types": "mtp_layer_types", "mlp_layer_types": "mtp_mlp_layer_types"}  # of a module, and of the model's key


@dataclass(frozen=True)
class Family:
    """Models whose publishers ship MTP modules.

    naming: names of a module's tensors.
    readers: who reads such modules, for a person.
    most: the largest number of modules.
    """

    naming: Naming
    readers: str
    most: int = 16


_DEEPSEEK, _MIMO, _QWEN = NAMINGS
FAMILIES = {
    "deepseek_v3": Family(_DEEPSEEK, "transformers 5.23, vLLM 0.32 (deepseek_mtp), SGLang"),
    "glm4_moe": Family(_DEEPSEEK, "transformers 5.23, vLLM 0.32 (glm4_moe_mtp), SGLang, llama.cpp"),
    "mimo": Family(_MIMO, "vLLM 0.32 (mimo_mtp), SGLang", most=1),
    "mellum": Family(_QWEN, "transformers 5.23", most=1),
}


@dataclass(frozen=True)
class Stitched:
    """One tensor of a module under its publisher's name.

    ours: its name in native heads.
    theirs: its name in the model.
    how: as of `headstart.formats.exports.base.Placed`.
    """

    ours: str
    theirs: str
    tensor: Tensor
    how: str


def family_of(subject: Subject) -> Family:
    """The family of the target. Raises ValueError where none has modules like these, or they are not computed as these are."""
    model_type = str(subject.text_config.model_type)
    if (family := FAMILIES.get(model_type)) is None:
        raise ValueError(
            f"MTP modules of a {model_type!r} target cannot be stitched into its checkpoint: no engine reads modules in a model of "
            f"that type, only in models of type {', '.join(sorted(FAMILIES))}; export EAGLE-3 heads, or use the modules here"
        )
    config = subject.config
    if config.num_modules > family.most:
        raise ValueError(
            f"these heads have {config.num_modules} modules, and a {model_type!r} model has at most {family.most}; train them with "
            f"--set num_modules={family.most}"
        )
    if config.hidden_first != family.naming.hidden_first:
        right = str(family.naming.hidden_first).lower()
        raise ValueError(
            f"hidden_first is {str(config.hidden_first).lower()}, but modules of a {model_type!r} model are computed with {right}, "
            f"whatever their files say; train them with --set hidden_first={right}"
        )
    return family


def model_settings(subject: Subject) -> dict[str, Any]:
    """What the target's `config.json` says of these modules, by its keys.

    Raises ValueError where a module's layer is not the one that readers of the checkpoint build.
    """
    count = int(subject.config.num_modules)
    settings: dict[str, Any] = {COUNT: count}
    own = _layer_config(subject.config.block, subject.target_info.hidden)
    for name, key in _LAYER_KINDS.items():
        if hasattr(subject.text_config, key) and own.get(name):
            settings[key] = [own[name][-1]] * count
    config = copy.deepcopy(subject.model.config)
    for key, value in settings.items():
        setattr(config.get_text_config(), key, value)
    expected = _layer_config(layer_settings(config), subject.target_info.hidden)
    if wrong := sorted(key for key in own.keys() | expected.keys() if own.get(key) != expected.get(key)):
        raise ValueError(
            f"a module's layer has {wrong[0]} = {own.get(wrong[0])!r}, and readers of a checkpoint build one with "
            f"{expected.get(wrong[0])!r}, like the target's last layer; train modules without --set block"
        )
    return settings


def stitched(subject: Subject, naming: Naming) -> Iterator[Stitched]:
    """Yields the tensors of all modules under their publishers' names, experts one by one."""
    first = naming.first(int(subject.text_config.num_hidden_layers))
    heads: Any = subject.heads
    for module, stage in enumerate(heads.stages):
        prefix, ours = naming.stage.format(first + module), f"stages.{module}."
        for part in _AROUND:
            name = f"{ours}{part}.weight"
            yield Stitched(name, f"{prefix}{getattr(naming, part)}.weight", subject.tensors[name], RENAMED)
        norm = f"{ours}block.norm.weight"
        yield Stitched(norm, f"{prefix}{naming.norm}.weight", subject.tensors[norm], RENAMED)
        yield from _layer(stage.block, subject.tensors, f"{ours}block.", prefix + naming.layer)


def _layer(block: Any, tensors: Mapping[str, Tensor], ours: str, theirs: str) -> Iterator[Stitched]:
    """The tensors of a module's layer. ours, theirs: prefixes of the decoder's and of the layer's names."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensors[ours + name] for name in block.state_dict() if name.startswith(LAYER)}
    for name, tensor in revert_weight_conversion(block, state).items():
        if name in state:
            yield Stitched(ours + name, theirs + name.removeprefix(LAYER), tensor, RENAMED)
        else:
            kind = "down_proj" if "down_proj" in name else "gate_up_proj"
            source = next(each for each in state if each.startswith(_fused(name)) and kind in each)
            yield Stitched(ours + source, theirs + name.removeprefix(LAYER), tensor.contiguous(), "derived: one expert's part")


def _fused(name: str) -> str:
    """The prefix of the fused tensors of an expert's one: layers.0.mlp.experts.3.down_proj.weight -> layers.0.mlp.experts."""
    return name[: name.index(".experts.") + len(".experts.")]


def _layer_config(settings: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """What decides how a module's layer computes, without what a model says of its modules."""
    with torch.device("meta"):
        config = decoder(settings, hidden).config.to_dict()
    return {name: value for name, value in config.items() if not name.startswith("mtp_") and name not in COUNTS}
