"""Pretraining: a small causal language model from scratch, with heads that predict several tokens at once.

The trunk becomes an ordinary model folder, `out/model`; heads become folders of heads beside it, `out/METHOD`. The module must not
import `headstart.engine` or `headstart.cli`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headstart.drafters.parts.heads import Heads
from headstart.drafters.registry import METHODS, method
from headstart.formats import describe_target, save
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model, random_model
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.training.loop import Loop
from headstart.training.output import TRUNK, save_trunk, training_record
from headstart.training.packing import read_packed
from headstart.training.pretrain_loss import PretrainLoss
from headstart.training.run_config import PretrainConfig
from headstart.training.run_log import RunLog
from headstart.training.setup import begin, check_out, fitting_length, make_loop, start_accelerator
from headstart.training.sharding import is_sharded
from headstart.training.warm_start import warm_start, warm_start_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TRUNK", "pretrain"]

RECORD = "training.json"


def pretrain(config: PretrainConfig, *, resume: bool = False, finish: bool = False) -> dict[str, Any]:
    """Train a trunk and its heads, save them in `config.out` and return the record of their training.

    resume, finish: as in `headstart.training.train.train`.

    Raises ValueError, in one sentence, for everything a user can get wrong and for a loss that is not finite.
    Raises KeyboardInterrupt, after saving a checkpoint, when the run was asked to stop.
    """
    _check(config)
    check_out(config.out, resume, finish)
    if (config.out / TRUNK).exists():
        raise ValueError(f"out folder {config.out} holds a trained model already ({TRUNK}); name another folder")
    run = PretrainRun.prepare(config)
    state = begin(run.loop, run.greeting, {"learning_rate": config.learning_rate})
    return run.save(run.loop.finish_at(state) if finish else run.loop.run_to_end(state, "pretrain"))


@dataclass(frozen=True, eq=False)
class PretrainRun:
    """A run that can start.

    config: with `length` resolved.
    model: the trunk.
    loss_module: trunk and heads, before accelerate wrapped them.
    """

    config: PretrainConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    loss_module: PretrainLoss
    loop: Loop

    @classmethod
    def prepare(cls, config: PretrainConfig) -> PretrainRun:
        """Build everything in order: processes, trunk, data, heads, loss module, optimizers, loop."""
        accelerator = start_accelerator(config)
        if is_sharded(accelerator):
            raise ValueError("a model is pretrained whole on every process; start without FSDP2 and ZeRO-3")
        log = RunLog(config.out, accelerator.is_main_process)
        tokenizer = load_tokenizer(_tokenizer_folder(config), config.trust_remote_code)
        model = _trunk(config, tokenizer).to(accelerator.device)
        length = fitting_length(config.length, model)
        config = config.model_copy(update={"length": length})
        vocab = model.get_input_embeddings().weight.shape[0]
        dataset, report = read_packed(
            config.data, tokenizer, length=length, vocab=vocab, held_out=config.held_out, times=config.times
        )
        log.print(f"data: {report}")
        loss_module = PretrainLoss(model, _heads(config, model), config.heads_weight, config.decay)
        prepared, *optimizers = accelerator.prepare(loss_module.to(accelerator.device), *_optimizers(loss_module, config))
        summarize = loss_module.summarize_metrics
        loop = make_loop(config, dataset, accelerator, log, prepared, optimizers, target=str(config.start), summarize=summarize)
        return cls(config, model, tokenizer, loss_module, loop)

    def greeting(self, step: int) -> str:
        """A sentence that says what is trained on what. step: at which the run starts or continues."""
        batch_plan, dataset = self.loop.batch_plan, self.loop.batch_plan.dataset
        heads = [f"{name} {_num_parameters(member):,}" for name, member in self.loss_module.heads.items()]
        return (
            f"a trunk of {self.model.num_parameters():,} parameters"
            + (f", with heads ({', '.join(heads)})," if heads else "")
            + f" is trained on {len(dataset.train):,} blocks of {self.config.length} tokens, {len(dataset.held_out):,} held out; "
            f"{batch_plan.steps:,} steps of {batch_plan.per_step * self.config.rows} blocks"
            + (f", continued at step {step}" if step else "")
        )  # fmt: skip

    def save(self, measured: dict[str, Any]) -> dict[str, Any]:
        """Save trunk and heads; returns the record of the training."""
        record, out, loop = self._record(measured), self.config.out, self.loop
        state = loop.accelerator.get_state_dict(loop.loss_module)
        if loop.accelerator.is_main_process:
            self.loss_module.load_state_dict(state)
            self.model.eval().to("cpu")
            trunk = save_trunk(self.model, self.tokenizer, out / TRUNK, getattr(torch, self.config.dtype))
            target_info = describe_target(trunk, self.tokenizer).model_copy(update={"name": out.resolve().name})
            for name, heads in self.loss_module.heads.items():
                save(out / name, heads.to("cpu", trunk.dtype), target_info, _heads_record(name, record))  # type: ignore[arg-type]
            (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        loop.checkpoints.remove()
        loop.log.print(f"the model is in {out / TRUNK}; " + _use(out, list(self.loss_module.heads)))
        return record

    def _record(self, measured: dict[str, Any]) -> dict[str, Any]:
        return {
            **training_record(self.loop),
            "weight": self.config.weight,
            "optimizer": self.config.optimizer,
            "blocks_per_step": self.loop.batch_plan.per_step * self.config.rows,
            **measured,
        }


def _heads_record(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record in the folder of one method's heads: without other methods' values, its own under the names of `train`."""
    measured = {key: value for key, value in record.items() if key.startswith("held_out_")}
    of_method = {key.replace(f"{name}_", ""): value for key, value in measured.items() if key.startswith(f"held_out_{name}_")}
    return {"with_trunk": True, **{key: value for key, value in record.items() if key not in measured}, **of_method}


