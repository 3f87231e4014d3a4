"""EAGLE heads as published: made-up tensors, and their logits by the formula."""

import torch
from literal import Layer, frequencies, unrolled
from published import HIDDEN, random

SIZES = {"num_attention_heads": 4, "hidden_size": HIDDEN, "rms_norm_eps": 1e-2, "num_hidden_layers": 1}


STEPS = 5  # as deep as heads draft, unless told otherwise


def layer_of(prefix, kv=2, size=8, heads=4, width=HIDDEN, reads=HIDDEN):
    """A Llama's attention and MLP, of `heads` queries. reads: width of what the attention reads."""
    rows = {"q": heads * size, "k": kv * size, "v": kv * size}
    found = {f"{prefix}self_attn.{name}_proj.weight": random(count, reads) for name, count in rows.items()}
    found[f"{prefix}self_attn.o_proj.weight"] = random(width, heads * size)
    found |= {f"{prefix}mlp.{name}_proj.weight": random(48, width) for name in ("gate", "up")}
    found[f"{prefix}mlp.down_proj.weight"] = random(width, 48)
    return found | {f"{prefix}post_attention_layernorm.weight": 1 + random(width)}


def heads(bias=False, kv=2, size=8, qkv_bias=False):
    torch.manual_seed(kv + size)
    found = {"fc.weight": random(HIDDEN, 2 * HIDDEN)} | layer_of("layers.0.", kv, size)
    found |= {"fc.bias": random(HIDDEN)} if bias else {}
    for name, count in {"q": 4 * size, "k": kv * size, "v": kv * size}.items() if qkv_bias else ():
        found[f"layers.0.self_attn.{name}_proj.bias"] = random(count)
    return found


def by_formula(trial, tensors, kv, size, theta=10000.0, eps=1e-2, table=None):
    """z = fc [e(x_i+1), f_i]; a Llama layer without its first norm; what comes out is the next f; the target's head says it."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    layer = Layer(lambda name: tensors.get(f"layers.0.{name}"), 4, kv, size, frequencies(size, theta), eps)

    def step(state, embedding, position, pasts):
        z = tensors["fc.weight"] @ torch.cat([embedding, state]) + tensors.get("fc.bias", 0)
        return layer.finish(z, z, position, pasts[0])

    embedded = trial.embedded if table is None else table.double()[trial.tokens]
    for row, states in enumerate(trial.states):
        said = unrolled(step, states, embedded[row], STEPS)
        yield [[trial.embed_head.logits(out) for out in outs] for outs in said]
