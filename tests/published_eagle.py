"""EAGLE heads as published: random tensors, and their logits by the formula."""

import torch
from literal import Layer, frequencies, unrolled
from published import HIDDEN, random

SIZES = {"num_attention_heads": 4, "hidden_size": HIDDEN, "rms_norm_eps": 1e-2, "num_hidden_layers": 1}


STEPS = 5  # the heads' default draft depth


def layer_of(prefix, kv=2, size=8, heads=4, width=HIDDEN, reads=HIDDEN):
    """Tensors of a Llama layer's attention and MLP, with `heads` attention heads. reads: width of the attention's input."""
    rows = {"q": heads * size, "k": kv * size, "v": kv * size}
    tensors = {f"{prefix}self_attn.{name}_proj.weight": random(count, reads) for name, count in rows.items()}
    tensors[f"{prefix}self_attn.o_proj.weight"] = random(width, heads * size)
    tensors |= {f"{prefix}mlp.{name}_proj.weight": random(48, width) for name in ("gate", "up")}
    tensors[f"{prefix}mlp.down_proj.weight"] = random(width, 48)
    return tensors | {f"{prefix}post_attention_layernorm.weight": 1 + random(width)}


def heads(bias=False, kv=2, size=8, qkv_bias=False):
    torch.manual_seed(kv + size)
    tensors = {"fc.weight": random(HIDDEN, 2 * HIDDEN)} | layer_of("layers.0.", kv, size)
    tensors |= {"fc.bias": random(HIDDEN)} if bias else {}
    for name, count in {"q": 4 * size, "k": kv * size, "v": kv * size}.items() if qkv_bias else ():
        tensors[f"layers.0.self_attn.{name}_proj.bias"] = random(count)
    return tensors


def by_formula(trial, tensors, kv, size, theta=10000.0, eps=1e-2, own_embedding=None):
    """z = fc [e(x_i+1), f_i]; a Llama layer without its first norm gives the next f; the target's LM head gives logits."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    layer = Layer(lambda name: tensors.get(f"layers.0.{name}"), 4, kv, size, frequencies(size, theta), eps)

    def step(state, embedding, position, pasts):
        z = tensors["fc.weight"] @ torch.cat([embedding, state]) + tensors.get("fc.bias", 0)
        return layer.finish(z, z, position, pasts[0])

    embedded = trial.embedded if own_embedding is None else own_embedding.double()[trial.tokens]
    for row, states in enumerate(trial.states):
        outputs = unrolled(step, states, embedded[row], STEPS)
        yield [[trial.embed_head.logits(out) for out in outs] for outs in outputs]