def _use(out: Path, heads: list[str]) -> str:
    drafter = f" --drafter {out / heads[0]}" if heads else ""
    return f"use it with: headstart generate --model {out / TRUNK}{drafter} PROMPT"


def _num_parameters(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _tokenizer_folder(config: PretrainConfig) -> str:
    """Folder or hub id of the tokenizer: its own, or that of the model."""
    if config.tokenizer is not None:
        return config.tokenizer
    if config.start is not None:
        return config.start
    assert config.model is not None
    return str(config.model if config.model.is_dir() else config.model.parent)


def _trunk(config: PretrainConfig, tokenizer: Any) -> PreTrainedModel:
    """The initial model: with random weights, or with those of `start`; in float32, since less would round small steps away."""
    if config.start is not None:
        trained: PreTrainedModel = load_model(config.start, "float32", "cpu", config.trust_remote_code)
        trained.train().requires_grad_(True)
        return trained
    assert config.model is not None
    torch.manual_seed(config.seed)
    model = random_model(config.model, config.trust_remote_code)
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(model.generation_config, name, None) is None:
            setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


def _check(config: PretrainConfig) -> None:
    """Raise ValueError for what is wrong before a model or data is read."""
    if config.model is not None and not config.model.exists():
        raise ValueError(f"there is no model configuration {str(config.model)!r}; name a config.json, or a folder with one")
    for name, settings in config.heads.items():
        _checked_settings(name, settings)


def _checked_settings(name: str, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of a method that can be trained with a trunk, and its settings."""
    drafter = method(name)
    if not drafter.joins_pretraining:
        able = ", ".join(other for other in METHODS if method(other).joins_pretraining)
        raise ValueError(f"{name} heads are trained on an existing trunk, with `headstart train`; from scratch: {able}")
    changes = {key: value for key, value in settings.items() if key != "from"}
    return drafter, warm_start_settings(name, changes, settings.get("from"), f"heads {name}")


def _heads(config: PretrainConfig, model: PreTrainedModel) -> dict[str, Heads]:
    """The initial heads by method: new ones, or those of a warm start (`from`)."""
    embed_head, heads = EmbedHead(model), {}
    for name, settings in config.heads.items():
        drafter, checked = _checked_settings(name, settings)
        resolved = drafter.resolve_config(checked, model.config)
        heads[name] = drafter(resolved, embed_head.hidden, embed_head.vocab).bind(embed_head).init_from_target()
        if "from" in settings:
            warm_start(heads[name], settings["from"], describe_target(model))
    return heads


def _optimizers(loss_module: PretrainLoss, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices inside the layers and AdamW for the rest.

    Muon (Jordan et al. 2024) orthogonalises its updates and needs fewer tokens. Its scale is matched to that of AdamW (Liu et al.
    2025, arXiv 2502.16982, section 2.2), so one learning rate serves both.
    """
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(loss_module.groups(rate, decay), betas=config.betas)]
    matrices, rest = loss_module.split()
    muon = torch.optim.Muon(
        [{"params": matrices, "lr": rate, "peak": rate}], weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW([{"params": rest, "lr": rate, "peak": rate}], weight_decay=0.0, betas=config.betas)]
