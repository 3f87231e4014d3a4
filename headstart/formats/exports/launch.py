"""The command that starts an engine with an exported folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headstart.formats.exports.engine_options import SGLANG, VLLM
from headstart.formats.weights import DRAFT_GGUF, MODEL_GGUF


def launch_command(engine: str, conformance: Mapping[str, Any], model: str, folder: str) -> list[str]:
    """The command that starts an engine with exported heads, as a list of arguments.

    engine: as `--to` takes it.
    conformance: content of the export's `conformance.json`; read are "method", "chain" and "chain_by_batch".
    model: folder or hub id of the target, as the engine takes it.
    folder: of the export.
    Raises ValueError for an engine that has no command.
    """
    if engine not in _COMMANDS:
        raise ValueError(f"there is no command that starts {engine}; there are commands for {', '.join(_COMMANDS)}")
    return _COMMANDS[engine](conformance, model, folder)


def launch_notes(engine: str, method: str) -> list[str]:
    """What a person must know who starts the engine with these heads, one sentence each."""
    return [*_NOTES.get((engine, method), ())]


def _vllm(conformance: Mapping[str, Any], model: str, folder: str) -> list[str]:
    config = {"method": VLLM[conformance["method"]], "model": folder, "num_speculative_tokens": conformance["chain"]}
    by_batch = conformance.get("chain_by_batch")
    if by_batch and conformance["method"] != "medusa":  # all heads of Medusa draft in every round
        config["num_speculative_tokens_per_batch_size"] = [list(span) for span in by_batch]
    return ["vllm", "serve", model, "--speculative-config", json.dumps(config)]


def _sglang(conformance: Mapping[str, Any], model: str, folder: str) -> list[str]:
    steps = conformance["chain"]
    options = {
        "--model-path": model,
        "--speculative-algorithm": SGLANG[conformance["method"]],
        "--speculative-draft-model-path": folder,
        "--speculative-num-steps": steps,
        "--speculative-eagle-topk": 1,
        "--speculative-num-draft-tokens": steps + 1,
    }
    return ["python", "-m", "sglang.launch_server", *_flat(options)]


def _tgi(conformance: Mapping[str, Any], model: str, folder: str) -> list[str]:
    """TGI reads the target's name from the `config.json` of the heads."""
    return ["text-generation-launcher", *_flat({"--model-id": folder, "--speculate": conformance["chain"]})]


def _llama_cpp(conformance: Mapping[str, Any], model: str, folder: str) -> list[str]:
    """The target is in the folder too."""
    files = {"-m": f"{folder}/{MODEL_GGUF}"}
    if conformance["method"] == "eagle3":
        files["-md"] = f"{folder}/{DRAFT_GGUF}"
    options = {**files, "--spec-type": f"draft-{conformance['method']}", "--spec-draft-n-max": conformance["chain"]}
    return ["llama-server", *_flat(options)]


def _checkpoint(conformance: Mapping[str, Any], model: str, folder: str) -> list[str]:
    """The folder is a model with modules inside, each of which drafts one token."""
    config = {"method": VLLM["mtp"], "num_speculative_tokens": conformance["settings"]["num_modules"]}
    return ["vllm", "serve", folder, "--speculative-config", json.dumps(config)]


def _flat(options: Mapping[str, str | int]) -> Sequence[str]:
    return [str(part) for pair in options.items() for part in pair]


_COMMANDS: dict[str, Callable[[Mapping[str, Any], str, str], list[str]]] = {
    "vllm": _vllm,
    "speculators": _vllm,
    "sglang": _sglang,
    "tgi": _tgi,
    "gguf": _llama_cpp,
    "hf": _checkpoint,
}

_NOTES: dict[tuple[str, str], tuple[str, ...]] = {
    ("vllm", "medusa"): ("vLLM has Medusa up to version 0.32; later versions need the plug-in in integrations/vllm",),
    ("hf", "mtp"): (
        "transformers 5.23 reads them with generate(use_mtp=True), vLLM 0.32 and SGLang those of DeepSeek-V3, GLM-4.5 and MiMo",
        "vLLM gives a module of GLM-4.5 its own state before the last norm, and one of MiMo none: there draft one token per module",
    ),
    ("gguf", "eagle3"): ("model.gguf is not quantized; llama-quantize of llama.cpp makes it smaller, with other answers",),
    ("sglang", "eagle3"): ("SGLang before May 2026 drops fc_norm and norm_output without a word; use 0.5.23 or later",),
}
