"""What a run leaves when it ends: the record of its training, and the model folder of a trained trunk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from headstart.training.loop import Loop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRUNK = "model"  # the folder of a trained trunk, inside the output folder of the run


def training_record(loop: Loop) -> dict[str, Any]:
    """The part of a training record that every kind of run writes: what was read, for how long, and how."""
    config, state = loop.config, loop.state
    return {
        "steps": state.step,
        **loop.planned_steps(),
        "tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "data": [path.name for path in config.data],
        "learning_rate": config.learning_rate,
        "length": config.length,
        "seed": config.seed,
    }


def save_trunk(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Write a trunk as an ordinary model folder with its tokenizer; returns the model, converted to `dtype`.

    Raises ValueError if the disk is full.
    """
    trunk: Any = model.to(dtype)  # type: ignore[arg-type]
    try:
        trunk.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the model cannot be written to {folder} ({error}); make room and go on with --resume") from None
    saved: PreTrainedModel = trunk
    return saved
