"""What a forward of a model, or a level of drafting, reads and computes: counts of weights, from configurations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from headstart.drafters.parts.heads import Heads
    from headstart.target.target import Target

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # of a weight, by dtype


@dataclass(frozen=True)
class ModelShape:
    """A causal LM, as far as the time of a forward depends on it.

    dtype: of the weights, a key of `BYTES`.
    layers: number of decoder layers.
    parameters: weights that every forward reads: all but the experts, and but the input embedding where it is not the LM head too.
    cache_values: numbers in the KV cache per token: keys and values of all layers.
    attention_values: numbers that a node's queries have, over all layers.
    expert_parameters: weights of all experts; 0 without experts.
    experts: experts per layer; 1 without experts.
    experts_per_token: of these, how many a token uses.
    """

    dtype: str
    layers: int
    parameters: int
    cache_values: int
    attention_values: int
    expert_parameters: int = 0
    experts: int = 1
    experts_per_token: int = 1

    @classmethod
    def of_config(cls, config: PreTrainedConfig, dtype: str, trust_remote_code: bool = False) -> ModelShape:
        """The shape of the model that a configuration of transformers describes; no weight is allocated.

        trust_remote_code: whether Python files of the model may run.
        Raises ValueError for a dtype whose bytes are not known.
        """
        from transformers import AutoModelForCausalLM

        if dtype not in BYTES:
            raise ValueError(f"dtype is {dtype}; a forecast needs one of {', '.join(BYTES)}")
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        text: Any = config.get_text_config()
        counts = {name: parameter.numel() for name, parameter in model.named_parameters()}  # tied weights once
        experts = sum(count for name, count in counts.items() if ".experts." in name)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        return cls(
            dtype=dtype,
            layers=text.num_hidden_layers,
            parameters=sum(counts.values()) - experts - (0 if embedding is head else embedding.numel()),
            cache_values=2 * text.num_hidden_layers * kv_heads * width,
            attention_values=text.num_hidden_layers * heads * width,
            expert_parameters=experts,
            experts=_first(text, "num_experts", "num_local_experts", "n_routed_experts") if experts else 1,
            experts_per_token=_first(text, "num_experts_per_tok", "moe_topk") if experts else 1,
        )

    @classmethod
    def of_target(cls, target: Target) -> ModelShape:
        """The shape of a loaded model, with its dtype as loaded."""
        dtype = str(target.dtype).removeprefix("torch.")
        return cls.of_config(target.model.config, dtype, target.trust_remote_code)

    def weights_read(self, nodes: int) -> float:
        """Weights that a forward of `nodes` tokens reads: of the experts, the expected share that any of them uses."""
        unused = (1 - self.experts_per_token / self.experts) ** nodes if self.expert_parameters else 1.0
        return self.parameters + self.expert_parameters * (1 - unused)

    @property
    def weights_used(self) -> float:
        """Weights that each token is multiplied by."""
        return self.parameters + self.expert_parameters * self.experts_per_token / self.experts

    @property
    def bytes(self) -> int:
        """Bytes of the weights of the layers and the LM head."""
        return (self.parameters + self.expert_parameters) * BYTES[self.dtype]


@dataclass(frozen=True)
class DraftShape:
    """One level of drafting.

    dtype: of the weights.
    parameters: weights that a level reads, those of its LM head included.
    layers: decoder layers or blocks that a level runs.
    """

    dtype: str
    parameters: int
    layers: int = 1

    @classmethod
    def of_heads(cls, heads: Heads, dtype: str) -> DraftShape:
        """The level of heads that are bound to their target and not attached yet, so not packed.

        Heads with a module per depth run one of them in a level; others run all they have.
        """
        own = {id(weight): weight.numel() for weight in heads.parameters()}
        outputs = [{id(weight) for weight in heads.output_head(depth).weights if id(weight) in own} for depth in range(heads.depth)]
        body = sum(count for key, count in own.items() if key not in set().union(*outputs))
        modules = int(getattr(heads.config, "num_heads", None) or getattr(heads.config, "num_modules", None) or 1)
        output = max(sum(own[key] for key in keys) for keys in outputs)
        if output < heads.hidden:  # at most a norm: the LM head is the target's
            output += heads.hidden * heads.vocab
        return cls(dtype, body // modules + output)


def _first(config: Any, *names: str) -> int:
    """The first of these settings that a configuration has. Raises ValueError where it has none."""
    for name in names:
        if getattr(config, name, None):
            return int(getattr(config, name))
    raise ValueError(f"the model has experts, and its configuration has none of {', '.join(names)}; a forecast cannot count them")
