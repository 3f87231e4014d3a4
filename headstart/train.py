"""Training heads: one loop for every method that can learn, accelerate underneath.

`train` puts the parts of `headstart.training` together. It works under `accelerate launch` on any number of processes. This file
knows which part gets what. It refuses to know methods, engines and command lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headstart.checkpoint import TargetFacts, facts_of, load, save
from headstart.conversations import read_examples
from headstart.drafters import method
from headstart.ends import Ends
from headstart.lessons import Objective
from headstart.pretrained import load_model, stored_dtype
from headstart.text import load_tokenizer
from headstart.training.config import BUDGETS, TrainConfig, resolve, validate
from headstart.training.features import Online, Store
from headstart.training.joint import Joint, JointConfig, perplexity, save_trunk
from headstart.training.lesson import Frozen, Source
from headstart.training.loop import Course, Loop
from headstart.training.order import Order, num_batches
from headstart.training.report import Report
from headstart.training.resume import Checkpoints, Identity
from headstart.training.texts import Library, shelve

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Decode", "TrainConfig", "resolve", "train"]

LENGTH = 512  # of a text, where the target takes as much
TRUNK = "model"  # the folder of a trunk that learned too, inside that of its heads

# (model, heads, prompts) -> tau: what a real decode of these prompts gives with heads that may be attached and thrown away.
Decode = Callable[["PreTrainedModel", nn.Module, Sequence[Sequence[int]]], float]


def train(config: TrainConfig, *, resume: bool = False, decode: Decode | None = None) -> dict[str, Any]:
    """Train heads and save them in `config.out`; what was written about their training.

    resume: go on from the last checkpoint there, to the very weights of a run that was never stopped. decode: measures a real
    tau every `decode_every` steps. Raises ValueError, in one sentence, for everything a user can get wrong and for a loss that
    is no number, and KeyboardInterrupt after saving when it was asked to stop.
    """
    kind = method(config.method)
    settings = validate(kind.config_type, config.settings, f"method {config.method}")
    objective = validate(Objective, config.loss, "loss")
    if config.decode_every and decode is None:
        raise ValueError("decode_every is given, but nothing to decode with; pass decode=..., or leave it out")
    _check_out(config.out, resume)
    accelerator = _accelerator(config)
    report = Report(config.out, accelerator.is_main_process)
    joint = None if config.joint is None else validate(JointConfig, config.joint, "joint")
    dtype = "float32" if joint and config.dtype == "auto" else config.dtype  # small steps vanish in bf16
    model, tokenizer = load_model(config.target, dtype, str(accelerator.device)), load_tokenizer(config.target)
    config = config.model_copy(update={"length": _length(config.length, model)})
    ends, facts = Ends(model), facts_of(model, tokenizer)
    library = _library(config, tokenizer, facts, report)

    def fresh() -> Any:
        """Heads that know nothing. The run's own random numbers are left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return kind(settings, ends.hidden, ends.vocab)

    heads = fresh().bind(ends).start()
    if joint is None:
        bare: Any = Frozen(heads, objective, _source(config, model, heads.taps, library, facts, accelerator, report))
    else:
        bare = Joint(_begun(heads, joint, facts), model, objective, joint)
    lesson: Any = bare
    optimizer: Any = torch.optim.AdamW(lesson.groups(config.learning_rate, config.weight_decay), betas=config.betas)
    lesson, optimizer = accelerator.prepare(lesson, optimizer)
    course = _course(config, library, accelerator.num_processes)
    identity = Identity(config.as_dict(), library.digest(), str(facts.digest), course.per_step)
    checkpoints = Checkpoints(config.out, accelerator)

    def whole() -> Any:
        """The heads as they are now, on the host, in one piece, whatever accelerate made of them."""
        state = accelerator.get_state_dict(lesson)
        twin = fresh()
        if accelerator.is_main_process:
            own = {name: tensor for name, tensor in state.items() if name.startswith("drafter.")}
            twin.load_state_dict({name.removeprefix("drafter."): tensor for name, tensor in own.items()})
        return twin

    def decoded() -> float:
        twin, prompts = whole(), _prompts(library, config)
        tau = decode(model, twin, prompts) if decode is not None and accelerator.is_main_process else math.nan
        accelerator.wait_for_everyone()
        return tau

    loop = Loop(config, course, lesson, optimizer, accelerator, checkpoints, identity, report, decoded if decode else None)
    if joint:
        bare.progress = lambda: loop.state.step / course.steps
        before = perplexity(bare, library, config.rows)
    state = checkpoints.load(identity)
    report.rewind(state.step)
    if accelerator.is_main_process:
        config.write(config.out)
    _greet(report, config, library, course, heads, state.step)
    accelerator.init_trackers("headstart", config={"method": config.method, "learning_rate": config.learning_rate})
    try:
        measured = loop.run(state)
    except KeyboardInterrupt:
        report.say(f"stopped after step {state.step}; go on with: headstart train --config {config.out / 'config.yaml'} --resume")
        raise
    finally:
        accelerator.end_training()
    training = _told(config, objective, measured, loop)
    saved = whole()
    if joint:
        training |= _quality(before, perplexity(bare, library, config.rows), report)
        if accelerator.is_main_process:
            facts = facts_of(save_trunk(bare.trunk, tokenizer, config.out / TRUNK, stored_dtype(config.target)), tokenizer)
    if accelerator.is_main_process:
        save(config.out, saved, facts, training)
    checkpoints.remove()
    report.say(f"heads are in {config.out}; use them with --drafter {config.out}")
    return training


