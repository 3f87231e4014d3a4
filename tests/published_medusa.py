"""Medusa heads as published: tensors of random numbers, and their logits by the formula."""

import torch
from published import HIDDEN, VOCAB, random
from torch.nn.functional import silu


def parts(heads, layers, vocab=VOCAB):
    """For each head ([layers] of (W, b), projection), as in the paper."""
    torch.manual_seed(heads)
    return [([(random(HIDDEN, HIDDEN), random(HIDDEN)) for _ in range(layers)], random(vocab, HIDDEN)) for _ in range(heads)]


def numbered(heads, prefix="", project=True):
    """Tensors under the names of the authors' ModuleList."""
    tensors = {}
    for i, (blocks, projection) in enumerate(heads):
        for j, (weight, bias) in enumerate(blocks):
            tensors |= {f"{prefix}{i}.{j}.linear.weight": weight, f"{prefix}{i}.{j}.linear.bias": bias}
        if project:
            tensors[f"{prefix}{i}.{len(blocks)}.weight"] = projection
    return tensors


def vllm(heads, prefix="", linear="", bias=True):
    """Tensors under vLLM's names."""
    tensors = {}
    for i, (blocks, projection) in enumerate(heads):
        for j, (weight, b) in enumerate(blocks):
            tensors[f"{prefix}blocks.{i}.layers.{j}.{linear}weight"] = weight
            tensors |= {f"{prefix}blocks.{i}.layers.{j}.{linear}bias": b} if bias else {}
        tensors[f"{prefix}lm_heads.{i}.weight"] = projection
    return tensors


def by_formula(trial, heads, project=True, bias=True):
    """logits_k = W2_k (h + SiLU(W1_k h + b_k)), block after block (Medusa, section 2.1.1); the target's LM head without a W2."""
    head = trial.model.lm_head.weight
    for blocks, projection in heads:
        h = trial.states
        for weight, b in blocks:
            h = h + silu(h @ weight.T + b * bias)
        yield h @ (projection if project else head).detach().T
