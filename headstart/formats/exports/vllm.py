"""Heads for vLLM: EAGLE-1, EAGLE-3 with the norms of 3.1, and Medusa, which versions up to 0.32 have.

vLLM sorts the layers that EAGLE-3 heads read, makes `fc` without a bias, and skips names that its Medusa does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from headstart.formats.exports import llama_block as layer
from headstart.formats.exports.base import CONFIG, Placed, Subject, TensorFile, write_json
from headstart.formats.exports.eagle3_files import check_taps, eagle3_keys, eagle3_tensors, input_ids
from headstart.formats.exports.eagle_files import eagle_tensors
from headstart.formats.exports.medusa_files import blocks, check_copy, is_shared, target_head


class Vllm:
    """Writes `config.json` and `model.safetensors`."""

    name: ClassVar[str] = "vllm"
    reader: ClassVar[str] = "vLLM 0.32 (llama_eagle.py, llama_eagle3.py and medusa.py; 0.33 has no Medusa)"
    methods: ClassVar[tuple[str, ...]] = ("eagle", "eagle3", "medusa")
    instead: ClassVar[Mapping[str, str]] = {
        "mtp": "vLLM reads MTP modules only inside the target's checkpoint; write one with --to hf",
    }

    def check(self, subject: Subject) -> None:
        """Raise ValueError for what vLLM would drop, ignore or change silently."""
        if subject.method == "medusa":
            check_copy(subject, "vLLM")
            return
        layer.check_context(subject, "vLLM")
        layer.check_embedding(subject, "vLLM")
        layer.check_layer(subject, "vLLM", has_biases=True, has_many=subject.method == "eagle3")
        if subject.method == "eagle3":
            check_fc_bias(subject, "vLLM", "fc_bias")
            check_taps(subject, "vLLM")
        else:
            check_fc_bias(subject, "vLLM", "bias")
            layer.check_lm_head(subject, "vLLM")

    def write(self, subject: Subject, staged: Path) -> list[Placed]:
        """Write the files to an empty folder."""
        if subject.method == "medusa":
            return _write_medusa(subject, staged)
        if subject.method == "eagle3":
            write_json(staged / CONFIG, {**eagle3_keys(subject), **input_ids(subject), **num_taps(subject)})
            return eagle3_tensors(subject, "midlayer.", has_mask=False).save(staged)
        write_json(staged / CONFIG, {"architectures": ["LlamaForCausalLM"], **layer.llama_keys(subject)})
        return eagle_tensors(subject).save(staged)


def check_fc_bias(subject: Subject, engine: str, setting: str) -> None:
    """Raise ValueError for a projection with a bias, for engines whose projection has none. setting: its name."""
    if getattr(subject.config, setting) and bool(subject.tensors["fc.bias"].any()):
        raise ValueError(
            f"these heads' fc has a bias, which {engine} drops without a word; train them without it "
            f"(`headstart train {subject.method} --set {setting}=false`)"
        )


def num_taps(subject: Subject) -> dict[str, int]:
    """The number of layers that are read, where it is not the usual one: vLLM does not count the list."""
    count = len(subject.heads.taps)
    return {} if count == 3 else {"num_aux_hidden_states": count}


def _write_medusa(subject: Subject, staged: Path) -> list[Placed]:
    config = subject.config
    write_json(
        staged / CONFIG,
        {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": subject.target_info.hidden,
            "vocab_size": subject.target_info.vocab,
            "num_heads": config.num_heads,
            "num_hidden_layers": config.num_layers,
            "medusa_fc_bias": True,
            **({"original_lm_head": True} if is_shared(subject) else {}),
            "dtype": str(subject.stored_dtype).removeprefix("torch."),
        },
    )
    file = TensorFile()
    for head, index, part, ours in blocks(subject):
        file.put(ours, f"blocks.{head}.layers.{index}.{part}", subject.tensors[ours])
    if is_shared(subject):
        file.put(None, "lm_head.weight", target_head(subject), "derived: the target's LM head")
    else:
        for head in range(config.num_heads):
            ours = f"heads.{head}.projection.weight"
            file.put(ours, f"lm_heads.{head}.weight", subject.tensors[ours])
    return file.save(staged)
