"""What the exports of EAGLE-3 heads have in common: their tensors, their draft vocabulary, and the layers that they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headstart.formats.exports.base import Subject, TensorFile
from headstart.formats.exports.llama_block import layer_config, layer_names, llama_keys
from headstart.formats.published.taps import IDS, published_taps

OFFSETS, MASK = "d2t", "t2d"
SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def eagle3_tensors(subject: Subject, first_layer: str, has_mask: bool) -> TensorFile:
    """The tensors, in the names of their authors.

    first_layer: prefix of the first layer's names.
    has_mask: whether the mask of the draft vocabulary, `t2d`, is written beside the offsets.
    """
    file = TensorFile()
    renames = {"block.layers.0.": first_layer, "block.": "", "fc_norms.": "fc_norm.", "embedding.": "embed_tokens."}
    for ours, theirs in layer_names([name for name in subject.tensors if name != "ids"], renames).items():
        file.put(ours, theirs, subject.tensors[ours])
    ids = subject.tensors.get("ids")
    if ids is not None and is_reduced(subject):
        file.put("ids", OFFSETS, ids - torch.arange(len(ids)), "derived: each id minus its index")
        if has_mask:
            mask = torch.zeros(subject.target_info.vocab, dtype=torch.bool).index_fill(0, ids, True)
            file.put(None, MASK, mask, "derived: whether each of the target's tokens is in ids")
    return file


def is_reduced(subject: Subject) -> bool:
    """Whether the draft vocabulary is smaller than the target's."""
    return subject.config.draft_vocab not in (None, subject.target_info.vocab)


def eagle3_keys(subject: Subject) -> dict[str, Any]:
    """The keys of a Llama and those of EAGLE-3, without the layers that are read."""
    wide = {"target_hidden_size": subject.target_info.hidden} if is_wide(subject) else {}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **llama_keys(subject),
        "draft_vocab_size": subject.config.draft_vocab or subject.target_info.vocab,
        **wide,
        **switches(subject),
    }


def is_wide(subject: Subject) -> bool:
    """Whether the heads' layer has another width than the target."""
    return int(layer_config(subject).hidden_size) != subject.target_info.hidden


def switches(subject: Subject) -> dict[str, bool]:
    """The four booleans of EAGLE-3 and 3.1; all are written, since engines differ in what a missing one means."""
    return {name: bool(getattr(subject.config, name)) for name in SWITCHES}


def taps_read(subject: Subject) -> tuple[int, ...]:
    """The layers that the heads read, as outputs counted from 0; never negative."""
    return tuple(tap % subject.target_info.layers for tap in subject.heads.taps)


def check_taps(subject: Subject, engine: str) -> None:
    """Raise ValueError for layers that the engine cannot tap, or would hand over in another order."""
    taps, last = taps_read(subject), subject.target_info.layers - 1
    if last in taps:
        raise ValueError(
            f"these heads read the last layer's normed output (tap {last}), which {engine} cannot tap; train heads that read "
            f"earlier layers (`headstart train eagle3 --set taps={advised_taps(subject)}`)"
        )
    if list(taps) != sorted(taps):
        raise ValueError(
            f"these heads read the layers {list(taps)} in this order, and {engine} hands them over in ascending order; train heads "
            f"whose taps ascend (`headstart train eagle3 --set taps={compact(sorted(taps))}`)"
        )


def advised_taps(subject: Subject) -> str:
    """Taps that every engine can read, for a command: the published ones, in shallow targets evenly spread ones."""
    published, top = published_taps(subject.target_info.layers), max(0, subject.target_info.layers - 2)
    is_possible = list(published) == sorted({*published}) and published[0] >= 0
    return compact(published if is_possible else sorted({0, top // 2, top}))


def compact(numbers: Sequence[int]) -> str:
    """Numbers as `--set` takes them, as [1,2,3]."""
    return f"[{','.join(map(str, numbers))}]"


def input_ids(subject: Subject) -> dict[str, Any]:
    """The key of vLLM and speculators: number k means the input of layer k, which is the output of layer k - 1."""
    return {IDS: [tap + 1 for tap in taps_read(subject)]}
