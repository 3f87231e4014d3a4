"""EAGLE-3 heads as published: made-up tensors, and their logits by the formula."""

import torch
from literal import Layer, frequencies, norm, unrolled
from published import HIDDEN, VOCAB, random

LAYERS, EPS = 8, 1e-2


THREE = (1, 3, 4)  # outputs that are read of eight layers where nothing is said


STEPS = 6


SIZES = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": EPS, "vocab_size": VOCAB, "num_hidden_layers": 1,
}  # fmt: skip


def linears(prefix, width, size, reads):
    rows = {"q": 4 * size, "k": 2 * size, "v": 2 * size}
    found = {f"{prefix}self_attn.{name}_proj.weight": random(count, reads) for name, count in rows.items()}
    found[f"{prefix}self_attn.o_proj.weight"] = random(width, 4 * size)
    found |= {f"{prefix}mlp.{name}_proj.weight": random(48, width) for name in ("gate", "up")}
    return found | {f"{prefix}mlp.down_proj.weight": random(width, 48)}


def heads(prefix="midlayer.", size=8, width=HIDDEN, draft=None, taps=3, layers=1):
    """draft: target's tokens that can be said, in the order of the rows; None for all."""
    torch.manual_seed(size + taps)
    found = {"fc.weight": random(width, taps * HIDDEN), "norm.weight": 1 + random(width)}
    found["lm_head.weight"] = random(VOCAB if draft is None else len(draft), width)
    for place in range(layers):
        name = f"layers.{place}." if place else prefix
        found |= linears(name, width, size, width if place else 2 * width)
        norms = ("input_layernorm", "post_attention_layernorm", *(() if place else ("hidden_norm",)))
        found |= {f"{name}{norm}.weight": 1 + random(width) for norm in norms}
    if draft is not None:
        found["d2t"] = torch.tensor(draft) - torch.arange(len(draft))
        found["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, torch.tensor(draft), True)
    return found


SOME = sorted(torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:60].tolist())


def by_formula(trial, tensors, size=8, prefix="midlayer.", taps=THREE, turns=None, layers=1, **switches):
    """g = fc [taps]; attention reads [norm(e), norm(g)]; g and its output are added up; what comes out is the next g, and is said
    by norm and head."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    turns = turns or frequencies(size, 10000.0)
    places = [prefix, *(f"layers.{place}." for place in range(1, layers))]
    first, *rest = (Layer(lambda name, place=place: tensors.get(place + name), 4, 2, size, turns, EPS) for place in places)

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
        fused = torch.stack([fuse(tensors, [trial.outputs[tap][row, place] for tap in taps]) for place in range(len(tokens))])
        outs = unrolled(step, fused, trial.embedded[row] if table is None else table[tokens], STEPS)
        yield [[say(tensors, out, switches.get("norm_output")) for out in places] for places in outs]


def through(layers, h, position, pasts):
    """Plain Llama layers behind the first."""
    for layer, past in zip(layers, pasts[1:], strict=False):
        h = layer.finish(h, layer.normed("input_layernorm", h), position, past)
    return h


def fuse(tensors, states):
    if "fc_norm.0.weight" in tensors:
        states = [norm(state, tensors[f"fc_norm.{place}.weight"], EPS) for place, state in enumerate(states)]
    together = torch.cat(states)
    if "input_norm.weight" in tensors:
        together = norm(together, tensors["input_norm.weight"], EPS)
    return tensors["fc.weight"] @ together + tensors.get("fc.bias", 0)


def say(tensors, out, is_normed):
    return tensors["lm_head.weight"] @ (out if is_normed else norm(out, tensors["norm.weight"], EPS))


def of_speculators(**config):
    layer = {name: value for name, value in SIZES.items() if name not in ("architectures", "num_hidden_layers")}
    verifier = {"verifier": {"name_or_path": "org/talker", "architectures": ["LlamaForCausalLM"]}}
    known = {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_config": verifier}
    return known | {"transformer_layer_config": layer | config.pop("layer", {})} | config
