"""What happens before the first step of a run: checking the folder, starting the processes, reading texts, building the loop.

It must not import what is trained: methods, drafters and their losses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headstart.target.loading import load_model
from headstart.text.conversations import read_examples
from headstart.training.batching import BatchOrder, num_batches
from headstart.training.dataset import Dataset, split
from headstart.training.feature_store import Store, Stored, check_texts
from headstart.training.feature_writer import Writer
from headstart.training.features import Online
from headstart.training.frozen_target import Source
from headstart.training.loop import BatchPlan, Loop
from headstart.training.packing import Packed
from headstart.training.run_config import BUDGETS, FeaturesConfig, RunConfig, TrainConfig
from headstart.training.run_log import RunLog, SummarizeMetrics, summarize_metrics
from headstart.training.run_state import HOME, Checkpoints, Identity, State
from headstart.training.sharding import is_sharded, load_sharded, switch_on_deepspeed, switch_on_fsdp

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headstart.formats import TargetInfo

LENGTH = 512  # tokens of a text, where the target's context is not shorter


def check_out(out: Path, resume: bool, finish: bool = False) -> None:
    """Check, before anything is loaded, that an output folder can be written and holds nothing that would be overwritten.

    resume: whether the run in the folder continues.
    finish: whether the run in the folder ends at its last checkpoint.

    Raises ValueError for a folder that cannot be written, that holds a model, heads or a run that was not named with `resume` or
    `finish`, or that has no checkpoint to finish.
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
    """This process among others, for training. Raises ValueError where accelerate is missing or refuses the configuration."""
    settings: dict[str, Any] = {
        "mixed_precision": config.precision,
        "log_with": None if config.tracker == "none" else config.tracker,
        "project_dir": config.out,
    }
    accelerator = join_processes(config.device, config.threads, **settings)
    switch_on_deepspeed(accelerator, config.clip, config.precision)
    from accelerate.utils import set_seed

    set_seed(config.seed, device_specific=True)
    return accelerator


def join_processes(device: str, threads: int | None, **settings: Any) -> Accelerator:
    """This process among those that the launcher started.

    device: "auto" or "cpu". threads: of torch on the CPU; None: torch's choice. settings: of accelerate.
    Raises ValueError where accelerate is missing or refuses the settings.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ValueError("training needs accelerate, which is not installed; pip install 'headstart[train]'") from None
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        accelerator = Accelerator(cpu=device == "cpu", **settings)
    except (ValueError, ImportError) as error:
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise ValueError(f"accelerate refuses {shown}: {error}") from None
    # accelerate warns of tied weights. It saves them once and restores them; the tests compare resumed runs to the bit.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    switch_on_fsdp(accelerator)
    return accelerator


def load_target(config: TrainConfig | FeaturesConfig, dtype: str, accelerator: Accelerator) -> PreTrainedModel:
    """The target on this process's device: whole, or its share where weights are divided among processes."""

    def load(device: str) -> PreTrainedModel:
        return load_model(config.target, dtype, device, config.trust_remote_code)

    return load_sharded(load, accelerator) if is_sharded(accelerator) else load(str(accelerator.device))


def fitting_length(length: int | None, model: PreTrainedModel) -> int:
    """The greatest length of a text in tokens; `length` None: the default. Raises ValueError if it exceeds the target's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is not None and context is not None and length > context:
        raise ValueError(f"length is {length}, and the target takes {context} tokens at most; lower length to {context}")
    return length or min(LENGTH, context or LENGTH)


def read_dataset(
    config: TrainConfig | FeaturesConfig, tokenizer: PreTrainedTokenizerBase, target_info: TargetInfo, log: RunLog,
    store: Store | None = None,
) -> Dataset:  # fmt: skip
    """The texts of `config.data`, or of a store where no data is given, split into train and held out.

    Raises ValueError for data that cannot be read, and for other texts than those of the store.
    """

    def read(paths: Sequence[Path]) -> Any:
        examples, report = read_examples(
            paths, tokenizer, target_info.digest, config.length, any_target=config.any_target, vocab=target_info.vocab
        )
        log.print(f"data: {report}")
        return examples

    if store is not None and not config.data:
        if not isinstance(config.held_out, float):
            raise ValueError(f"held_out is {config.held_out}, and the texts are those of the features; give a share, or name data")
        return split(store.texts(), config.held_out)
    held_out = read([config.held_out]) if isinstance(config.held_out, Path) else config.held_out or 0.0
    dataset = split(read(config.data), held_out)
    if store is not None:
        check_texts(store, dataset)
    return dataset


def make_source(
    config: TrainConfig, model: PreTrainedModel, taps: Sequence[int], dataset: Dataset, target_info: TargetInfo,
    accelerator: Accelerator, log: RunLog, store: Store | None,
) -> Source:  # fmt: skip
    """Where a drafter's features (tapped hidden states) come from: the model itself, or a store of its hidden states.

    taps: layers that the drafter reads.
    store: a complete one, or None; a folder that `config` names is then filled first.

    Raises ValueError for a store of another run or of other layers, and without room on the disk.
    """
    if store is None:
        online = Online(model, taps)
        if config.features is None:
            return online
        assert config.length is not None, "it was resolved before the data was read"
        data = [path.name for path in config.data]
        store = Writer(config.features, online, dataset, target_info, config.length, data).fill(accelerator, log.print)
    return Stored(store, taps, accelerator.device)


def make_batch_plan(config: RunConfig, dataset: Dataset | Packed, num_processes: int) -> BatchPlan:
    """Which texts each step reads, to the end of the budget."""
    order = BatchOrder([len(dataset.texts[index].tokens) for index in dataset.train], config.rows, config.seed)
    per_step = config.accumulate * num_processes
    budget = {name: getattr(config, name) for name in BUDGETS}
    return BatchPlan(dataset, order, num_batches(order, **budget, per_step=per_step), per_step)


def make_loop(
    config: RunConfig, dataset: Dataset | Packed, accelerator: Accelerator, log: RunLog, loss_module: torch.nn.Module,
    optimizers: Sequence[Any], target: str, summarize: SummarizeMetrics = summarize_metrics,
    decode: Callable[[], float] | None = None, decode_every: int | None = None,
) -> Loop:  # fmt: skip
    """The loop of a run with its batch plan and its checkpoints.

    loss_module, optimizers: as accelerate prepared them.
    target: what identifies the model that is trained on; a resumed run must have the same.
    """
    batch_plan = make_batch_plan(config, dataset, accelerator.num_processes)
    identity = Identity(config.as_dict(), dataset.digest(), target, batch_plan.per_step)
    checkpoints = Checkpoints(config.out, accelerator)
    return Loop(
        config, batch_plan, loss_module, optimizers, accelerator, checkpoints, identity, log, summarize, decode, decode_every
    )


def begin(loop: Loop, greeting: Callable[[int], str], tracked: Mapping[str, Any]) -> State:
    """Load the newest checkpoint if there is one, write `config.yaml` and print the greeting; returns where the run starts.

    greeting: step -> sentence. tracked: settings for the experiment tracker.
    """
    state = loop.checkpoints.load(loop.identity)
    loop.log.rewind(state.step)
    if loop.accelerator.is_main_process:
        loop.config.write(loop.config.out)
    loop.log.print(greeting(state.step))
    loop.accelerator.init_trackers("headstart", config=dict(tracked))
    return state
