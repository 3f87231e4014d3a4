"""Train the embedded target or its draft sibling; killed at any moment, it continues from its last checkpoint.

python -m recipes.embedded.pretrain --work WORK --shape target --minutes 45
python -m recipes.embedded.pretrain --work WORK --shape draft --minutes 12 --teacher WORK/target
"""

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from recipes.embedded.measure import held_out_losses
from recipes.embedded.mixture import Mixture, load_streams

SHAPES = {
    "target": {"num_hidden_layers": 8, "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3},
    "draft": {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2},
}
WARMUP = 0.03  # share of the budget
FLOOR = 0.02  # share of the peak learning rate that is left at the end


@dataclass(frozen=True)
class Plan:
    """How long and how to train: `minutes` of this process's own time, or `steps` where time must not matter."""

    minutes: float | None = None
    steps: int | None = None
    rows: int = 8
    length: int = 512
    learning_rate: float = 4e-3
    save_every: float = 60.0  # seconds

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give a budget: either minutes or steps, not both")

    def progress(self, seconds: float, step: int) -> float:
        """Share of the budget that is spent; 1 or more means: stop."""
        return step / self.steps if self.steps is not None else seconds / (60 * self.minutes)

    def rate(self, progress: float) -> float:
        """Learning rate: a linear warm-up, then half a cosine down to FLOOR."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * min(1.0, (progress + 1e-3) / WARMUP) * (FLOOR + (1 - FLOOR) * cosine)


@dataclass
class Run:
    """Everything that changes while training, and so everything a checkpoint holds."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    mixture: Mixture
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write next to `path` and rename, so that a kill never leaves half a checkpoint."""
        counters = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        parts = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        unfinished = path.with_suffix(".unfinished")
        torch.save({**parts, "mixture": self.mixture.state(), "counters": counters}, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.mixture.restore(saved["mixture"])
        self.step, self.tokens = saved["counters"]["step"], saved["counters"]["tokens"]
        self.seconds = saved["counters"]["seconds"]


def new_model(shape: dict[str, int], tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    config = LlamaConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"],
        head_dim=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return model


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms; the rate is set at every step.

    Muon (Jordan et al. 2024) orthogonalises its updates and needs fewer tokens; its scale is matched to AdamW's
    (Liu et al. 2025), so that one rate serves both.
    """
    inside = [p for p in model.model.layers.parameters() if p.ndim == 2]
    ids = set(map(id, inside))
    rest = [p for p in model.parameters() if id(p) not in ids]
    muon = torch.optim.Muon(inside, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.95), fused=True)]


def loss_of(model: LlamaForCausalLM, teacher: LlamaForCausalLM | None, batch: Tensor) -> Tensor:
    """Cross-entropy with the next tokens or, given a teacher, with its distribution over them.

    The draft needs the teacher's view of the text, not the text's: that is what acceptance measures.
    batch: [rows, length + 1] int64. Returns a scalar, nats per token.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits.flatten(0, 1)  # [rows * length, vocab]
        if teacher is None:
            return F.cross_entropy(logits.float(), batch[:, 1:].flatten())
        with torch.no_grad():
            taught = teacher(batch[:, :-1], use_cache=False).logits.flatten(0, 1).float().softmax(dim=-1)
    return F.cross_entropy(logits.float(), taught)


def take_step(run: Run, plan: Plan, teacher: LlamaForCausalLM | None) -> None:
    rate = plan.rate(plan.progress(run.seconds, run.step))
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = rate
    batch = run.mixture.batch_of_step(run.step, plan.rows, plan.length)
    loss = loss_of(run.model, teacher, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    run.step, run.tokens = run.step + 1, run.tokens + batch[:, 1:].numel()
    run.losses.append(loss.item())


def train(run: Run, plan: Plan, checkpoint: Path, teacher: LlamaForCausalLM | None = None) -> None:
    """Take steps until the budget is spent, with a line of log and a checkpoint now and then."""
    if checkpoint.exists():
        run.load(checkpoint)
    started, saved = time.monotonic() - run.seconds, time.monotonic()
    while plan.progress(run.seconds, run.step) < 1:
        take_step(run, plan, teacher)
        run.seconds = time.monotonic() - started
        if run.step % 20 == 0:
            print(describe(run), flush=True)
            run.losses.clear()
        if time.monotonic() - saved > plan.save_every:
            run.save(checkpoint)
            saved = time.monotonic()
    run.save(checkpoint)


def describe(run: Run) -> str:
    mean = sum(run.losses) / len(run.losses)
    speed = run.tokens / max(run.seconds, 1e-9)
    return f"step {run.step}  loss {mean:.3f}  tokens {run.tokens:,}  {run.seconds / 60:.1f} min  {speed:,.0f} tokens/s"


def export(run: Run, work: Path, folder: Path) -> None:
    """Write the model in bf16 with its tokenizer, and what was measured on held-out text beside the checkpoint."""
    run.model.eval().to(torch.bfloat16).save_pretrained(folder)
    shutil.copytree(work / "tokenizer", folder, dirs_exist_ok=True)
    report = {"steps": run.step, "tokens": run.tokens, "seconds": round(run.seconds), "mixture": run.mixture.state()}
    report["held_out"] = held_out_losses(run.model.float(), load_streams(work, "held_out"))
    folder.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def pretrain(work: Path, shape: str, plan: Plan, seed: int, teacher_folder: Path | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    shares = {name: facts["share"] for name, facts in json.loads((work / "sources.json").read_text()).items()}
    model = new_model(SHAPES[shape], tokenizer, seed)
    run = Run(model, new_optimizers(model), Mixture(load_streams(work, "train"), shares))
    teacher = None
    if teacher_folder is not None:
        teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    print(f"{shape}: {model.num_parameters():,} parameters", flush=True)
    train(run, plan, work / f"{shape}.checkpoint.pt", teacher)
    export(run, work, work / shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that prepare filled")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="budget in time; the cosine follows it")
    budget.add_argument("--steps", type=int, help="budget in steps, for runs that must repeat exactly")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate (default 4e-3)")
    parser.add_argument("--seed", type=int, default=0, help="initial weights (default 0)")
    parser.add_argument("--teacher", type=Path, default=None, help="model folder to distil from (default: none)")
    args = parser.parse_args()
    plan = Plan(minutes=args.minutes, steps=args.steps, learning_rate=args.rate)
    pretrain(args.work, args.shape, plan, args.seed, args.teacher)


if __name__ == "__main__":
    main()
