"""Names of tensors in GGUF files, and the order of their rows, as llama.cpp has them. Must not read or write files.

Read in the llama.cpp of the llama-cpp-python 0.3.36 source package: `src/llama-arch.cpp`, `src/models/` and `conversion/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

EAGLE3 = "eagle3"
IDS = "d2t"  # of a draft vocabulary: the target's ids themselves, where published files have offsets
ROPE_FACTORS = "rope_freqs.weight"
ROPE_SETTINGS = "headstart.rope_parameters"  # our own key: RoPE settings, of which llama.cpp has factors only
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_LLAMA = {**_ATTENTION, "post_attention_layernorm": "ffn_norm", **_MLP}
_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction": "exp_probs_b",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_MODULE = {
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "shared_head.norm": "nextn.shared_head_norm",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.head": "nextn.shared_head_head",
}
_GLM = {**_ATTENTION, **_NORMS, "post_attention_layernorm": "post_attention_norm", **_MLP, **_EXPERTS, **_MODULE}
_CORRECTION = "e_score_correction_bias"  # a tensor without a module of its own; llama.cpp's name ends in ".bias"
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+\.weight)")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    name: in llama.cpp's words.
    layer: names inside a layer, Hugging Face's to llama.cpp's, both without ".weight" and ".bias".
    interleaved: whether rows of queries and keys are in the order of `interleave`.
    has_taps: whether its graph gives the inputs of its layers, which EAGLE-3 reads.
    has_modules: whether it runs MTP modules.
    """

    name: str
    layer: Mapping[str, str]
    interleaved: bool = False
    has_taps: bool = True
    has_modules: bool = False
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)

    def to_gguf(self, name: str) -> str:
        """llama.cpp's name of a tensor. Raises ValueError for a name that the architecture does not have."""
        module, _, kind = name.replace(_CORRECTION, "e_score_correction.bias").rpartition(".")
        if module in self.outside:
            return f"{self.outside[module]}.{kind}"
        number = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module)
        if number is None or number[2] not in self.layer or kind not in ("weight", "bias"):
            raise ValueError(f"{name} has no place in llama.cpp's architecture {self.name}")
        return f"blk.{number[1]}.{self.layer[number[2]]}.{kind}"

    def from_gguf(self, name: str) -> str | None:
        """Hugging Face's name of a tensor, of stacked experts the one without a number; None where there is none."""
        module, _, kind = name.rpartition(".")
        outside = {theirs: ours for ours, theirs in self.outside.items()}
        if module in outside:
            return f"{outside[module]}.{kind}"
        number = re.fullmatch(r"blk\.(\d+)\.(.*)", module)
        inside = {theirs: ours for ours, theirs in self.layer.items()}
        if number is None or number[2] not in inside:
            return None
        return f"model.layers.{number[1]}.{inside[number[2]]}.{kind}".replace("e_score_correction.bias", _CORRECTION)


ARCHITECTURES = {  # by the `model_type` of a configuration
    "llama": Architecture("llama", _LLAMA, interleaved=True),
    "mistral": Architecture("llama", _LLAMA, interleaved=True),
    "qwen3": Architecture("qwen3", {**_LLAMA, **_NORMS}),
    "glm4_moe": Architecture("glm4moe", _GLM, has_taps=False, has_modules=True),
}
_OF_HEADS = {"fc": "fc", "input_norm": "enc.output_norm", "norm": "output_norm", "lm_head": "output", "embed_tokens": "token_embd"}
_HEADS_LAYER = {**_LLAMA, "hidden_norm": "attn_norm_2"}
# EAGLE-3 heads, whose names are SafeAILab's: their only layer is `midlayer`.
HEADS = Architecture(
    EAGLE3,
    {},
    interleaved=True,
    outside={**_OF_HEADS, **{f"midlayer.{ours}": f"blk.0.{theirs}" for ours, theirs in _HEADS_LAYER.items()}},
)


def expert_of(name: str) -> tuple[str, int] | None:
    """The name of the stack that a published expert's tensor goes into, and its place there; None for other tensors."""
    expert = _EXPERT.fullmatch(name)
    return (f"{expert[1]}.{expert[3]}", int(expert[2])) if expert else None


def expert_name(stack: str, number: int) -> str:
    """The inverse of `expert_of`."""
    return stack.replace(".experts.", f".experts.{number}.")


def interleave(weight: Tensor, heads: int) -> Tensor:
    """A query or key projection, weight or bias, with the rows of each head in llama.cpp's order.

    The rotary embedding of transformers turns channel i of a head together with channel i + head_dim / 2, and llama.cpp's turns
    neighbours: channels 0, head_dim / 2, 1, head_dim / 2 + 1 and so on become 0, 1, 2, 3.

    weight: [heads * head_dim, ...].
    """
    result: Tensor = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
    return result


def deinterleave(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    result: Tensor = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    return result


def heads_of(name: str, heads: int, kv_heads: int) -> int | None:
    """The number of attention heads whose rows are in an order of their own; None for other tensors. name: Hugging Face's."""
    parts = name.split(".")
    return {"q_proj": heads, "k_proj": kv_heads}.get(parts[-2] if len(parts) > 1 else "")
