"""EAGLE-3 heads in the format of the library speculators, which vLLM reads too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from headstart.formats.exports import llama_block as layer
from headstart.formats.exports.base import CONFIG, Placed, Subject, source_path, write_json
from headstart.formats.exports.eagle3_files import check_taps, eagle3_tensors, input_ids, is_wide, switches
from headstart.formats.exports.vllm import check_fc_bias, num_taps

LIBRARY = "0.9.0"
NAME = "speculators and vLLM"


class Speculators:
    """Writes `config.json` and `model.safetensors`."""

    name: ClassVar[str] = "speculators"
    reader: ClassVar[str] = f"speculators {LIBRARY}, and vLLM 0.32's reader of its format"
    methods: ClassVar[tuple[str, ...]] = ("eagle3",)
    instead: ClassVar[Mapping[str, str]] = {
        "eagle": f"speculators {LIBRARY} has no EAGLE-1; export these heads with --to vllm or --to sglang",
    }

    def check(self, subject: Subject) -> None:
        """Raise ValueError for what these readers would drop, ignore or change silently."""
        layer.check_context(subject, NAME)
        layer.check_embedding(subject, NAME)
        layer.check_layer(subject, NAME, has_biases=True, has_many=True)
        if is_wide(subject):
            raise ValueError(
                f"these heads' layer has a hidden size of {layer.layer_config(subject).hidden_size}, their target one of "
                f"{subject.target_info.hidden}, and speculators loads heads of the target's only; export them with --to vllm"
            )
        check_fc_bias(subject, NAME, "fc_bias")
        check_taps(subject, NAME)

    def write(self, subject: Subject, staged: Path) -> list[Placed]:
        """Write the files to an empty folder."""
        write_json(staged / CONFIG, _config(subject))
        return eagle3_tensors(subject, "layers.0.", has_mask=True).save(staged)


def _config(subject: Subject) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": LIBRARY,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": subject.chain, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": source_path(subject.source), "architectures": [type(subject.model).__name__]},
        },
        "transformer_layer_config": {**layer.llama_keys(subject), **num_taps(subject)},
        "draft_vocab_size": subject.config.draft_vocab or subject.target_info.vocab,
        **input_ids(subject),
        **switches(subject),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": str(subject.stored_dtype).removeprefix("torch."),
    }
