"""Tiny random models with MTP modules, with the tensor names of their publishers; transformers' own modules are the oracle.

Modules and layers add little to a token's own embedding, so that a module's guess is often the model's token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from folders import write_tokenizer
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, WINDOW, random_model
from torch import Tensor
from transformers.modeling_layers import MtpModel

Tensors = dict[str, Tensor]

VOCAB = 320  # of folders.write_tokenizer
_SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
_COMMON = _SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}


def deepseek(modules: int = 1) -> Any:
    config = ARCHITECTURES["deepseek_v3"]()
    config.num_mtp_layers, config.vocab_size = modules, VOCAB
    return config


def glm(modules: int = 1) -> Any:
    return hf.Glm4MoeConfig(**_COMMON, **_EXPERTS, n_routed_experts=4, num_mtp_layers=modules)


def mellum(modules: int = 1) -> Any:
    return hf.MellumConfig(
        **_COMMON, **_EXPERTS, num_experts=4, sliding_window=WINDOW, num_mtp_layers=modules,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip


def qwen(modules: int = 1) -> Any:
    """A Qwen3 with modules; transformers reads them where the config has `num_mtp_layers`."""
    return hf.Qwen3Config(**_COMMON, num_mtp_layers=modules, mtp_layer_types=["full_attention"] * modules)


def mimo(modules: int = 1) -> Any:
    """MiMo's architecture: a Qwen2, and modules whose projection reads the state first."""
    return hf.Qwen2Config(
        **_COMMON, num_mtp_layers=modules, mtp_layer_types=["full_attention"] * modules, mtp_hidden_states_first=True
    )


# -- tensor names --


def as_deepseek(module: int, around: Tensors, layer: Tensors) -> Tensors:
    names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm"}
    return _named(f"model.layers.{3 + module}.", names, around, layer)


def as_mimo(module: int, around: Tensors, layer: Tensors) -> Tensors:
    names = {"enorm": "token_layernorm", "hnorm": "hidden_layernorm", "eh_proj": "input_proj", "post_norm": "final_layernorm"}
    return _named(f"model.mtp_layers.{module}.", names, around, layer)


def as_qwen(module: int, around: Tensors, layer: Tensors) -> Tensors:
    names = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}
    return _named("mtp.", names, around, {f"layers.0.{name}": tensor for name, tensor in layer.items()})


def _named(prefix: str, names: dict[str, str], around: Tensors, layer: Tensors) -> Tensors:
    tensors = {f"{prefix}{theirs}.weight": around[f"{ours}.weight"] for ours, theirs in names.items()}
    return tensors | {prefix + name: tensor for name, tensor in layer.items()}


def split_experts(layer: Tensors) -> Iterator[tuple[str, Tensor]]:
    """A layer's tensors as they are published: one tensor per expert."""
    for name, tensor in layer.items():
        kind = name.rpartition(".")[2]
        if kind == "gate_up_proj":
            for expert, gate_and_up in enumerate(tensor):
                gate, up = gate_and_up.chunk(2)
                yield name.replace(kind, f"{expert}.gate_proj.weight"), gate
                yield name.replace(kind, f"{expert}.up_proj.weight"), up
        elif kind == "down_proj":
            yield from ((name.replace(kind, f"{expert}.down_proj.weight"), one) for expert, one in enumerate(tensor))
        else:
            yield name, tensor


# family: its configuration, its tensor names, and the pattern by which transformers finds the modules
FAMILIES: dict[str, tuple[Callable[[int], Any], Callable[[int, Tensors, Tensors], Tensors], str]] = {
    "deepseek_v3": (deepseek, as_deepseek, r"model\.layers\.[3-9]\."),
    "glm4_moe": (glm, as_deepseek, r"model\.layers\.[3-9]\."),
    "mellum": (mellum, as_qwen, r"^mtp\."),
    "qwen3": (qwen, as_qwen, r"^mtp\."),
    "mimo": (mimo, as_mimo, r"model\.mtp_layers\."),
}


class Publication:
    """A published model: `folder` as downloaded, and in memory `model` and `oracle`, its modules, as transformers runs them."""

    def __init__(self, folder: Path, family: str, modules: int = 1, shards: bool = False) -> None:
        self.folder, self.count = folder, modules
        config, name, self.pattern = FAMILIES[family]
        self.model = _with_small_layers(random_model(config(modules), torch.float32))
        self.model._keys_to_ignore_on_load_unexpected = [self.pattern]
        torch.manual_seed(5)
        self.oracle = _with_small_layers(_with_noise(MtpModel(self.model, modules)))
        self.tensors: Tensors = {}
        for module, layer in enumerate(self.oracle.layers):
            state = {key: tensor.detach().clone() for key, tensor in layer.state_dict().items()}
            block = {key.removeprefix("mtp_block."): state.pop(key) for key in [*state] if key.startswith("mtp_block.")}
            self.tensors |= name(module, state, dict(split_experts(block)))
        self.model.save_pretrained(folder)
        write_tokenizer(folder, VOCAB)
        self.rest = load_file(folder / "model.safetensors")
        self.write(self.tensors, shards)

    def write(self, tensors: Tensors, shards: bool = False, folder: Path | None = None) -> None:
        """Write the weights again, with these tensors of modules."""
        folder = folder or self.folder
        for name in folder.glob("model*safetensors*"):
            name.unlink()
        if not shards:
            _save(self.rest | tensors, folder / "model.safetensors")
            return
        parts = {"model-00001-of-00002.safetensors": self.rest, "model-00002-of-00002.safetensors": tensors}
        for file, part in parts.items():
            _save(part, folder / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def reloaded(self) -> Any:
        """The model from its folder, with the pattern of its modules: transformers knows those of the published sizes only."""
        model = hf.AutoModelForCausalLM.from_pretrained(self.folder, experts_implementation="eager").eval()
        model._keys_to_ignore_on_load_unexpected = [self.pattern]
        return model


def _save(tensors: Tensors, file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _with_noise(oracle: Any) -> Any:
    with torch.no_grad():
        for name, weight in oracle.layers.named_parameters():
            is_projection = name.endswith("eh_proj.weight")
            noise = torch.randn_like(weight) * (0.03 if is_projection else 0.1)
            weight.copy_(weight + noise if weight.dim() == 1 else noise)
            if is_projection:
                first = oracle.config.hidden_size if getattr(oracle.config, "mtp_hidden_states_first", False) else 0
                weight[:, first : first + oracle.config.hidden_size] += torch.eye(oracle.config.hidden_size)
    return oracle.float().eval()


def _with_small_layers(model: Any) -> Any:
    """The model, with layers that add little to the residual."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(0.03)
    return model
