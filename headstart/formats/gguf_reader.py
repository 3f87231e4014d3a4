"""GGUF files of llama.cpp under the names and in the layout of Hugging Face: EAGLE-3 heads, and models with MTP modules.

The inverse of `headstart.formats.exports.gguf`. Floating-point tensors that llama.cpp wants in float32 come back in the dtype of
the file's matrices where that loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.formats.gguf_file import GgufFile
from headstart.formats.gguf_names import (
    ARCHITECTURES,
    EAGLE3,
    HEADS,
    IDS,
    ROPE_FACTORS,
    ROPE_SETTINGS,
    Architecture,
    deinterleave,
    expert_name,
    heads_of,
)

ARCHITECTURE = "gguf_architecture"  # key of the configurations that are made here
_SIZES = {
    "vocab_size": "%s.vocab_size",
    "max_position_embeddings": "%s.context_length",
    "hidden_size": "%s.embedding_length",
    "intermediate_size": "%s.feed_forward_length",
    "num_attention_heads": "%s.attention.head_count",
    "num_key_value_heads": "%s.attention.head_count_kv",
    "head_dim": "%s.attention.key_length",
    "rms_norm_eps": "%s.attention.layer_norm_rms_epsilon",
}
Readers = dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]


def readers(path: Path) -> Readers:
    """Shape and reader of every tensor, by Hugging Face's name; of one without such a name, by llama.cpp's.

    Raises ValueError, naming the file, for one that is damaged, and where the `gguf` package is missing.
    """
    file = GgufFile(path)
    heads = int(file.field("%s.attention.head_count", 1))
    kv_heads = int(file.field("%s.attention.head_count_kv", heads))
    architecture = _architecture(file)
    result: Readers = {}
    for stored, shape in file.shapes.items():
        if stored in (IDS, ROPE_FACTORS):
            continue
        name = (architecture.from_gguf(stored) if architecture else None) or stored
        count = heads_of(name, heads, kv_heads) if architecture and architecture.interleaved else None
        for ours, index in _experts(name, shape):
            result[ours] = (shape if index is None else shape[1:], partial(_read, file, stored, count, index))
    if IDS in file.shapes:
        result[IDS] = (file.shapes[IDS], partial(_offsets, file))
    return result


def config(path: Path) -> dict[str, Any]:
    """What a `config.json` would say, of what a file says. Raises ValueError as `readers` does."""
    file = GgufFile(path)
    sizes: dict[str, Any] = {name: file.field(key) for name, key in _SIZES.items() if file.field(key) is not None}
    sizes["rope_parameters"] = _rope(file)
    if file.architecture == EAGLE3:
        return {ARCHITECTURE: EAGLE3, **sizes, **_of_heads(file)}
    modules = int(file.field("%s.nextn_predict_layers", 0))
    kinds = [kind for kind, each in ARCHITECTURES.items() if each.name == file.architecture]
    return {
        ARCHITECTURE: file.architecture,
        **sizes,
        "model_type": kinds[0] if kinds else file.architecture,
        "num_hidden_layers": int(file.field("%s.block_count", 0)) - modules,
        **({"num_nextn_predict_layers": modules} if modules else {}),
    }


def _of_heads(file: GgufFile) -> dict[str, Any]:
    draft_vocab = {"draft_vocab_size": file.shapes[IDS][0]} if IDS in file.shapes else {}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": int(file.field("%s.block_count", 1)),
        "eagle_aux_hidden_state_layer_ids": [int(layer) for layer in file.field("%s.target_layers", [])],
        "target_hidden_size": file.field("%s.target_hidden_size"),
        "norm_before_residual": bool(file.field("%s.norm_before_residual", False)),
        "norm_before_fc": bool(file.field("%s.norm_before_fc", False)),
        **draft_vocab,
    }


def _rope(file: GgufFile) -> dict[str, Any]:
    """The RoPE settings. Raises ValueError where the file has only factors of them."""
    if (own := file.field(ROPE_SETTINGS)) is not None:
        settings: dict[str, Any] = json.loads(own)
        return settings
    if ROPE_FACTORS in file.shapes and file.architecture == EAGLE3:
        raise ValueError(
            f"the heads in {file.path} cannot be imported: of their positions it has factors only ({ROPE_FACTORS}); import them "
            "from the files that they were converted from"
        )
    kind = str(file.field("%s.rope.scaling.type", "none"))
    theta = {"rope_theta": file.field("%s.rope.freq_base", 10000.0)}
    if kind == "none":
        return {"rope_type": "default", **theta}
    return {"rope_type": kind, "factor": file.field("%s.rope.scaling.factor"), **theta}


def _architecture(file: GgufFile) -> Architecture | None:
    if file.architecture == EAGLE3:
        return HEADS
    return next((each for each in ARCHITECTURES.values() if each.name == file.architecture), None)


def _experts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int | None]]:
    """(name, index in the stack) of the experts' tensors that are stored as one, or (name, None)."""
    if ".experts." not in name:
        yield name, None
        return
    yield from ((expert_name(name, index), index) for index in range(shape[0]))


def _read(file: GgufFile, stored: str, heads: int | None, index: int | None) -> Tensor:
    tensor = file.narrowed(stored)
    if index is not None:
        return tensor[index]
    return tensor if heads is None else deinterleave(tensor, heads)


def _offsets(file: GgufFile) -> Tensor:
    """The draft vocabulary as published files have it: ids minus their indices, [draft vocab]."""
    ids = file[IDS]
    return ids - torch.arange(len(ids))
