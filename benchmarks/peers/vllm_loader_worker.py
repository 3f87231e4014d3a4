"""Runs where vLLM's package is on the path, for `vllm_loader.py`: its configuration and weight loader read exports, on a CPU.

Prints one line of JSON per export: how many tensors of the files are in the loaded model, and what went wrong. Decodes nothing.
"""

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from typing import Any

# Our names' endings that vLLM joins row after row: the joined name, and which parts come before.
JOINED = {
    "q_proj": ("qkv_proj", ()),
    "k_proj": ("qkv_proj", ("q_proj",)),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj")),
    "gate_proj": ("gate_up_proj", ()),
    "up_proj": ("gate_up_proj", ("gate_proj",)),
}
UNREAD = ("t2d",)  # of speculators' layout: vLLM follows the other table
RENAMED = {"d2t": "draft_id_to_target_id", "midlayer.": "layers.0."}


def use_cpu() -> None:
    """Let a build for GPUs choose the CPU: it asks its own version. What its compiled part would do is not needed to load."""
    import torch

    version_of = importlib.metadata.version
    importlib.metadata.version = lambda name: version_of(name) + ("+cpu" if name == "vllm" else "")
    torch.accelerator.empty_cache = lambda: None


def configuration(model: str, speculation: dict[str, Any], settings: dict[str, Any]) -> Any:
    """vLLM's configuration of a target with heads."""
    from vllm.engine.arg_utils import EngineArgs  # type: ignore[import-not-found,unused-ignore]

    arguments = EngineArgs(
        model=model, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, speculative_config=speculation, **settings
    )
    return arguments.create_engine_config()


def loaded(config: Any) -> Any:
    """The drafter that vLLM's loader makes."""
    from vllm.config import set_current_vllm_config  # type: ignore[import-not-found,unused-ignore]
    from vllm.model_executor.model_loader import get_model  # type: ignore[import-not-found,unused-ignore]

    with set_current_vllm_config(config):
        start_process_group()
        return get_model(vllm_config=config, model_config=config.speculative_config.draft_model_config)


def start_process_group() -> None:
    """The groups of one process, which vLLM's layers ask for; the second time nothing is done."""
    import torch
    from vllm.distributed import (  # type: ignore[import-not-found,unused-ignore]
        init_distributed_environment,
        initialize_model_parallel,
    )

    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29533", 0, "gloo")
        initialize_model_parallel(1, 1)


def lost(folder: str, model: Any) -> Iterator[str]:
    """The tensors of an export that are not in a loaded model with the same numbers."""
    from safetensors.torch import load_file

    written = load_file(f"{folder}/model.safetensors")
    parameters = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    for name, tensor in written.items():
        if name in UNREAD:
            continue
        target, offset = place(name, written)
        value = parameters.get(target)
        if value is None or not (value[offset : offset + len(tensor)].to(tensor.dtype) == tensor).all():
            yield name


def place(name: str, written: dict[str, Any]) -> tuple[str, int]:
    """Where vLLM puts a tensor: the parameter's name, and its first row there."""
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs) if ours.endswith(".") or name == ours else name
    for part, (joined, before) in JOINED.items():
        if f".{part}." in name:
            like = {key.replace("midlayer.", "layers.0."): value for key, value in written.items()}
            return name.replace(part, joined), sum(len(like[name.replace(part, other)]) for other in before)
    return name, 0


def check(job: dict[str, Any]) -> dict[str, Any]:
    """What an export becomes. job: `model`, `folder` and `speculation`, vLLM's speculative_config."""
    config = configuration(job["model"], job["speculation"], {})
    model = loaded(config)
    return {"class": type(model).__name__, "method": config.speculative_config.method, "lost": list(lost(job["folder"], model))}


def check_plugin(job: dict[str, Any]) -> dict[str, Any]:
    """What vLLM makes of the plug-in's class, and whether its model runner is connected."""
    from vllm.v1.spec_decode.custom_class_proposer import create_custom_proposer  # type: ignore[import-not-found,unused-ignore]
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # type: ignore[import-not-found,unused-ignore]

    config = configuration(job["model"], job["speculation"], {"additional_config": {"headstart_heads": job["folder"]}})
    proposer = create_custom_proposer(config)
    is_connected = getattr(GPUModelRunner.propose_draft_token_ids, "has_hidden_states", False)
    errors = [] if is_connected else ["the model runner is not connected"]
    return {"class": type(proposer).__name__, "method": config.speculative_config.method, "lost": errors}


def main() -> None:
    """Check every job, each on its own."""
    import vllm  # type: ignore[import-not-found,unused-ignore]

    for job in json.loads(sys.stdin.read()):
        try:
            result = check_plugin(job) if job["is_plugin"] else check(job)
        except Exception as error:  # whatever vLLM raises
            result = {"error": " ".join(str(error).split())[:300]}
        print("\n" + json.dumps({"folder": job["folder"], "version": vllm.__version__, **result}), flush=True)


if __name__ == "__main__":
    use_cpu()
    main()
