"""Heads for any target, initialised as training does, with noise on every weight; and rows whose every choice is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from headstart.drafters.eagle import Eagle, EagleConfig
from headstart.drafters.eagle3 import Eagle3, Eagle3Config
from headstart.drafters.hydra import Hydra, HydraConfig, HydraPlus, HydraPlusConfig
from headstart.drafters.medusa import Medusa, MedusaConfig
from headstart.drafters.mtp import Mtp, MtpConfig
from headstart.drafters.mtp_parallel import ParallelConfig, ParallelMtp
from headstart.drafters.parts.heads import Heads
from headstart.speculation.distribution import SamplingTensors
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Plan
from headstart.speculation.rows import Choice
from headstart.target.target import Target

KINDS = ("medusa", "medusa, shared", "hydra", "hydra++", "mtp", "mtp, 3 modules", "mtp, hidden first", "mtp-parallel", "eagle",
         "eagle3", "eagle3.1, 40 tokens")  # fmt: skip


def heads_for(target: Target, kind: str, noise: float = 0.05, num_heads: int = 4) -> Heads:
    """Heads of one of `KINDS`, bound to the target. noise: standard deviation of what is added to each initial weight."""
    embed_head = target.embed_head
    sizes = embed_head.hidden, embed_head.vocab
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
    heads = made[kind]().to(target.dtype).bind(embed_head)
    heads.choose_vocab(torch.arange(embed_head.vocab) % 7, ())
    heads.init_from_target()
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(torch.randn_like(weight) * noise)
    return heads


@dataclass
class Forced:
    """Stands in for `Rows`: every choice is the text's own next token.

    texts: per row.
    root_positions: per row, the position of its root.
    depths: per row, how deep it drafts.
    logits: by (row, level), the drafter's logits that a choice was made from.
    """

    texts: list[list[int]]
    root_positions: tuple[int, ...]
    depths: tuple[int, ...]
    plan: ClassVar = Plan(depth=64, width=1, beam=1, nodes=10**6)
    sampling: ClassVar = SamplingTensors.of([SamplingParams()], [0])
    depends_on_paths: ClassVar = False
    logits: dict = field(default_factory=dict)

    def __post_init__(self):
        self.seats = tuple(range(len(self.texts)))
        self.roots = tuple(text[position] for text, position in zip(self.texts, self.root_positions, strict=True))
        self.drafting = tuple(row for row, depth in enumerate(self.depths) if depth > 0)
        self.max_depth = max(self.depths)

    def __len__(self):
        return len(self.texts)

    def choose(self, logits, level, paths, k, ids=None, calibration=None):
        rows = paths.rows.tolist()
        self.logits |= {(row, level): line for row, line in zip(rows, logits, strict=True)}
        tokens = torch.tensor([[self.texts[row][self.root_positions[row] + level]] for row in rows])
        return Choice(tokens, torch.ones(len(rows), 1), None)
