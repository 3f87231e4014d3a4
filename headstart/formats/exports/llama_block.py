"""The decoder layer of EAGLE heads in the words of other engines: what their Llama layer lacks, and its keys in a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from headstart.formats.exports.base import Subject

THETA = 10000.0  # base of rotary positions where the heads' settings give none, as transformers takes it
_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "max_position_embeddings", "attention_bias", "mlp_bias",
)  # fmt: skip


def llama_keys(subject: Subject) -> dict[str, Any]:
    """The keys of a Llama's configuration that describe the heads' layers.

    Rotary positions are given in both forms: `rope_parameters` of transformers 5, and the older `rope_theta` and `rope_scaling`.
    """
    config = layer_config(subject).to_dict()
    rope = dict(config.get("rope_parameters") or {})
    theta = float(rope.setdefault("rope_theta", THETA))
    kind = rope.setdefault("rope_type", "default")
    older = {} if kind == "default" else {"rope_scaling": {name: value for name, value in rope.items() if name != "rope_theta"}}
    return {
        "model_type": "llama",
        **{key: config[key] for key in _KEYS},
        "rope_theta": theta,
        "rope_parameters": rope,
        **older,
        "vocab_size": subject.target_info.vocab,
        "tie_word_embeddings": False,
        "bos_token_id": subject.text_config.bos_token_id,
        "eos_token_id": subject.text_config.eos_token_id,
        "dtype": str(subject.stored_dtype).removeprefix("torch."),
    }


def layer_config(subject: Subject) -> Any:
    """The configuration of the heads' layers, as transformers has it."""
    block: Any = subject.heads.block
    return block.config


def check_layer(subject: Subject, engine: str, has_biases: bool, has_many: bool) -> None:
    """Raise ValueError for layers that the engine would compute differently from ours, or whose tensors it would drop.

    has_biases: whether its attention and MLP have biases where the configuration says so.
    has_many: whether it reads more layers than one.
    """
    config, block = layer_config(subject), "headstart train --set block=null"
    if config.model_type != "llama":
        raise ValueError(
            f"these heads have a layer of the type {config.model_type!r}, and {engine} computes a Llama's, without what is "
            f"added to it; train a Llama layer, the default (`{block}`)"
        )
    if (config.attention_bias or config.mlp_bias) and not has_biases:
        raise ValueError(f"these heads' layer has biases, which {engine} drops without a word; train it without (`{block}`)")
    if config.num_hidden_layers > 1 and not has_many:
        raise ValueError(
            f"these heads have {config.num_hidden_layers} layers, and {engine} reads one; train one, the default (`{block}`)"
        )


def check_context(subject: Subject, engine: str) -> None:
    """Raise ValueError for heads that read only the beginning of texts: no engine has such a limit."""
    context, longest = subject.config.context, getattr(subject.text_config, "max_position_embeddings", None)
    if context is not None and (longest is None or context < longest):
        raise ValueError(
            f"these heads read the first {context} positions of a text only, a limit that {engine} does not have, and their target "
            f"has {longest or 'more'}; serve them with headstart, or train heads without it (`headstart train --set context=null`)"
        )


def check_embedding(subject: Subject, engine: str) -> None:
    """Raise ValueError where heads share an embedding that the target changes: engines share only its weights."""
    if subject.config.embedding == "own":
        return
    embedding = subject.embed_head.embedding
    weight: Any = embedding.weight
    tokens = torch.arange(min(64, len(weight)))
    if not torch.equal(subject.embed_head.embed(tokens).detach(), weight.detach()[tokens]):
        raise ValueError(
            f"{type(subject.model).__name__} changes its embeddings, as by a scale, and {engine} gives heads the bare weights; "
            "train heads with an embedding of their own (`headstart train --set embedding=own`)"
        )


def check_lm_head(subject: Subject, engine: str) -> None:
    """Raise ValueError where heads share an LM head with a bias: engines share only its weights."""
    if getattr(subject.embed_head.lm_head, "bias", None) is not None:
        raise ValueError(
            f"{type(subject.model).__name__} has an LM head with a bias, which {engine} does not give to heads that share it; use "
            "heads with LM heads of their own, as EAGLE-3's (`headstart train eagle3`)"
        )


def layer_names(names: Sequence[str], renames: Mapping[str, str]) -> dict[str, str]:
    """Maps our tensor names to theirs. renames: prefixes, ours to theirs; the first that fits applies."""
    theirs = {}
    for name in names:
        ours = next((prefix for prefix in renames if name.startswith(prefix)), "")
        theirs[name] = renames.get(ours, "") + name.removeprefix(ours)
    return theirs
