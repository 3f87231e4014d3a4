"""Medusa heads for TGI, in the names of Medusa's authors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from headstart.formats.exports.base import CONFIG, Placed, Subject, TensorFile, source_path, write_json
from headstart.formats.exports.medusa_files import blocks, check_copy, is_shared, target_head


class Tgi:
    """Writes `config.json` and `medusa_lm_head.safetensors`.

    TGI tries the form with an LM head for each head first, then one with the target's, which has a single layer.
    """

    name: ClassVar[str] = "tgi"
    reader: ClassVar[str] = "TGI at commit 91560ed (layers/medusa.py), read in code only"
    methods: ClassVar[tuple[str, ...]] = ("medusa",)
    instead: ClassVar[Mapping[str, str]] = {}

    def check(self, subject: Subject) -> None:
        """Raise ValueError where copies of the target's LM head would differ from it."""
        if subject.config.num_layers > 1:
            check_copy(subject, "TGI")

    def write(self, subject: Subject, staged: Path) -> list[Placed]:
        """Write the files to an empty folder."""
        config, file = subject.config, TensorFile("medusa_lm_head.safetensors")
        for head, layer, part, ours in blocks(subject):
            file.put(ours, f"{head}.{layer}.linear.{part}", subject.tensors[ours])
        for head in range(config.num_heads):
            ours, theirs = f"heads.{head}.projection.weight", f"{head}.{config.num_layers}.weight"
            if not is_shared(subject):
                file.put(ours, theirs, subject.tensors[ours])
            elif config.num_layers > 1:
                file.put(None, theirs, target_head(subject), "derived: the target's LM head")
        keys = {"medusa_num_heads": config.num_heads, "medusa_num_layers": config.num_layers}
        write_json(staged / CONFIG, {**keys, "base_model_name_or_path": source_path(subject.source)})
        return file.save(staged)
