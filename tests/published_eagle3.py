"""EAGLE-3 heads as published: random tensors, and their logits by the formula."""

import torch
from literal import Layer, frequencies, norm, unrolled
from published import HIDDEN, VOCAB, random

LAYERS, EPS = 8, 1e-2


THREE = (1, 3, 4)  # layers of eight that heads read where their configuration names none


STEPS = 6


SIZES = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": EPS, "vocab_size": VOCAB, "num_hidden_layers": 1,
}  # fmt: skip


def linears(prefix, width, size, reads):
    rows = {"q": 4 * size, "k": 2 * size, "v": 2 * size}
    tensors = {f"{prefix}self_attn.{name}_proj.weight": random(count, reads) for name, count in rows.items()}
    tensors[f"{prefix}self_attn.o_proj.weight"] = random(width, 4 * size)
    tensors |= {f"{prefix}mlp.{name}_proj.weight": random(48, width) for name in ("gate", "up")}
    return tensors | {f"{prefix}mlp.down_proj.weight": random(width, 48)}


def heads(prefix="midlayer.", size=8, width=HIDDEN, draft=None, taps=3, layers=1):
    """Tensors of heads in the authors' names. draft: ids of the draft vocabulary, in the order of the rows; None: all tokens."""
    torch.manual_seed(size + taps)
    tensors = {"fc.weight": random(width, taps * HIDDEN), "norm.weight": 1 + random(width)}
    tensors["lm_head.weight"] = random(VOCAB if draft is None else len(draft), width)
    for index in range(layers):
        name = f"layers.{index}." if index else prefix
        tensors |= linears(name, width, size, width if index else 2 * width)
        norms = ("input_layernorm", "post_attention_layernorm", *(() if index else ("hidden_norm",)))
        tensors |= {f"{name}{norm}.weight": 1 + random(width) for norm in norms}
    if draft is not None:
        tensors["d2t"] = torch.tensor(draft) - torch.arange(len(draft))
        tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, torch.tensor(draft), True)
    return tensors


SOME = sorted(torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:60].tolist())


def by_formula(trial, tensors, size=8, prefix="midlayer.", taps=THREE, rotary=None, layers=1, **switches):
    """Logits in float64: g = fc [taps]; attention reads [norm(e), norm(g)], and its output is added to g; the layer's output is the
    next g, and norm and LM head turn it into logits. (EAGLE-3, Li et al. 2025)"""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    rotary = rotary or frequencies(size, 10000.0)
    prefixes = [prefix, *(f"layers.{index}." for index in range(1, layers))]
    first, *rest = (Layer(lambda name, at=at: tensors.get(at + name), 4, 2, size, rotary, EPS) for at in prefixes)

    def step(state, embedding, position, pasts):
        normed = first.normed("hidden_norm", state)
        x = torch.cat([first.normed("input_layernorm", embedding), normed])
        residual = normed if switches.get("norm_before_residual") else state
        out = first.finish(residual, x, position, pasts[0]) if not rest else None
        if out is None:
            out = through(rest, first.finish(residual, x, position, pasts[0]), position, pasts)
        return norm(out, tensors["norm.weight"], EPS) if switches.get("norm_output") else out

    table = tensors.get("embed_tokens.weight")
    for row, tokens in enumerate(trial.tokens):
        fused = torch.stack([fuse(tensors, [trial.outputs[tap][row, index] for tap in taps]) for index in range(len(tokens))])
        outs = unrolled(step, fused, trial.embedded[row] if table is None else table[tokens], STEPS)
        yield [[logits(tensors, out, switches.get("norm_output")) for out in steps] for steps in outs]


def through(layers, h, position, pasts):
    """The hidden state after the plain Llama layers that follow the first layer."""
    for layer, past in zip(layers, pasts[1:], strict=False):
        h = layer.finish(h, layer.normed("input_layernorm", h), position, past)
    return h


def fuse(tensors, states):
    if "fc_norm.0.weight" in tensors:
        states = [norm(state, tensors[f"fc_norm.{index}.weight"], EPS) for index, state in enumerate(states)]
    together = torch.cat(states)
    if "input_norm.weight" in tensors:
        together = norm(together, tensors["input_norm.weight"], EPS)
    return tensors["fc.weight"] @ together + tensors.get("fc.bias", 0)


def logits(tensors, out, is_normed):
    return tensors["lm_head.weight"] @ (out if is_normed else norm(out, tensors["norm.weight"], EPS))


def of_speculators(**config):
    layer = {name: value for name, value in SIZES.items() if name not in ("architectures", "num_hidden_layers")}
    verifier = {"verifier": {"name_or_path": "org/talker", "architectures": ["LlamaForCausalLM"]}}
    known = {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_config": verifier}
    return known | {"transformer_layer_config": layer | config.pop("layer", {})} | config
