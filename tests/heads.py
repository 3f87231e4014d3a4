"""Heads for any target, as training would start them, shaken a little so that every weight matters."""

from __future__ import annotations

from collections.abc import Callable

import torch

from headstart.drafters.heads import Heads
from headstart.drafters.hydra import Hydra, HydraConfig, HydraPlus, HydraPlusConfig
from headstart.drafters.medusa import Medusa, MedusaConfig
from headstart.target import Target

KINDS = ("medusa", "medusa, shared", "hydra", "hydra++")


def heads_for(target: Target, kind: str, noise: float = 0.05, num_heads: int = 4) -> Heads:
    ends = target.ends
    sizes = ends.hidden, ends.vocab
    made: dict[str, Callable[[], Heads]] = {
        "medusa": lambda: Medusa(MedusaConfig(num_heads=num_heads, num_layers=2), *sizes),
        "medusa, shared": lambda: Medusa(MedusaConfig(num_heads=num_heads, projection="shared"), *sizes),
        "hydra": lambda: Hydra(HydraConfig(num_heads=num_heads, num_layers=2), *sizes),
        "hydra++": lambda: HydraPlus(HydraPlusConfig(num_heads=num_heads, num_layers=3, projection_bias=True), *sizes),
    }
    torch.manual_seed(7)
    heads = made[kind]().to(target.dtype).bind(ends).start()
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(torch.randn_like(weight) * noise)
    return heads
