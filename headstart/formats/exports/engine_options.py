"""Chain lengths in the words of other engines: vLLM's `--speculative-config`, and SGLang's options.

vLLM (docs/features/speculative_decoding/dynamic_speculative_decoding.md): `num_speculative_tokens_per_batch_size` is a list of
[first batch size, last batch size, length]; 0 is plain decoding, and the last length holds for all larger batches. SGLang
(docs/advanced_features/adaptive_speculative_decoding.md): `--speculative-adaptive` chooses among `candidate_steps`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

VLLM = {"eagle": "eagle", "eagle3": "eagle3", "medusa": "medusa", "mtp": "mtp"}  # our methods in vLLM's words
SGLANG = {"eagle": "EAGLE", "eagle3": "EAGLE3", "mtp": "NEXTN"}
INSIDE = ("mtp",)  # methods whose heads these engines read from the target's own files


def ranges(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first batch size, last batch size, length) where neighbours are alike. lengths: for batches of 1, 2, ..."""
    result, first = [], 1
    for length, group in groupby(lengths):
        size = len(list(group))
        result.append((first, first + size - 1, length))
        first += size
    return result


def vllm_option(method: str, lengths: Sequence[int], heads: str) -> str | None:
    """`--speculative-config '...'`; None for a method that vLLM lacks, and where no chain pays.

    lengths: of the best chain, for batches of 1, 2, ...; 0: plain decoding.
    heads: the folder of the exported heads.
    """
    if method not in VLLM or not any(lengths):
        return None
    config: dict[str, Any] = {"method": VLLM[method]}
    if method not in INSIDE:
        config["model"] = heads
    config["num_speculative_tokens"] = max(lengths)
    if len({*lengths}) > 1:
        config["num_speculative_tokens_per_batch_size"] = ranges(lengths)
    return f"--speculative-config '{json.dumps(config)}'"


def sglang_options(method: str, length: int, heads: str) -> str | None:
    """SGLang's options for a chain of one length; None for a method that SGLang lacks, and for length 0."""
    if method not in SGLANG or not length:
        return None
    path = "" if method in INSIDE else f" --speculative-draft-model-path {heads}"
    return (
        f"--speculative-algorithm {SGLANG[method]}{path} --speculative-num-steps {length} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {length + 1}"
    )


def sglang_adaptive(lengths: Sequence[int]) -> str | None:
    """The JSON for `--speculative-adaptive-config`; None where the best length is one for all batches."""
    steps = sorted({length for length in lengths if length})
    return json.dumps({"candidate_steps": steps}) if len(steps) > 1 else None
