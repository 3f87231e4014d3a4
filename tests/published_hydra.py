"""Hydra heads as published: made-up tensors, and their logits by the formula."""

import torch
from published import HIDDEN, VOCAB, random
from torch import Tensor
from torch.nn.functional import silu

WHERE = "prefix_embeding_layer."  # as published


def heads_of(heads, layers, offset, bias=True):
    """As the authors' ModuleLists name them. offset 1: dropout stands before each block. Blocks after the first are one block."""
    torch.manual_seed(heads + layers)
    found = {}
    for i in range(heads):
        block, places = (random(HIDDEN, HIDDEN), random(HIDDEN)), [offset + (1 + offset) * j for j in range(layers)]
        width, first = (i + 2) * HIDDEN, f"hydra_mlp.{i}.{places[0]}"
        found |= {f"{first}.linear.weight": random(HIDDEN, width), f"{first}.linear.bias": random(HIDDEN)}
        found |= {f"{first}.res_connection.weight": random(HIDDEN, width), f"{first}.res_connection.bias": random(HIDDEN)}
        for place in places[1:]:
            found |= {f"hydra_mlp.{i}.{place}.linear.weight": block[0], f"hydra_mlp.{i}.{place}.linear.bias": block[1]}
        last = f"hydra_lm_head.{i}.1." if offset else f"hydra_lm_head.{i}."
        found[f"{last}weight"] = random(VOCAB, HIDDEN)
        found |= {f"{last}bias": random(VOCAB)} if bias else {}
    return found


def prefix_of(prefix=WHERE, kv=HIDDEN // 2):
    """One Llama decoder layer, a norm, and copies that nothing reads; sizes of the target's own layers."""
    names, layer = {"q": HIDDEN, "k": kv, "v": kv, "o": HIDDEN}, f"{prefix}layers.0."
    found = {f"{layer}self_attn.{name}_proj.weight": random(size, HIDDEN) for name, size in names.items()}
    found |= {f"{layer}mlp.{name}_proj.weight": random(64, HIDDEN) for name in ("gate", "up")}
    found |= {f"{layer}mlp.down_proj.weight": random(HIDDEN, 64)}
    norms = (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", f"{prefix}norm")
    found |= {f"{norm}.weight": 1 + random(HIDDEN) for norm in norms}
    return found | {f"{prefix}embed_tokens.weight": random(VOCAB, HIDDEN), f"{layer}self_attn.rotary_emb.inv_freq": random(8)}


def by_formula(trial, tensors, heads, layers, offset, states):
    """z = c, e(x_t+1), ..., e(x_t+1+i) side by side; y = R z + SiLU(W z + b); blocks x + SiLU(W x + b); a projection."""
    for i in range(heads):
        get = lambda name, i=i: tensors[f"hydra_mlp.{i}.{name}"]  # noqa: E731
        shifted = [trial.embedded.roll(-1 - j, 1) for j in range(i + 1)]
        z = torch.cat([states, *shifted], -1)
        y = z @ get(f"{offset}.res_connection.weight").T + get(f"{offset}.res_connection.bias")
        y = y + silu(z @ get(f"{offset}.linear.weight").T + get(f"{offset}.linear.bias"))
        for j in range(1, layers):
            place = offset + (1 + offset) * j
            y = y + silu(y @ get(f"{place}.linear.weight").T + get(f"{place}.linear.bias"))
        last = f"hydra_lm_head.{i}.1." if offset else f"hydra_lm_head.{i}."
        yield y @ tensors[f"{last}weight"].T + tensors.get(f"{last}bias", 0)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions of [length, size], halves side by side."""
    length, size = x.shape
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    a, b = x.split(size // 2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def llama_layer(h: Tensor, get) -> Tensor:
    """A Llama's decoder layer and final norm over [length, hidden], two heads of 16 that share keys and values."""
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
