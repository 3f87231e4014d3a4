"""The arms of the experiment: trunks of one shape that start with the same weights and read the same blocks in the same order.

They differ in the heads that are trained with them. The module must not import what measures them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.training.pretrain import TRUNK, pretrain
from headstart.training.run_config import PretrainConfig
from recipes.mtp_quality.texts import train

PLAIN = "none"
LENGTH = 257  # tokens of a block: 256 predictions

# 1.02 M parameters: half in embeddings, half in three layers.
SHAPE: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": [0, 3], "pad_token_id": 0,
}  # fmt: skip

# Losses of heads are averaged over depths, so a weight of 3 for three heads is the unweighted sum of Gloeckle et al.
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "mtp-parallel": {"heads": {"mtp-parallel": {"num_heads": 3}}, "weight": 3.0},
    "mtp": {"heads": {"mtp": {"num_modules": 1, "depth": 2}}, "weight": 0.3},
}

KEYS: dict[str, Any] = {
    "optimizer": "muon", "learning_rate": 0.01, "warmup": 0.05, "floor": 0.1, "rows": 8, "precision": "bf16", "held_out": 0.0,
    "save_every": 100, "log_every": 50, "device": "cpu", "threads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """Folders and settings of all runs.

    work: folder that `recipes.embedded.prepare` wrote.
    out: folder for all runs.
    tokens: that each run reads.
    shape: configuration of the trunk.
    keys: settings of all runs, on top of `KEYS`.
    """

    work: Path
    out: Path
    tokens: int
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.work / "tokenizer"

    @property
    def length(self) -> int:
        """Tokens of a block."""
        return self.keys.get("length", LENGTH)

    def folder(self, arm: str, seed: int) -> Path:
        """Folder of one run."""
        return self.out / f"{arm}-{seed}"

    def trunk(self, arm: str, seed: int) -> Path:
        """Model folder of one run's trunk."""
        return self.folder(arm, seed) / TRUNK

    def config(self, arm: str, seed: int) -> PretrainConfig:
        """The configuration of one run."""
        model = self.out / "shape" / "config.json"
        model.parent.mkdir(parents=True, exist_ok=True)
        model.write_text(json.dumps(self.shape))
        return PretrainConfig(
            model=model, tokenizer=str(self.tokenizer), out=self.folder(arm, seed), seed=seed,
            **KEYS | self.keys | {"length": self.length} | ARMS[arm] | train(self.work, self.tokens),
        )  # fmt: skip


def run(experiment: Experiment, arm: str, seed: int) -> None:
    """Pretrain one arm; a killed run is resumed, and one that has ended is not repeated."""
    if not (experiment.folder(arm, seed) / "training.json").exists():
        pretrain(experiment.config(arm, seed), resume=True)
