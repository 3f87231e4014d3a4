"""Before the first step: the folder, the processes, the texts, and what the target makes of them.

This file knows what a configuration asks for and who gives it. It refuses to know what is learned.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headstart.text.conversations import read_examples
from headstart.training.batching import BatchOrder, num_batches
from headstart.training.dataset import Dataset, split
from headstart.training.features import Online, Store
from headstart.training.frozen_target import Source
from headstart.training.loop import BatchPlan
from headstart.training.packing import Packed
from headstart.training.run_config import BUDGETS, RunConfig, TrainConfig
from headstart.training.run_log import RunLog
from headstart.training.run_state import HOME

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headstart.formats import TargetInfo

LENGTH = 512  # of a text, where the target takes as much


def check_out(out: Path, resume: bool, finish: bool = False) -> None:
    """Before anything is loaded: an output folder that can be written, and holds nothing that would be lost.

    finish: whether the run there is to be ended where it is; raises ValueError where there is no checkpoint of one.
    """
    if finish and resume:
        raise ValueError("finish ends a run where it is, and resume goes on with it; leave one of them out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".can-be-written"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"out folder {out} cannot be written: {error.strerror}; name another folder") from None
    has_checkpoint = any((out / HOME).glob("step-*"))
    if finish and not has_checkpoint:
        raise ValueError(f"{out} holds no checkpoint, so there is no run to finish; name the out folder of a run that was stopped")
    if has_checkpoint and not (resume or finish):
        raise ValueError(
            f"{out} holds a checkpoint of a run that has not ended; go on with --resume, end it there with --finish, or name "
            "another folder"
        )
    if (out / "config.json").exists() and not has_checkpoint:
        what = "the run in it has ended" if resume else "it holds heads or a model already"
        raise ValueError(f"out folder {out} cannot be trained into: {what}; name another folder")


def start_accelerator(config: RunConfig) -> Accelerator:
    """This process among others. Raises ValueError where accelerate is missing or refuses."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import set_seed
    except ImportError:
        raise ValueError("training needs accelerate, which is not installed; pip install 'headstart[train]'") from None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision=config.precision,
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=config.out,
        )
    except (ValueError, ImportError) as error:
        raise ValueError(f"accelerate refuses precision={config.precision}, tracker={config.tracker}: {error}") from None
    # It warns of tied weights, which it saves once and restores; resumed runs are held_out to the bit.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    set_seed(config.seed, device_specific=True)
    return accelerator


def fitting_length(length: int | None, model: PreTrainedModel) -> int:
    """Of a text, in tokens. Raises ValueError if the target does not take as much."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is not None and context is not None and length > context:
        raise ValueError(f"length is {length}, and the target takes {context} tokens at most; lower length to {context}")
    return length or min(LENGTH, context or LENGTH)


def read_dataset(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, target_info: TargetInfo, report: RunLog) -> Dataset:
    """The texts of `config.data`, and those held out."""

    def read(paths: Sequence[Path]) -> Any:
        examples, told = read_examples(
            paths, tokenizer, target_info.digest, config.length, any_target=config.any_target, vocab=target_info.vocab
        )
        report.say(f"data: {told}")
        return examples

    held_out = read([config.held_out]) if isinstance(config.held_out, Path) else config.held_out
    return split(read(config.data), held_out)


def make_source(
    config: TrainConfig, model: PreTrainedModel, taps: Sequence[int], dataset: Dataset, target_info: TargetInfo,
    accelerator: Accelerator, report: RunLog,
) -> Source:  # fmt: skip
    """Where a drafter's features come from: the model itself, or a store of what it said."""
    online = Online(model, taps)
    if config.features is None:
        return online

    def on_progress(done: int, of: int) -> None:
        report.say(f"features: shard {done + 1} of {of}")

    with accelerator.main_process_first():
        Store.claim(config.features, online, dataset, str(target_info.digest))
    share = (accelerator.process_index, accelerator.num_processes)
    store = Store.filled(config.features, online, dataset, share, on_progress)
    accelerator.wait_for_everyone()
    return store


def make_batch_plan(config: RunConfig, dataset: Dataset | Packed, num_processes: int) -> BatchPlan:
    """What is read in which step, to the end of the budget."""
    order = BatchOrder([len(dataset.texts[index].tokens) for index in dataset.train], config.rows, config.seed)
    per_step = config.accumulate * num_processes
    budget = {name: getattr(config, name) for name in BUDGETS}
    return BatchPlan(dataset, order, num_batches(order, **budget, per_step=per_step), per_step)
