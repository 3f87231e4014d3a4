"""Tiny random models, one of every architecture: three layers, a vocabulary of 97, windows and chunks of 8 tokens."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

from headstart.target.target import Target

VOCAB = 97
WINDOW = 8

Config = Callable[[], Any]

_SHAPE = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
_COMMON = _SHAPE | {"intermediate_size": 96, "num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

ARCHITECTURES: dict[str, Config] = {
    "llama": lambda: hf.LlamaConfig(**_COMMON),
    "qwen2": lambda: hf.Qwen2Config(**_COMMON),
    "qwen3": lambda: hf.Qwen3Config(**_COMMON, head_dim=16),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **_COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "mistral": lambda: hf.MistralConfig(**_COMMON, sliding_window=WINDOW),
    "mixtral": lambda: hf.MixtralConfig(**_COMMON, num_local_experts=4),
    "gemma2": lambda: hf.Gemma2Config(
        **_COMMON, head_dim=16, sliding_window=WINDOW, layer_types=_MIXED, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_COMMON, head_dim=16, sliding_window=WINDOW, layer_types=_MIXED, tie_word_embeddings=False
    ),
    "phi3": lambda: hf.Phi3Config(**_COMMON, pad_token_id=0),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SHAPE, intermediate_size=96),
    "gpt2": lambda: hf.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=128),
    "opt": lambda: hf.OPTConfig(**_SHAPE, ffn_dim=96, word_embed_proj_dim=64),
    "olmo2": lambda: hf.Olmo2Config(**_COMMON),
    "glm4": lambda: hf.Glm4Config(**_COMMON, head_dim=16, pad_token_id=0),
    "cohere": lambda: hf.CohereConfig(**_COMMON),
    "smollm3": lambda: hf.SmolLM3Config(**_COMMON, pad_token_id=0, no_rope_layers=[1, 0, 1]),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **_SHAPE, intermediate_size=96, moe_intermediate_size=32, num_key_value_heads=4, n_routed_experts=8, n_group=2,
        topk_group=1, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, v_head_dim=12,
        qk_nope_head_dim=16, first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: hf.GptOssConfig(**_COMMON, **_EXPERTS, head_dim=16, sliding_window=WINDOW, layer_types=_MIXED),
    "llama4": lambda: hf.Llama4TextConfig(
        **_COMMON, head_dim=16, num_local_experts=2, attention_chunk_size=WINDOW, intermediate_size_mlp=96,
        no_rope_layers=[1, 0, 1], attn_temperature_tuning=False,
        layer_types=["chunked_attention", "full_attention", "chunked_attention"],
    ),
    "cohere2": lambda: hf.Cohere2Config(**_COMMON, sliding_window=WINDOW, layer_types=_MIXED),
    "jetmoe": lambda: hf.JetMoeConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, num_key_value_heads=2, kv_channels=16, intermediate_size=96,
        max_position_embeddings=128, num_local_experts=4,
    ),
    "afmoe": lambda: hf.AfmoeConfig(
        **_COMMON, head_dim=16, moe_intermediate_size=32, num_dense_layers=1, num_experts=4, num_experts_per_tok=2,
        sliding_window=WINDOW, layer_types=_MIXED,
    ),
}  # fmt: skip

# Models that cannot be scored exactly in one forward, and a part of the message that says why.
REFUSED: dict[str, tuple[Config, str]] = {
    "Qwen3NextForCausalLM": (
        lambda: hf.Qwen3NextConfig(
            **_COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            shared_expert_intermediate_size=32, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
            linear_value_head_dim=16, layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
        "keeps a state of its own in 2 of 3 layers",
    ),
    "FalconH1ForCausalLM": (  # attention and Mamba side by side in every layer
        lambda: hf.FalconH1Config(
            **_COMMON, head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8
        ),
        "beside its attention, FalconH1Mixer carries a state",
    ),
    "JambaForCausalLM": (
        lambda: hf.JambaConfig(
            **_COMMON, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
            num_experts=2, num_experts_per_tok=1,
        ),
        "keeps a state of its own in 2 of 3 layers",
    ),
    "Lfm2ForCausalLM": (
        lambda: hf.Lfm2Config(**_COMMON, layer_types=["conv", "full_attention", "conv"]),
        "keeps a state of its own in 2 of 3 layers",
    ),
    "BertLMHeadModel": (lambda: hf.BertConfig(**_SHAPE, intermediate_size=96), "sees later tokens too"),
    "ElectraForCausalLM": (
        lambda: hf.ElectraConfig(**_SHAPE, embedding_size=64, intermediate_size=96), "sees later tokens too"
    ),
    "Mamba2ForCausalLM": (
        lambda: hf.Mamba2Config(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=16, n_groups=2
        ),
        "bypasses the attention interface",
    ),
    "BloomForCausalLM": (lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4), "bypasses the attention"),
    "StableLmForCausalLM": (lambda: hf.StableLmConfig(**_COMMON), "cannot be a target"),
    "GPTJForCausalLM": (
        lambda: hf.GPTJConfig(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
        "cannot be a target",
    ),
    "FalconForCausalLM": (
        lambda: hf.FalconConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
        "cannot be a target",
    ),
}  # fmt: skip


def random_model(config: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model of this configuration with weights so large that attention and positions decide its output, and no stop token."""
    model = hf.AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype)  # no grouped fp64 product
    if getattr(config, "attn_logit_softcapping", None):  # torch's attention ignores it before transformers 5.23
        model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.2
            weight.copy_(noise if weight.dim() > 1 else weight + noise)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.config.eos_token_id = None
    return model.eval()


def tiny(name: str = "llama", dtype: torch.dtype = torch.float64) -> Target:
    """A target of that architecture, shared by all tests: none may change it."""
    return _tiny(name, dtype)


@cache
def _tiny(name: str, dtype: torch.dtype) -> Target:
    return Target(random_model(ARCHITECTURES[name](), dtype))


def cut(model: Any, layers: int) -> Target:
    """A target of the first layers of a Llama: a draft model that is often right."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    shorter = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=model.dtype)
    keys = shorter.load_state_dict(model.state_dict(), strict=False)
    assert not keys.missing_keys
    return Target(shorter)
