"""Pretraining: a small causal language model from scratch, with heads that predict several tokens at once.

The trunk becomes an ordinary model folder, `out/model`; heads become folders of heads beside it, `out/METHOD`. The loop, its
checkpoints and its reports are those of `headstart.training.train`. This file knows which part gets what. It refuses to know
methods,
engines and command lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from headstart.drafters.parts.heads import Heads
from headstart.drafters.registry import METHODS, method
from headstart.formats import describe_target, save
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model, random_model
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.training.loop import Loop
from headstart.training.packing import Packed, read_packed
from headstart.training.pretrain_loss import PretrainLoss
from headstart.training.run_config import PretrainConfig
from headstart.training.run_log import RunLog
from headstart.training.run_state import Checkpoints, Identity
from headstart.training.setup import check_out, fitting_length, make_batch_plan, start_accelerator
from headstart.training.warm_start import warm_start, warm_start_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TRUNK", "pretrain"]

TRUNK = "model"  # the folder of the trunk, inside that of the run
TOLD = "training.json"


def pretrain(config: PretrainConfig, *, resume: bool = False, finish: bool = False) -> dict[str, Any]:
    """Train a trunk and its heads; what was measured. resume, finish: as `headstart.training.train.train` has them.

    Raises ValueError, in one sentence, for everything a user can get wrong and for a loss that is no number, and KeyboardInterrupt
    after saving when it was asked to stop.
    """
    _check(config)
    check_out(config.out, resume, finish)
    if (config.out / TRUNK).exists():
        raise ValueError(f"out folder {config.out} holds a trained model already ({TRUNK}); name another folder")
    run = PretrainRun(config)
    state = run.checkpoints.load(run.identity)
    run.report.rewind(state.step)
    if run.accelerator.is_main_process:
        config.write(config.out)
    run.say(run.greeting(state.step))
    run.accelerator.init_trackers("headstart", config={"learning_rate": config.learning_rate})
    return run.finish(run.loop.end_at(state) if finish else run.loop.see_through(state, "pretrain"))


class PretrainRun:
    """Everything of one run, ready to begin."""

    def __init__(self, config: PretrainConfig) -> None:
        self.accelerator = accelerator = start_accelerator(config)
        self.report = RunLog(config.out, accelerator.is_main_process)
        self.say = self.report.say
        self.tokenizer = load_tokenizer(_tokenizer_place(config), config.trust_remote_code)
        self.model = _trunk(config, self.tokenizer).to(accelerator.device)
        self.config = config = config.model_copy(update={"length": fitting_length(config.length, self.model)})
        self.dataset = self._read()
        self.loss_module = PretrainLoss(self.model, _heads(config, self.model), self._weight, config.decay)
        self.batch_plan = make_batch_plan(config, self.dataset, accelerator.num_processes)
        self.loss_module.progress = lambda: self.loop.state.step / self.batch_plan.steps
        prepared, *optimizers = accelerator.prepare(self.loss_module.to(accelerator.device), *_optimizers(self.loss_module, config))
        self.prepared = prepared
        self.identity = Identity(config.as_dict(), self.dataset.digest(), str(config.start), self.batch_plan.per_step)
        self.checkpoints = Checkpoints(config.out, accelerator)
        self.loop = Loop(
            config, self.batch_plan, prepared, optimizers, accelerator, self.checkpoints, self.identity, self.report,
            measure=self.loss_module.measure,
        )  # fmt: skip

    def _read(self) -> Packed:
        config, length = self.config, self.config.length
        assert length is not None
        vocab = self.model.get_input_embeddings().weight.shape[0]
        dataset, told = read_packed(
            config.data, self.tokenizer, length=length, vocab=vocab, held_out=config.held_out, times=config.times
        )
        self.say(f"data: {told}")
        return dataset

    def _weight(self, progress: float) -> float:
        """Of the heads' losses: two steps, as DeepSeek-V3 has it."""
        is_late = self.config.weight_end is not None and progress >= self.config.weight_until
        return self.config.weight_end if is_late and self.config.weight_end is not None else self.config.weight

    def greeting(self, step: int) -> str:
        """What learns from what."""
        trunk, batch_plan = self.model.num_parameters(), self.batch_plan
        heads = [f"{name} {_count(member):,}" for name, member in self.loss_module.heads.items()]
        return (
            f"a trunk of {trunk:,} parameters learns" + (f" with heads ({', '.join(heads)})" if heads else "")
            + f" from {len(self.dataset.train):,} blocks of {self.config.length} tokens, {len(self.dataset.held_out):,} held out; "
            f"{batch_plan.steps:,} steps of {batch_plan.per_step * self.config.rows} blocks"
            + (f", from step {step} on" if step else "")
        )  # fmt: skip

    def finish(self, measured: dict[str, Any]) -> dict[str, Any]:
        """Save trunk and heads; what is told about them."""
        told, out = self._told(measured), self.config.out
        state = self.accelerator.get_state_dict(self.prepared)
        if self.accelerator.is_main_process:
            self.loss_module.load_state_dict(state)
            trunk = _save_trunk(self.model.to("cpu"), self.tokenizer, out / TRUNK, getattr(torch, self.config.dtype))
            target_info = describe_target(trunk, self.tokenizer).model_copy(update={"name": out.resolve().name})
            for name, heads in self.loss_module.heads.items():
                save(out / name, heads.to("cpu", trunk.dtype), target_info, _told_of(name, told))  # type: ignore[arg-type]
            (out / TOLD).write_text(json.dumps(told, indent=2) + "\n")
        self.checkpoints.remove()
        self.say(f"the model is in {out / TRUNK}; " + _use(out, list(self.loss_module.heads)))
        return told

    def _told(self, measured: dict[str, Any]) -> dict[str, Any]:
        config, state = self.config, self.loop.state
        return {
            "steps": state.step,
            **self.loop.left_out(),
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
            "data": [path.name for path in config.data],
            "weight": config.weight,
            "optimizer": config.optimizer,
            "learning_rate": config.learning_rate,
            "blocks_per_step": self.batch_plan.per_step * config.rows,
            "length": config.length,
            "seed": config.seed,
            **measured,
        }


