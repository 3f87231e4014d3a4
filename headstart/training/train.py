"""Training heads: one loop for every method that can learn, accelerate underneath.

`train` puts the parts of `headstart.training` together. It works under `accelerate launch` on any number of processes. This file
knows which part gets what. It refuses to know methods, engines and command lines.
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
from headstart.formats import describe_target, save
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model, stored_dtype
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.tokenizer import special_ids
from headstart.training.config_file import resolve, validate
from headstart.training.frozen_target import FrozenTarget
from headstart.training.loop import Loop
from headstart.training.medusa2 import Medusa2, Medusa2Config, perplexity, save_trunk
from headstart.training.run_config import TrainConfig
from headstart.training.run_log import RunLog
from headstart.training.run_state import Checkpoints, Identity, State
from headstart.training.setup import check_out, fitting_length, make_batch_plan, make_source, read_dataset, start_accelerator
from headstart.training.warm_start import warm_start, warm_start_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Decode", "TrainConfig", "resolve", "train"]

TRUNK = "model"  # the folder of a trunk that learned too, inside that of its heads

# (model, heads, prompts) -> tau: what a real decode of these prompts gives with heads that may be attached and thrown away.
Decode = Callable[["PreTrainedModel", nn.Module, Sequence[Sequence[int]]], float]


def train(config: TrainConfig, *, resume: bool = False, finish: bool = False, decode: Decode | None = None) -> dict[str, Any]:
    """Train heads and save them in `config.out`; what was written about their training.

    resume: go on from the last checkpoint there, to the very weights of a run that was never stopped. finish: end the run there
    instead, and save what it has learned so far. decode: measures a real
    tau every `decode_every` steps. Raises ValueError, in one sentence, for everything a user can get wrong and for a loss that
    is no number, and KeyboardInterrupt after saving when it was asked to stop.
    """
    recipe = Recipe.of(config)
    if config.decode_every and decode is None:
        raise ValueError("decode_every is given, but nothing to decode with; pass decode=..., or leave it out")
    check_out(config.out, resume, finish)
    run = TrainRun(config, recipe, decode)
    state = run.begin()
    return run.finish(run.loop.end_at(state) if finish else run.loop.see_through(state, "train"))


@dataclass(frozen=True)
class Recipe:
    """What a configuration says about a method and its losses, checked. kind: the method's class."""

    kind: Any
    settings: Any
    objective: Objective
    joint: Medusa2Config | None

    @classmethod
    def of(cls, config: TrainConfig) -> Recipe:
        settings = warm_start_settings(config.method, config.settings, config.start, f"method {config.method}")
        joint = None if config.joint is None else validate(Medusa2Config, config.joint, "joint")
        kind = method(config.method)
        return cls(kind, settings, validate(Objective, {**kind.loss_defaults, **config.loss}, "loss"), joint)


