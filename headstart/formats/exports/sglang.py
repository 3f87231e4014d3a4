"""Heads for SGLang: EAGLE-1, and EAGLE-3 with a reduced vocabulary and the norms of 3.1.

SGLang skips tensors whose names it does not know without a word, gives heads the target's embedding whatever they have, makes the
`fc` of EAGLE-1 with a bias, and applies that of EAGLE-3 only where the features are wider than an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from headstart.formats.exports import llama_block as layer
from headstart.formats.exports.base import CONFIG, Placed, Subject, write_json
from headstart.formats.exports.eagle3_files import advised_taps, check_taps, eagle3_keys, eagle3_tensors, is_wide, taps_read
from headstart.formats.exports.eagle_files import eagle_tensors
from headstart.formats.exports.vllm import num_taps
from headstart.formats.published.taps import IDS, published_taps

# Targets for which number k in a configuration is known to mean the output of layer k; others count in several ways.
COUNTS_OUTPUTS = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
)  # fmt: skip


class Sglang:
    """Writes `config.json` and `model.safetensors`."""

    name: ClassVar[str] = "sglang"
    reader: ClassVar[str] = (
        "SGLang 0.5.23 (llama_eagle.py, llama_eagle3.py; fc_norm and norm_output came in May 2026), read in code only"
    )
    methods: ClassVar[tuple[str, ...]] = ("eagle", "eagle3")
    instead: ClassVar[Mapping[str, str]] = {
        "mtp": "SGLang reads MTP modules only inside the target's checkpoint; write one with --to hf",
    }

    def check(self, subject: Subject) -> None:
        """Raise ValueError for what SGLang would drop, ignore or change silently."""
        layer.check_context(subject, "SGLang")
        layer.check_layer(subject, "SGLang", has_biases=False, has_many=False)
        layer.check_embedding(subject, "SGLang")
        _check_own_embedding(subject)
        if subject.method == "eagle3":
            _check_switches(subject)
            check_taps(subject, "SGLang")
            _check_tap_count(subject)
            _check_tap_convention(subject)
        else:
            layer.check_lm_head(subject, "SGLang")

    def write(self, subject: Subject, staged: Path) -> list[Placed]:
        """Write the files to an empty folder."""
        if subject.method == "eagle3":
            write_json(staged / CONFIG, {**eagle3_keys(subject), **num_taps(subject), **_output_ids(subject)})
            return eagle3_tensors(subject, "midlayer.", has_mask=False).save(staged)
        write_json(staged / CONFIG, {"architectures": ["LlamaForCausalLMEagle"], **layer.llama_keys(subject)})
        file = eagle_tensors(subject)
        if not subject.config.bias:
            zeros = torch.zeros(subject.target_info.hidden, dtype=subject.stored_dtype)
            file.put(None, "fc.bias", zeros, "derived: zeros, since SGLang keeps random numbers otherwise")
        return file.save(staged)


def _check_own_embedding(subject: Subject) -> None:
    is_replaced = subject.method == "eagle" or not is_wide(subject)
    if subject.config.embedding == "own" and is_replaced:
        raise ValueError(
            "these heads have an embedding of their own, which SGLang replaces by the target's without a word; train them with "
            f"the target's (`headstart train {subject.method} --set embedding=shared`), or export them with --to vllm"
        )


def _check_switches(subject: Subject) -> None:
    for name, why in (
        ("norm_before_residual", "whose residual is always the state without its norm"),
        ("norm_before_fc", "which drops input_norm.weight without a word"),
        ("fc_bias", "whose key for it also gives the attention a bias"),
    ):
        if getattr(subject.config, name):
            raise ValueError(
                f"these heads have {name}, and are not for SGLang, {why}; train them without it "
                f"(`headstart train eagle3 --set {name}=false`)" + ("" if name == "fc_bias" else ", or export them with --to vllm")
            )


def _check_tap_count(subject: Subject) -> None:
    width = int(layer.layer_config(subject).hidden_size)
    if len(subject.heads.taps) * subject.target_info.hidden == width:
        raise ValueError(
            f"these heads read features as wide as an embedding ({width}), for which SGLang leaves fc out without a word; train "
            f"heads that read more layers (`headstart train eagle3 --set taps={advised_taps(subject)}`), or export them with "
            "--to vllm"
        )


def _check_tap_convention(subject: Subject) -> None:
    name = type(subject.model).__name__
    if taps_read(subject) != published_taps(subject.target_info.layers) and name not in COUNTS_OUTPUTS:
        raise ValueError(
            f"these heads read the layers {list(taps_read(subject))}, and how SGLang counts them for {name} is not known; train "
            f"heads with the taps that it takes by itself (`headstart train eagle3 --set taps={advised_taps(subject)}`)"
        )


def _output_ids(subject: Subject) -> dict[str, Any]:
    """The key of SGLang: number k means the output of layer k. Left out for the layers that it taps by itself."""
    taps = taps_read(subject)
    return {} if taps == published_taps(subject.target_info.layers) else {"eagle_config": {IDS: list(taps)}}
