"""Heads for any target, as training would start them, shaken a little so that every weight matters."""

from __future__ import annotations

import torch

from headstart.drafters.heads import Heads
from headstart.drafters.hydra import Hydra, HydraConfig, PrefixConfig
from headstart.drafters.medusa import Medusa, MedusaConfig
from headstart.target import Target

KINDS = ("medusa", "medusa, shared", "hydra", "hydra++")


def heads_for(target: Target, kind: str, noise: float = 0.05, num_heads: int = 4) -> Heads:
    ends = target.ends
    configs = {
        "medusa": MedusaConfig(num_heads=num_heads, num_layers=2),
        "medusa, shared": MedusaConfig(num_heads=num_heads, projection="shared"),
        "hydra": HydraConfig(num_heads=num_heads, num_layers=2),
        "hydra++": HydraConfig(
            num_heads=num_heads, num_layers=3, projection_bias=True, prefix=PrefixConfig.for_hidden(ends.hidden)
        ),
    }
    config = configs[kind]
    torch.manual_seed(7)
    made: Heads = (Medusa if isinstance(config, MedusaConfig) else Hydra)(config, ends.hidden, ends.vocab)  # type: ignore[arg-type]
    made = made.to(target.dtype).bind(ends).start()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * noise)
    return made
