"""Writing the features of a target for training: the target is run once over the texts, beside no trainer.

It works under `accelerate launch` on any number of processes; under FSDP2 the target's layers are divided among them. The module
must not import `headstart.engine` or `headstart.cli`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headstart.drafters.registry import method
from headstart.formats import describe_target
from headstart.target.embed_head import EmbedHead
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.training.feature_store import Store
from headstart.training.feature_writer import Writer
from headstart.training.features import Online
from headstart.training.run_config import FeaturesConfig
from headstart.training.run_log import RunLog
from headstart.training.setup import fitting_length, join_processes, load_target, read_dataset

__all__ = ["write_features"]


def write_features(config: FeaturesConfig) -> Store:
    """Write what is missing of a feature store; returns the store.

    Raises ValueError, in one sentence, for everything a user can get wrong. What was written stays, however the process ends.
    """
    checked = [method(name) for name in config.methods]  # an unknown one is refused before anything is loaded
    accelerator = join_processes(config.device, config.threads)
    log = RunLog(config.out, accelerator.is_main_process)
    model = load_target(config, config.dtype, accelerator)
    tokenizer = load_tokenizer(config.target, config.trust_remote_code)
    length = fitting_length(config.length, model)
    config = config.model_copy(update={"length": length})
    embed_head, target_info = EmbedHead(model), describe_target(model, tokenizer)
    dataset = read_dataset(config, tokenizer, target_info, log)
    taps = [*config.taps, *(tap for drafter in checked for tap in taps_of(drafter, model.config, embed_head))]
    online = Online(model, taps)
    data = [path.name for path in (*config.data, *([] if config.held_out is None else [config.held_out]))]
    store = Writer(config.out, online, dataset, target_info, length, data).fill(accelerator, log.print)
    log.print(f"features are in {config.out}; train on them with: headstart train METHOD --features {config.out}")
    return store


def taps_of(drafter: Any, target_config: Any, embed_head: EmbedHead) -> Sequence[int]:
    """The layers that heads of a method read by default. drafter: its class. target_config: of the model, from transformers."""
    settings = drafter.resolve_config(drafter.config_type(), target_config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        heads = drafter(settings, embed_head.hidden, embed_head.vocab)
    taps: Sequence[int] = heads.taps
    return taps
