"""Medusa heads as published: made-up tensors, and their logits by the formula."""

import torch
from published import HIDDEN, VOCAB, random
from torch.nn.functional import silu


def parts(heads, layers, vocab=VOCAB):
    """[heads] of ([layers] of (W, b), projection), as in the paper."""
    torch.manual_seed(heads)
    return [([(random(HIDDEN, HIDDEN), random(HIDDEN)) for _ in range(layers)], random(vocab, HIDDEN)) for _ in range(heads)]


def numbered(made, prefix="", project=True):
    """The names of the authors' ModuleList."""
    found = {}
    for i, (blocks, projection) in enumerate(made):
        for j, (weight, bias) in enumerate(blocks):
            found |= {f"{prefix}{i}.{j}.linear.weight": weight, f"{prefix}{i}.{j}.linear.bias": bias}
        if project:
            found[f"{prefix}{i}.{len(blocks)}.weight"] = projection
    return found


def vllm(made, prefix="", linear="", bias=True):
    found = {}
    for i, (blocks, projection) in enumerate(made):
        for j, (weight, b) in enumerate(blocks):
            found[f"{prefix}blocks.{i}.layers.{j}.{linear}weight"] = weight
            found |= {f"{prefix}blocks.{i}.layers.{j}.{linear}bias": b} if bias else {}
        found[f"{prefix}lm_heads.{i}.weight"] = projection
    return found


def by_formula(trial, made, project=True, bias=True):
    """logits_k = W2_k (h + SiLU(W1_k h + b_k)), block after block; with the target's head where there is no W2."""
    head = trial.model.lm_head.weight
    for blocks, projection in made:
        h = trial.states
        for weight, b in blocks:
            h = h + silu(h @ weight.T + b * bias)
        yield h @ (projection if project else head).detach().T
