"""Training of heads: the parts of `headstart.training`, put together for every method that can be trained.

It works under `accelerate launch` on any number of processes. It must not import `headstart.engine` or `headstart.cli`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.drafters.parts.losses import Objective
from headstart.drafters.registry import method
from headstart.formats import TargetInfo, describe_target, save
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import stored_dtype
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.tokenizer import special_ids
from headstart.training.config_file import resolve, validate
from headstart.training.dataset import Dataset
from headstart.training.feature_store import Store, complete_store
from headstart.training.frozen_target import FrozenTarget
from headstart.training.loop import Loop
from headstart.training.medusa2 import Medusa2, Medusa2Config, perplexity
from headstart.training.output import TRUNK, save_trunk, training_record
from headstart.training.run_config import TrainConfig
from headstart.training.run_log import RunLog
from headstart.training.setup import (
    begin,
    check_out,
    fitting_length,
    load_target,
    make_loop,
    make_source,
    read_dataset,
    start_accelerator,
)
from headstart.training.sharding import is_sharded
from headstart.training.stored_target import StoredEmbedHead, load_without_layers
from headstart.training.warm_start import warm_start, warm_start_settings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Decode", "TrainConfig", "resolve", "train"]

# (model, heads, prompts) -> tau, the acceptance length of a real decode of these prompts. The heads are a copy to be thrown away.
Decode = Callable[["PreTrainedModel", nn.Module, Sequence[Sequence[int]]], float]


def train(config: TrainConfig, *, resume: bool = False, finish: bool = False, decode: Decode | None = None) -> dict[str, Any]:
    """Train heads, save them in `config.out` and return the record of their training.

    resume: continue from the last checkpoint in `config.out`; the weights are the same to the bit as those of a run that was never
    stopped.
    finish: end the run at its last checkpoint instead, and save the heads as they are there.
    decode: measures the acceptance length of a real decode every `decode_every` steps; None: not measured.

    Raises ValueError, in one sentence, for everything a user can get wrong and for a loss that is not finite.
    Raises KeyboardInterrupt, after saving a checkpoint, when the run was asked to stop.
    """
    recipe = Recipe.of(config)
    if config.decode_every and decode is None:
        raise ValueError("decode_every is given, but nothing to decode with; pass decode=..., or leave it out")
    check_out(config.out, resume, finish)
    run = TrainRun.prepare(config, recipe, decode)
    perplexity_before = run.trunk_perplexity()
    state = begin(run.loop, run.greeting, {"method": config.method, "learning_rate": config.learning_rate})
    measured = run.loop.finish_at(state) if finish else run.loop.run_to_end(state, "train")
    return run.save(measured, perplexity_before)


@dataclass(frozen=True)
class Recipe:
    """The method and the losses that a configuration asks for, checked.

    method: class of the drafter.
    settings: of the method's own config.
    objective: weights of the losses.
    medusa2: how the target is trained with its heads; None: the target is frozen.
    """

    method: Any
    settings: Any
    objective: Objective
    medusa2: Medusa2Config | None

    @classmethod
    def of(cls, config: TrainConfig) -> Recipe:
        """The recipe of a configuration. Raises ValueError for an unknown method or a wrong setting."""
        settings = warm_start_settings(config.method, config.settings, config.start, f"method {config.method}")
        medusa2 = None if config.joint is None else validate(Medusa2Config, config.joint, "joint")
        drafter = method(config.method)
        return cls(drafter, settings, validate(Objective, {**drafter.loss_defaults, **config.loss}, "loss"), medusa2)


@dataclass(frozen=True, eq=False)
class RunInputs:
    """What a run reads before its heads exist.

    config: of the run, with `length` resolved.
    accelerator: this process among others.
    log: lines for people and for `log.jsonl`.
    model, tokenizer: of the target.
    embed_head: embedding and LM head of the target.
    target_info: description of the target that is saved with the heads.
    dataset: all texts of the run.
    store: features of all texts; None: the model computes them.
    """

    config: TrainConfig
    accelerator: Accelerator
    log: RunLog
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    embed_head: EmbedHead
    target_info: TargetInfo
    dataset: Dataset
    store: Store | None

    @classmethod
    def read(cls, config: TrainConfig, recipe: Recipe) -> RunInputs:
        """Start the processes, load the target and read the texts. Of a target with stored features no layer is loaded."""
        store = complete_store(config.features)
        accelerator = start_accelerator(config)
        _check_processes(config, accelerator, store)
        log = RunLog(config.out, accelerator.is_main_process)
        if store is None:
            dtype = "float32" if recipe.medusa2 and config.dtype == "auto" else config.dtype  # bf16 rounds small steps away
            model = load_target(config, dtype, accelerator)
            embed_head = EmbedHead(model)
        else:
            model = load_without_layers(config.target, store, str(accelerator.device), config.trust_remote_code)
            embed_head = StoredEmbedHead(model, store.manifest.target.vocab)
        tokenizer = load_tokenizer(config.target, config.trust_remote_code)
        length = fitting_length(config.length, model) if store is None else store.manifest.length
        config = config.model_copy(update={"length": length})
        target_info = describe_target(model, tokenizer)
        dataset = read_dataset(config, tokenizer, target_info, log, store)
        return cls(config, accelerator, log, model, tokenizer, embed_head, target_info, dataset, store)


@dataclass(frozen=True)
class HeadsBuilder:
    """Builds heads of one method for one target. hidden: size of the target's hidden states. vocab: size of its vocabulary."""

    method: Any
    settings: Any
    hidden: int
    vocab: int
    seed: int

    def untrained(self) -> Any:
        """Heads with random weights. The random state of the run does not change."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.method(self.settings, self.hidden, self.vocab)

    def initial(self, inputs: RunInputs, token_counts: Tensor) -> Any:
        """The heads that the run starts with: new ones, or those of a warm start.

        token_counts: how often each token occurs in the answers, [vocab].
        """
        heads, start = self.untrained().bind(inputs.embed_head), inputs.config.start
        if start is not None:
            warm_start(heads, start, inputs.target_info)
            return heads
        heads.choose_vocab(token_counts, [token for token in special_ids(inputs.tokenizer) if token < self.vocab])
        return heads.init_from_target()

    def copy(self, accelerator: Accelerator, prepared: nn.Module) -> Any:
        """A copy on the host of the heads inside a loss module that accelerate prepared; untrained outside the main process."""
        state = accelerator.get_state_dict(prepared)
        heads = self.untrained()
        if accelerator.is_main_process:
            of_heads = {name: tensor for name, tensor in state.items() if name.startswith("drafter.")}
            heads.load_state_dict({name.removeprefix("drafter."): tensor for name, tensor in of_heads.items()})
        return heads


@dataclass(frozen=True, eq=False)
class TrainRun:
    """A run that can start.

    loss_module: what is trained, before accelerate wrapped it.
    coverage: share of the answers' tokens that the heads can draft, in [0, 1]; None where they can draft all.
    """

    inputs: RunInputs
    recipe: Recipe
    builder: HeadsBuilder
    loss_module: Any
    coverage: float | None
    loop: Loop

    @classmethod
    def prepare(cls, config: TrainConfig, recipe: Recipe, decode: Decode | None) -> TrainRun:
        """Build everything in order: inputs, heads, loss module, optimizer, loop."""
        inputs = RunInputs.read(config, recipe)
        config, accelerator, embed_head = inputs.config, inputs.accelerator, inputs.embed_head
        settings = recipe.method.resolve_config(recipe.settings, inputs.model.config)
        builder = HeadsBuilder(recipe.method, settings, embed_head.hidden, embed_head.vocab, config.seed)
        token_counts = inputs.dataset.token_counts(embed_head.vocab)
        heads = builder.initial(inputs, token_counts)
        coverage = heads.coverage(token_counts)
        loss_module = _loss_module(inputs, recipe, heads)
        optimizer: Any = torch.optim.AdamW(loss_module.groups(config.learning_rate, config.weight_decay), betas=config.betas)
        prepared, optimizer = accelerator.prepare(loss_module, optimizer)
        loop = make_loop(
            config, inputs.dataset, accelerator, inputs.log, prepared, [optimizer], target=str(inputs.target_info.digest),
            decode=decode and _decoder(inputs, decode, lambda: builder.copy(accelerator, prepared)),
            decode_every=config.decode_every,
        )  # fmt: skip
        return cls(inputs, recipe, builder, loss_module, coverage, loop)

    def trunk_perplexity(self) -> float | None:
        """Perplexity of the trunk on the held-out answers; None where the target is frozen or nothing is held out."""
        inputs = self.inputs
        return perplexity(self.loss_module, inputs.dataset, inputs.config.rows) if self.recipe.medusa2 else None

    def greeting(self, step: int) -> str:
        """A sentence that says what is trained on what. step: at which the run starts or continues."""
        config, dataset, batch_plan = self.inputs.config, self.inputs.dataset, self.loop.batch_plan
        tokens = sum(len(dataset.texts[index].tokens) for index in dataset.train)
        parameters = sum(weight.numel() for weight in self.loss_module.parameters() if weight.requires_grad)
        return (
            f"{config.method}: {parameters:,} parameters are trained on {len(dataset.train):,} texts of {tokens:,} tokens, "
            f"{len(dataset.held_out):,} held out; {batch_plan.steps:,} steps of {batch_plan.per_step * config.rows} texts"
            + (f", continued at step {step}" if step else "")
            + (f"; they can draft {self.coverage:.2%} of the answers' tokens" if self.coverage is not None else "")
        )

    def save(self, measured: dict[str, Any], perplexity_before: float | None) -> dict[str, Any]:
        """Save the heads, and the trunk if it was trained; returns the record of the training."""
        inputs, accelerator, target_info = self.inputs, self.inputs.accelerator, self.inputs.target_info
        config, out = inputs.config, inputs.config.out
        record = self._record(measured)
        dtype = stored_dtype(config.target, config.trust_remote_code)  # in which the heads will work
        heads = self.builder.copy(accelerator, self.loop.loss_module).to(dtype)
        if self.recipe.medusa2:
            record |= _trunk_quality(perplexity_before, self.trunk_perplexity(), inputs.log)
        if accelerator.is_main_process:
            if self.recipe.medusa2:
                trunk = save_trunk(self.loss_module.trunk.merged(), inputs.tokenizer, out / TRUNK, dtype)
                target_info = describe_target(trunk, inputs.tokenizer)
            save(out, heads, target_info, record)
        self.loop.checkpoints.remove()
        inputs.log.print(f"heads are in {out}; use them with --drafter {out}")
        return record

    def _record(self, measured: dict[str, Any]) -> dict[str, Any]:
        config = self.inputs.config
        return {
            **training_record(self.loop),
            **({} if config.start is None else {"went_on_from": config.start.name}),
            "loss": self.recipe.objective.model_dump(mode="json"),
            "texts_per_step": self.loop.batch_plan.per_step * config.rows,
            **({} if self.coverage is None else {"coverage": round(self.coverage, 5)}),
            **measured,
        }


def _check_processes(config: TrainConfig, accelerator: Accelerator, store: Store | None) -> None:
    """Raise ValueError for keys that do not go with a divided target, or with stored features."""
    for key, what in (("joint", "trains the target"), ("decode_every", "decodes with it")):
        if is_sharded(accelerator) and getattr(config, key) is not None:
            raise ValueError(
                f"the target is divided among processes, and {key} {what} on each; leave {key} out, or start without "
                "FSDP2 and DeepSpeed"
            )
    if store is None:
        return
    for key, stored in (("dtype", store.manifest.dtype), ("length", store.manifest.length)):
        if getattr(config, key) not in ("auto", None, stored):
            raise ValueError(
                f"{key} is {getattr(config, key)}, and the features in {store.folder} were written with {stored}; leave {key} out"
            )
    if config.decode_every is not None:
        raise ValueError("decode_every decodes with the target, and with stored features its layers are not loaded; leave it out")


def _loss_module(inputs: RunInputs, recipe: Recipe, heads: Any) -> Any:
    """What is trained: the heads alone, or with the trunk."""
    if recipe.medusa2 is not None:
        return Medusa2(heads, inputs.model, recipe.objective, recipe.medusa2)
    source = make_source(
        inputs.config, inputs.model, heads.taps, inputs.dataset, inputs.target_info, inputs.accelerator, inputs.log, inputs.store
    )
    return FrozenTarget(heads, recipe.objective, source)


def _decoder(inputs: RunInputs, decode: Decode, copy_heads: Callable[[], Any]) -> Callable[[], float]:
    """A function that measures tau of a real decode with the heads as they are now.

    The prompts are held-out ones, or train ones where nothing is held out. Outside the main process tau is NaN.
    """
    dataset, accelerator = inputs.dataset, inputs.accelerator
    chosen = (dataset.held_out or dataset.train)[: inputs.config.decode_prompts]
    prompts = [dataset.texts[index].prompt for index in chosen]

    def measure() -> float:
        heads = copy_heads()
        tau = decode(inputs.model, heads, prompts) if accelerator.is_main_process else math.nan
        accelerator.wait_for_everyone()
        return tau

    return measure


def _trunk_quality(before: float | None, after: float | None, log: RunLog) -> dict[str, Any]:
    """The perplexity of the trunk before and after training, for the record; prints whether it became worse."""
    if before is None or after is None:
        log.print("nothing is held out, so nobody knows whether the trunk got worse; hold out a share")
        return {}
    verdict = "no worse than it was" if after <= 1.01 * before else "WORSE than it was: lower the weight of joint"
    log.print(f"trunk: perplexity of held-out answers {before:.3f} before, {after:.3f} after: {verdict}")
    return {"trunk_perplexity_before": before, "trunk_perplexity_after": after}