def _begun(heads: Any, joint: JointConfig, facts: TargetFacts) -> Any:
    """Heads that go on from those of a first stage, where one is named."""
    if joint.heads is None:
        return heads
    first: Any = load(joint.heads, facts)
    if type(first) is not type(heads) or first.config != heads.config:
        raise ValueError(
            f"the heads in {joint.heads} have {first.config!r}, the run asks for {heads.config!r}; let them be the same"
        )
    heads.load_state_dict(first.state_dict())
    return heads


def _quality(before: float | None, after: float | None, report: Report) -> dict[str, Any]:
    """Whether the trunk is still what it was, told in words and as numbers."""
    if before is None or after is None:
        report.say("nothing is held out, so nobody knows whether the trunk got worse; hold out a share")
        return {}
    verdict = "no worse than it was" if after <= 1.01 * before else "WORSE than it was: lower the weight of joint"
    report.say(f"trunk: perplexity of held-out answers {before:.3f} before, {after:.3f} after: {verdict}")
    return {"trunk_perplexity_before": before, "trunk_perplexity_after": after}


def _check_out(out: Path, resume: bool) -> None:
    """Before anything is loaded: an output folder that can be written, and holds nothing that would be lost."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".can-be-written"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"out folder {out} cannot be written: {error.strerror}; name another folder") from None
    has_checkpoint = any((out / "checkpoint").glob("step-*"))
    if has_checkpoint and not resume:
        raise ValueError(f"{out} holds a checkpoint of a run that has not ended; go on with --resume, or name another folder")
    if (out / "config.json").exists() and not has_checkpoint:
        what = "the run in it has ended" if resume else "it holds heads or a model already"
        raise ValueError(f"out folder {out} cannot be trained into: {what}; name another folder")


def _accelerator(config: TrainConfig) -> Accelerator:
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
    set_seed(config.seed, device_specific=True)
    return accelerator


def _length(length: int | None, model: PreTrainedModel) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is not None and context is not None and length > context:
        raise ValueError(f"length is {length}, and the target takes {context} tokens at most; lower length to {context}")
    return length or min(LENGTH, context or LENGTH)


def _library(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, facts: TargetFacts, report: Report) -> Library:
    def read(paths: Sequence[Path]) -> Any:
        examples, told = read_examples(
            paths, tokenizer, facts.digest, config.length, any_target=config.any_target, vocab=facts.vocab
        )
        report.say(f"data: {told}")
        return examples

    held_out = read([config.held_out]) if isinstance(config.held_out, Path) else config.held_out
    return shelve(read(config.data), held_out)


def _source(
    config: TrainConfig, model: PreTrainedModel, taps: Sequence[int], library: Library, facts: TargetFacts,
    accelerator: Accelerator, report: Report,
) -> Source:  # fmt: skip
    online = Online(model, taps)
    if config.features is None:
        return online

    def tell(done: int, of: int) -> None:
        report.say(f"features: shard {done + 1} of {of}")

    with accelerator.main_process_first():
        Store.claim(config.features, online, library, str(facts.digest))
    share = (accelerator.process_index, accelerator.num_processes)
    store = Store.filled(config.features, online, library, share, tell)
    accelerator.wait_for_everyone()
    return store


def _course(config: TrainConfig, library: Library, num_processes: int) -> Course:
    order = Order([len(library.texts[index].tokens) for index in library.taught], config.rows, config.seed)
    per_step = config.accumulate * num_processes
    budget = {name: getattr(config, name) for name in BUDGETS}
    return Course(library, order, num_batches(order, **budget, per_step=per_step), per_step)


def _prompts(library: Library, config: TrainConfig) -> list[tuple[int, ...]]:
    """Of held-out texts, or of taught ones where nothing is held out."""
    chosen = (library.tested or library.taught)[: config.decode_prompts]
    return [library.texts[index].prompt for index in chosen]


def _greet(report: Report, config: TrainConfig, library: Library, course: Course, heads: Any, step: int) -> None:
    tokens = sum(len(library.texts[index].tokens) for index in library.taught)
    learned = sum(weight.numel() for weight in heads.parameters() if weight.requires_grad)
    report.say(
        f"{config.method}: {learned:,} parameters learn from {len(library.taught):,} texts of {tokens:,} tokens, "
        f"{len(library.tested):,} held out; {course.steps:,} steps of {course.per_step * config.rows} texts"
        + (f", from step {step} on" if step else "")
    )


def _told(config: TrainConfig, objective: Objective, measured: dict[str, Any], loop: Loop) -> dict[str, Any]:
    """What the heads' folder says about their training."""
    state = loop.state
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "data": [path.name for path in config.data],
        "loss": objective.model_dump(mode="json"),
        "learning_rate": config.learning_rate,
        "texts_per_step": loop.course.per_step * config.rows,
        "length": config.length,
        "seed": config.seed,
        **measured,
    }
