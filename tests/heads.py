"""Heads for any target, as training would start them, shaken a little so that every weight matters."""

from __future__ import annotations

from collections.abc import Callable

import torch

from headstart.drafters.eagle import Eagle, EagleConfig
from headstart.drafters.eagle3 import Eagle3, Eagle3Config
from headstart.drafters.heads import Heads
from headstart.drafters.hydra import Hydra, HydraConfig, HydraPlus, HydraPlusConfig
from headstart.drafters.medusa import Medusa, MedusaConfig
from headstart.drafters.mtp import Mtp, MtpConfig
from headstart.drafters.parallel import ParallelConfig, ParallelMtp
from headstart.target import Target

KINDS = ("medusa", "medusa, shared", "hydra", "hydra++", "mtp", "mtp, 3 modules", "mtp, hidden first", "mtp-parallel", "eagle",
         "eagle3", "eagle3.1, 40 tokens")  # fmt: skip


def heads_for(target: Target, kind: str, noise: float = 0.05, num_heads: int = 4) -> Heads:
    ends = target.ends
    sizes = ends.hidden, ends.vocab
    made: dict[str, Callable[[], Heads]] = {
        "medusa": lambda: Medusa(MedusaConfig(num_heads=num_heads, num_layers=2), *sizes),
        "medusa, shared": lambda: Medusa(MedusaConfig(num_heads=num_heads, projection="shared"), *sizes),
        "hydra": lambda: Hydra(HydraConfig(num_heads=num_heads, num_layers=2), *sizes),
        "hydra++": lambda: HydraPlus(HydraPlusConfig(num_heads=num_heads, num_layers=3, projection_bias=True), *sizes),
    }
    made |= {
        "mtp": lambda: Mtp(MtpConfig(depth=num_heads), *sizes),
        "mtp, 3 modules": lambda: Mtp(MtpConfig(num_modules=3, depth=num_heads + 1), *sizes),
        "mtp, hidden first": lambda: Mtp(MtpConfig(depth=num_heads, hidden_first=True), *sizes),
        "mtp-parallel": lambda: ParallelMtp(ParallelConfig(num_heads=num_heads), *sizes),
    }
    made |= {
        "eagle": lambda: Eagle(EagleConfig(depth=num_heads, bias=True), *sizes),
        "eagle3": lambda: Eagle3(
            Eagle3Config(depth=num_heads, taps=(0, 1), fc_norm=False, norm_output=False, norm_before_residual=True), *sizes
        ),
        "eagle3.1, 40 tokens": lambda: Eagle3(Eagle3Config(depth=num_heads, taps=(0, 1, -1), draft_vocab=40), *sizes),
    }
    torch.manual_seed(7)
    heads = made[kind]().to(target.dtype).bind(ends)
    heads.survey(torch.arange(ends.vocab) % 7, ())
    heads.start()
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(torch.randn_like(weight) * noise)
    return heads