def _told_of(name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder of one method's heads says: nothing of other methods', and its own measures by the names of `train`."""
    measured = {key: value for key, value in told.items() if key.startswith("held_out_")}
    own = {key.replace(f"{name}_", ""): value for key, value in measured.items() if key.startswith(f"held_out_{name}_")}
    return {"with_trunk": True, **{key: value for key, value in told.items() if key not in measured}, **own}


def _use(out: Path, heads: list[str]) -> str:
    drafter = f" --drafter {out / heads[0]}" if heads else ""
    return f"use it with: headstart generate --model {out / TRUNK}{drafter} PROMPT"


def _count(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _tokenizer_place(config: PretrainConfig) -> str:
    """Where the tokenizer lies: by itself, or beside the model."""
    if config.tokenizer is not None:
        return config.tokenizer
    if config.start is not None:
        return config.start
    assert config.model is not None
    return str(config.model if config.model.is_dir() else config.model.parent)


def _trunk(config: PretrainConfig, tokenizer: Any) -> PreTrainedModel:
    """The model as it begins: with random weights, or with those of `start`; in float32, for small steps vanish in less."""
    if config.start is not None:
        begun: PreTrainedModel = load_model(config.start, "float32", "cpu", config.trust_remote_code)
        begun.train().requires_grad_(True)
        return begun
    assert config.model is not None
    torch.manual_seed(config.seed)
    model = random_model(config.model, config.trust_remote_code)
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(model.generation_config, name, None) is None:
            setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


def _check(config: PretrainConfig) -> None:
    """What needs no model and no data to be refused, before either is read."""
    if config.model is not None and not config.model.exists():
        raise ValueError(f"there is no model configuration {str(config.model)!r}; name a config.json, or a folder with one")
    for name, settings in config.heads.items():
        _asked(name, settings)


def _asked(name: str, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of a method that may learn with a trunk, and its settings."""
    kind = method(name)
    if not kind.joins_pretraining:
        able = ", ".join(other for other in METHODS if method(other).joins_pretraining)
        raise ValueError(f"{name} heads learn on a trunk that is there already, with `headstart train`; from scratch: {able}")
    given = {key: value for key, value in settings.items() if key != "from"}
    return kind, warm_start_settings(name, given, settings.get("from"), f"heads {name}")


def _heads(config: PretrainConfig, model: PreTrainedModel) -> dict[str, Heads]:
    """By method: heads that begin as their settings say, or go on from a folder (`from`)."""
    embed_head, found = EmbedHead(model), {}
    for name, settings in config.heads.items():
        kind, chosen = _asked(name, settings)
        chosen = kind.resolve_config(chosen, model.config)
        found[name] = kind(chosen, embed_head.hidden, embed_head.vocab).bind(embed_head).init_from_target()
        if "from" in settings:
            warm_start(found[name], settings["from"], describe_target(model))
    return found


def _optimizers(loss_module: PretrainLoss, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon for the matrices inside the layers and AdamW for the rest.

    Muon (Jordan et al. 2024) orthogonalises its updates and needs fewer tokens; its scale is matched to AdamW's (Liu et al. 2025,
    arXiv 2502.16982), so that one rate serves both.
    """
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(loss_module.groups(rate, decay), betas=config.betas)]
    inside, rest = loss_module.split()
    muon = torch.optim.Muon(
        [{"params": inside, "lr": rate, "peak": rate}], weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW([{"params": rest, "lr": rate, "peak": rate}], weight_decay=0.0, betas=config.betas)]


def _save_trunk(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """As an ordinary model folder, with its tokenizer. Raises ValueError on a full disk."""
    trunk: Any = model.eval().to(dtype)
    try:
        trunk.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the model cannot be written to {folder} ({error}); make room and go on with --resume") from None
    kept: PreTrainedModel = trunk
    return kept