class TrainRun:
    """Everything of one run, ready to begin."""

    def __init__(self, config: TrainConfig, recipe: Recipe, decode: Decode | None) -> None:
        self.recipe, self.decode = recipe, decode
        self.accelerator = accelerator = start_accelerator(config)
        self.report = RunLog(config.out, accelerator.is_main_process)
        self.say = self.report.say
        dtype = "float32" if recipe.joint and config.dtype == "auto" else config.dtype  # small steps vanish in bf16
        self.model = load_model(config.target, dtype, str(accelerator.device), config.trust_remote_code)
        self.tokenizer = load_tokenizer(config.target, config.trust_remote_code)
        self.config = config = config.model_copy(update={"length": fitting_length(config.length, self.model)})
        self.embed_head, self.target_info = EmbedHead(self.model), describe_target(self.model, self.tokenizer)
        self.dataset = read_dataset(config, self.tokenizer, self.target_info, self.report)
        self.settings = recipe.kind.resolve_config(recipe.settings, self.model.config)
        said = self.dataset.token_counts(self.embed_head.vocab)
        self.heads = self._new_heads(said)
        self.coverage = self.heads.coverage(said)
        self.bare = self._lesson()
        self.before: float | None = None  # the trunk's perplexity, where it learns
        optimizer: Any = torch.optim.AdamW(self.bare.groups(config.learning_rate, config.weight_decay), betas=config.betas)
        self.loss_module, optimizer = accelerator.prepare(self.bare, optimizer)
        self.batch_plan = make_batch_plan(config, self.dataset, accelerator.num_processes)
        self.identity = Identity(config.as_dict(), self.dataset.digest(), str(self.target_info.digest), self.batch_plan.per_step)
        self.checkpoints = Checkpoints(config.out, accelerator)
        self.loop = Loop(
            config, self.batch_plan, self.loss_module, [optimizer], accelerator, self.checkpoints, self.identity, self.report,
            decode=self.decoded if decode else None, decode_every=config.decode_every,
        )  # fmt: skip

    def _new_heads(self, said: Tensor) -> Any:
        """Those that the run begins with: new ones, or ones that go on. said: how often each token is, [vocab]."""
        heads, start = self.fresh().bind(self.embed_head), self.config.start
        if start is not None:
            warm_start(heads, start, self.target_info)
            return heads
        heads.choose_vocab(said, [token for token in special_ids(self.tokenizer) if token < self.embed_head.vocab])
        return heads.init_from_target()

    def _lesson(self) -> Any:
        config, joint = self.config, self.recipe.joint
        if joint is not None:
            loss_module = Medusa2(self.heads, self.model, self.recipe.objective, joint)
            loss_module.progress = lambda: self.loop.state.step / self.batch_plan.steps
            return loss_module
        source = make_source(config, self.model, self.heads.taps, self.dataset, self.target_info, self.accelerator, self.report)
        return FrozenTarget(self.heads, self.recipe.objective, source)

    def begin(self) -> State:
        """Where the run starts or goes on; says so."""
        config = self.config
        if self.recipe.joint:
            self.before = perplexity(self.bare, self.dataset, config.rows)
        state = self.checkpoints.load(self.identity)
        self.report.rewind(state.step)
        if self.accelerator.is_main_process:
            config.write(config.out)
        self.say(self._greeting(state.step))
        self.accelerator.init_trackers("headstart", config={"method": config.method, "learning_rate": config.learning_rate})
        return state

    def finish(self, measured: dict[str, Any]) -> dict[str, Any]:
        """Save the heads, and the trunk if it learned; what is told about them."""
        told, target_info, out = self._told(measured), self.target_info, self.config.out
        dtype = stored_dtype(self.config.target, self.config.trust_remote_code)  # in which the heads will work
        heads = self.whole().to(dtype)
        if self.recipe.joint:
            told |= _quality(self.before, perplexity(self.bare, self.dataset, self.config.rows), self.report)
        if self.accelerator.is_main_process:
            if self.recipe.joint:
                trunk = save_trunk(self.bare.trunk, self.tokenizer, out / TRUNK, dtype)
                target_info = describe_target(trunk, self.tokenizer)
            save(out, heads, target_info, told)
        self.checkpoints.remove()
        self.say(f"heads are in {out}; use them with --drafter {out}")
        return told

    # -- heads on the side --

    def fresh(self) -> Any:
        """Heads that know nothing. The run's own random numbers are left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return self.recipe.kind(self.settings, self.embed_head.hidden, self.embed_head.vocab)

    def whole(self) -> Any:
        """The heads as they are now, on the host, in one piece, whatever accelerate made of them."""
        state = self.accelerator.get_state_dict(self.loss_module)
        clone = self.fresh()
        if self.accelerator.is_main_process:
            own = {name: tensor for name, tensor in state.items() if name.startswith("drafter.")}
            clone.load_state_dict({name.removeprefix("drafter."): tensor for name, tensor in own.items()})
        return clone

    def decoded(self) -> float:
        """tau of a real decode of held-out prompts, or of train ones where nothing is held out."""
        chosen = (self.dataset.held_out or self.dataset.train)[: self.config.decode_prompts]
        prompts = [self.dataset.texts[index].prompt for index in chosen]
        clone, is_main = self.whole(), self.accelerator.is_main_process
        tau = self.decode(self.model, clone, prompts) if self.decode is not None and is_main else math.nan
        self.accelerator.wait_for_everyone()
        return tau

    # -- in words --

    def _greeting(self, step: int) -> str:
        dataset, batch_plan = self.dataset, self.batch_plan
        tokens = sum(len(dataset.texts[index].tokens) for index in dataset.train)
        learned = sum(weight.numel() for weight in self.bare.parameters() if weight.requires_grad)
        return (
            f"{self.config.method}: {learned:,} parameters learn from {len(dataset.train):,} texts of {tokens:,} tokens, "
            f"{len(dataset.held_out):,} held out; {batch_plan.steps:,} steps of {batch_plan.per_step * self.config.rows} texts"
            + (f", from step {step} on" if step else "")
            + (f"; they can say {self.coverage:.2%} of the tokens that are answered there" if self.coverage is not None else "")
        )

    def _told(self, measured: dict[str, Any]) -> dict[str, Any]:
        """What the heads' folder says about their training."""
        config, state = self.config, self.loop.state
        return {
            "steps": state.step,
            **self.loop.left_out(),
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
            "data": [path.name for path in config.data],
            **({} if config.start is None else {"went_on_from": config.start.name}),
            "loss": self.recipe.objective.model_dump(mode="json"),
            "learning_rate": config.learning_rate,
            "texts_per_step": self.batch_plan.per_step * config.rows,
            "length": config.length,
            "seed": config.seed,
            **({} if self.coverage is None else {"coverage": round(self.coverage, 5)}),
            **measured,
        }


def _quality(before: float | None, after: float | None, report: RunLog) -> dict[str, Any]:
    """Whether the trunk is still what it was, told in words and as numbers."""
    if before is None or after is None:
        report.say("nothing is held out, so nobody knows whether the trunk got worse; hold out a share")
        return {}
    verdict = "no worse than it was" if after <= 1.01 * before else "WORSE than it was: lower the weight of joint"
    report.say(f"trunk: perplexity of held-out answers {before:.3f} before, {after:.3f} after: {verdict}")
    return {"trunk_perplexity_before": before, "trunk_perplexity_after": after}
