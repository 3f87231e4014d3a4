"""Hydra heads as published: random tensors, and their logits by the formula."""

import torch
from published import HIDDEN, VOCAB, random
from torch import Tensor
from torch.nn.functional import silu

WHERE = "prefix_embeding_layer."  # as published


def heads_of(heads, layers, offset, bias=True):
    """Tensors under the authors' names. offset 1: dropout before each block. Blocks after the first are equal."""
    torch.manual_seed(heads + layers)
    tensors = {}
    for i in range(heads):
        block, indices = (random(HIDDEN, HIDDEN), random(HIDDEN)), [offset + (1 + offset) * j for j in range(layers)]
        width, first = (i + 2) * HIDDEN, f"hydra_mlp.{i}.{indices[0]}"
        tensors |= {f"{first}.linear.weight": random(HIDDEN, width), f"{first}.linear.bias": random(HIDDEN)}
        tensors |= {f"{first}.res_connection.weight": random(HIDDEN, width), f"{first}.res_connection.bias": random(HIDDEN)}
        for index in indices[1:]:
            tensors |= {f"hydra_mlp.{i}.{index}.linear.weight": block[0], f"hydra_mlp.{i}.{index}.linear.bias": block[1]}
        last = f"hydra_lm_head.{i}.1." if offset else f"hydra_lm_head.{i}."
        tensors[f"{last}weight"] = random(VOCAB, HIDDEN)
        tensors |= {f"{last}bias": random(VOCAB)} if bias else {}
    return tensors


def prefix_of(prefix=WHERE, kv=HIDDEN // 2):
    """Tensors of one Llama decoder layer of the target's sizes, a norm, and copies that nothing reads."""
    names, layer = {"q": HIDDEN, "k": kv, "v": kv, "o": HIDDEN}, f"{prefix}layers.0."
    tensors = {f"{layer}self_attn.{name}_proj.weight": random(size, HIDDEN) for name, size in names.items()}
    tensors |= {f"{layer}mlp.{name}_proj.weight": random(64, HIDDEN) for name in ("gate", "up")}
    tensors |= {f"{layer}mlp.down_proj.weight": random(HIDDEN, 64)}
    norms = (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", f"{prefix}norm")
    tensors |= {f"{norm}.weight": 1 + random(HIDDEN) for norm in norms}
    return tensors | {f"{prefix}embed_tokens.weight": random(VOCAB, HIDDEN), f"{layer}self_attn.rotary_emb.inv_freq": random(8)}


def by_formula(trial, tensors, heads, layers, offset, states):
    """Logits: z = [c, e(x_t+1), ..., e(x_t+1+i)]; y = R z + SiLU(W z + b); blocks x + SiLU(W x + b); a projection."""
    for i in range(heads):
        get = lambda name, i=i: tensors[f"hydra_mlp.{i}.{name}"]  # noqa: E731
        shifted = [trial.embedded.roll(-1 - j, 1) for j in range(i + 1)]
        z = torch.cat([states, *shifted], -1)
        y = z @ get(f"{offset}.res_connection.weight").T + get(f"{offset}.res_connection.bias")
        y = y + silu(z @ get(f"{offset}.linear.weight").T + get(f"{offset}.linear.bias"))
        for j in range(1, layers):
            index = offset + (1 + offset) * j
            y = y + silu(y @ get(f"{index}.linear.weight").T + get(f"{index}.linear.bias"))
        last = f"hydra_lm_head.{i}.1." if offset else f"hydra_lm_head.{i}."
        yield y @ tensors[f"{last}weight"].T + tensors.get(f"{last}bias", 0)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions applied to x [length, size]; its two halves are rotated against each other."""
    length, size = x.shape
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    a, b = x.split(size // 2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def llama_layer(h: Tensor, get) -> Tensor:
    """A Llama decoder layer and final norm over [length, hidden]: two attention heads of 16 that share keys and values."""
    x, mixed = norm(h, get("layers.0.input_layernorm")), []
    q, k, v = (x @ get(f"layers.0.self_attn.{name}_proj").T for name in "qkv")
    for head in q.split(16, -1):
        scores = rotated(head) @ rotated(k).T / 16**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(-1) @ v)
    h = h + torch.cat(mixed, -1) @ get("layers.0.self_attn.o_proj").T
    x = norm(h, get("layers.0.post_attention_layernorm"))
    gate, up = (x @ get(f"layers.0.mlp.{name}_proj").T for name in ("gate", "up"))
    return norm(h + (silu(gate) * up) @ get("layers.0.mlp.down_proj").T, get("norm"))
