"""The training loop: the steps of a run, and what happens between them.

The loss of a step is the sum over all its batches, on all processes, divided by the number of positions in their loss mask, so it
does not depend on how a step is cut into batches and processes. The module must not import models, methods or the engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstart.drafters.parts.losses import Metrics
from headstart.training.batching import BatchOrder, evenly
from headstart.training.dataset import Dataset, TextBatch
from headstart.training.interrupt import Interrupt
from headstart.training.lr_schedule import lr_schedule
from headstart.training.packing import Packed
from headstart.training.run_config import RunConfig
from headstart.training.run_log import RunLog, SummarizeMetrics, flatten, format_held_out, summarize_metrics
from headstart.training.run_state import Checkpoints, Identity, State
from headstart.training.sharding import whole

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Which texts each step reads.

    order: of the train texts.
    total: number of batches that the budget pays for.
    per_step: batches of a step, of all processes.
    """

    dataset: Dataset | Packed
    order: BatchOrder
    total: int
    per_step: int

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return -(-self.total // self.per_step)

    def batches(self, step: int) -> list[tuple[int, ...]]:
        """The batches of a step, as indices of texts; the last step may have fewer."""
        first = step * self.per_step
        last = min(first + self.per_step, self.total)
        return [tuple(self.dataset.train[index] for index in self.order[position]) for position in range(first, last)]


class Loop:
    """The loop of one run.

    loss_module, optimizers: as accelerate prepared them.
    summarize: names the values of the log.
    decode: returns tau of a real decode with the heads as they are now, or None.
    decode_every: steps between two of them, or None.
    """

    def __init__(
        self, config: RunConfig, batch_plan: BatchPlan, loss_module: torch.nn.Module, optimizers: Sequence[Any],
        accelerator: Accelerator, checkpoints: Checkpoints, identity: Identity, log: RunLog,
        summarize: SummarizeMetrics = summarize_metrics, decode: Callable[[], float] | None = None,
        decode_every: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.batch_plan, self.log = config, batch_plan, log
        self.loss_module, self.optimizers, self.accelerator = loss_module, optimizers, accelerator
        self.checkpoints, self.identity = checkpoints, identity
        self.summarize, self.decode, self.decode_every = summarize, decode, decode_every
        self.state = State()
        self._logged = (0.0, 0)  # seconds and tokens at the last line of the log

    def run_to_end(self, state: State, command: str) -> dict[str, Any]:
        """Call `run`; print how to continue if it is interrupted, and close the trackers however it ends.

        command: of `headstart`, which continues the run.
        """
        try:
            return self.run(state)
        except KeyboardInterrupt:
            again = f"headstart {command} --config {self.config.out / 'config.yaml'} --resume"
            self.log.print(f"stopped after step {state.step}; go on with: {again} (--finish in its place ends the run there)")
            raise
        finally:
            self.accelerator.end_training()

    def finish_at(self, state: State) -> dict[str, Any]:
        """End the run at `state` without further steps; returns the values of the held-out texts, if there are any."""
        self.state = state
        try:
            return self.evaluate() if self.batch_plan.dataset.held_out else {}
        finally:
            self.accelerator.end_training()

    def planned_steps(self) -> dict[str, int]:
        """`steps_planned` for the record of a run that ended early; empty for one that ended as planned."""
        return {} if self.state.step == self.batch_plan.steps else {"steps_planned": self.batch_plan.steps}

    def run(self, state: State) -> dict[str, Any]:
        """Train from `state` to the end of the budget; returns the last values, of held-out texts where there are any.

        Raises KeyboardInterrupt after saving a checkpoint.
        Raises ValueError for a loss or gradient that is not finite, and for a full disk.
        """
        self.state = state
        self._logged = (state.seconds, state.tokens)
        last: dict[str, Any] = {}
        with Interrupt() as interrupt, self.log.running(state.step, self.batch_plan.steps):
            while state.step < self.batch_plan.steps:
                began = time.perf_counter()
                norm = self._step()
                state.seconds += time.perf_counter() - began
                last = self._after_step(norm) or last
                if self._is_interrupted(interrupt):
                    self._save()
                    raise KeyboardInterrupt
        return self.evaluate() if self.batch_plan.dataset.held_out else last

    @property
    def progress(self) -> float:
        """Share of the run's steps that are done, in [0, 1]."""
        return self.state.step / self.batch_plan.steps

    # -- one step --

    def _step(self) -> float:
        """Train on the next batches; returns the norm of the gradient before it is clipped."""
        batches = self.batch_plan.batches(self.state.step)
        count = sum(self.batch_plan.dataset.texts[index].num_targets for batch in batches for index in batch)
        local = self._local_batches(batches)
        self.loss_module.train()
        self._set_learning_rate()  # before the gradients, because DeepSpeed steps as soon as it has them
        loss, metrics = self._gradients(local, count)
        loss, metrics = self._reduce(loss, metrics)
        self._check_finite(float(loss), batches, "loss")
        norm = float(whole(self.accelerator.clip_grad_norm_(self.loss_module.parameters(), self.config.clip or math.inf)))
        if self.accelerator.scaler is None:  # a gradient scaler skips such a step by itself
            self._check_finite(norm, batches, "gradient")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._update_state(batches, float(loss), metrics)
        return norm

    def _local_batches(self, batches: Sequence[tuple[int, ...]]) -> list[TextBatch]:
        """This process's batches, padded; every process has the same number."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        local = [self.batch_plan.dataset.pad(batch) for batch in batches[rank::processes]]
        missing = -(-len(batches) // processes) - len(local)
        return local + [self.batch_plan.dataset.masked_batch()] * missing

    def _gradients(self, local: Sequence[TextBatch], count: int) -> tuple[Tensor, Metrics]:
        """Add up gradients; processes exchange them with the last batch only. Returns this process's summed loss and metrics."""
        scale = self.accelerator.num_processes / count  # accelerate averages over processes, and the sum is needed
        losses, metrics = [], []
        for index, texts in enumerate(local):
            is_last = index == len(local) - 1
            self.accelerator.sync_gradients = is_last
            with nullcontext() if is_last else self.accelerator.no_sync(self.loss_module):
                with self.accelerator.autocast():
                    loss, of_batch = self.loss_module(texts, self.progress)
                self.accelerator.backward(loss * scale)
            losses.append(loss.detach())
            metrics.append(of_batch)
        return torch.stack(losses).sum(), _summed(metrics)

    def _reduce(self, loss: Tensor, metrics: Metrics) -> tuple[Tensor, Metrics]:
        """The sums over processes, on the host."""
        stacked = metrics.stacked()
        both = torch.cat([loss.to(stacked).reshape(1), stacked.flatten()])
        both = self.accelerator.reduce(both, "sum").cpu()
        return both[0], Metrics.of(both[1:].reshape(stacked.shape))

    def _check_finite(self, value: float, batches: Sequence[tuple[int, ...]], name: str) -> None:
        if math.isfinite(value):
            return
        newest = self.checkpoints.newest()
        texts = ", ".join(str(index) for batch in batches for index in batch[:4])
        kept = f"the checkpoint of step {int(newest.name[5:])} is kept" if newest else "no checkpoint was written yet"
        raise ValueError(
            f"the {name} of step {self.state.step + 1} is {value}, with texts {texts} (counted from 0, in the order of the data); "
            f"{kept}; lower learning_rate (now {self.config.learning_rate:g}), or look at these texts"
        )

    def _set_learning_rate(self) -> None:
        share = lr_schedule(self.state.step, self.batch_plan.steps, self.config.warmup, self.config.schedule, self.config.floor)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * share

    def _update_state(self, batches: Sequence[tuple[int, ...]], loss: float, metrics: Metrics) -> None:
        state = self.state
        state.step += 1
        state.batches += len(batches)
        state.tokens += sum(len(self.batch_plan.dataset.texts[index].tokens) for batch in batches for index in batch)
        before = torch.tensor(state.window) if state.window else torch.zeros_like(metrics.stacked())
        state.window = (before + metrics.stacked()).tolist()
        state.window_loss += loss

    # -- between steps --

    def _after_step(self, norm: float) -> dict[str, Any] | None:
        """Log, evaluate, decode and save where it is due; returns the newest values, or None."""
        step, is_end = self.state.step, self.state.step == self.batch_plan.steps
        self.log.advance(step)
        values = self._log_window(norm) if step % self.config.log_every == 0 or is_end else None
        if _is_due(step, self.config.eval_every) and self.batch_plan.dataset.held_out and not is_end:
            values = self.evaluate()
        if _is_due(step, self.decode_every) and self.decode is not None:
            self._log_decode(self.decode())
        if _is_due(step, self.config.save_every) or is_end:
            self._save()
        return values

    def _log_window(self, norm: float) -> dict[str, Any]:
        """Log the values since the last line, and start a new window."""
        state = self.state
        summary = self.summarize(Metrics.of(torch.tensor(state.window)), state.window_loss, "")
        seconds, tokens = state.seconds - self._logged[0], state.tokens - self._logged[1]
        rate = tokens / seconds if seconds else 0.0
        values = {"step": state.step, "tokens": state.tokens, **summary, "learning_rate": self.optimizers[0].param_groups[0]["lr"]}
        values |= {"gradient": norm, "seconds": round(state.seconds, 3), "tokens_per_second": round(rate, 1)}
        self._write(values)
        seconds_left = state.seconds / state.step * (self.batch_plan.steps - state.step)
        self.log.print_progress(values, self.batch_plan.steps, seconds_left)
        self._logged = (state.seconds, state.tokens)
        state.window, state.window_loss = [], 0.0
        return summary

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """The values of the held-out texts, by teacher forcing."""
        dataset = self.batch_plan.dataset
        lengths = [len(dataset.texts[index].tokens) for index in dataset.held_out]
        batches = [tuple(dataset.held_out[index] for index in batch) for batch in evenly(lengths, self.config.rows)]
        self.loss_module.eval()
        with self.accelerator.autocast():
            results = [self.loss_module(texts, self.progress) for texts in self._local_batches(batches)]
        loss, metrics = self._reduce(torch.stack([loss for loss, _ in results]).sum(), _summed([own for _, own in results]))
        values = self.summarize(metrics, float(loss), "held_out_")
        self._write({"step": self.state.step, **values})
        self.log.print(f"step {self.state.step}/{self.batch_plan.steps}  {format_held_out(values)}")
        return values

    def _log_decode(self, tau: float) -> None:
        self._write({"step": self.state.step, "decoded_tau": tau})
        self.log.print(f"step {self.state.step}/{self.batch_plan.steps}  decoded: tau {tau:.3f}")

    def _write(self, values: dict[str, Any]) -> None:
        """Write values to `log.jsonl` and to the tracker."""
        self.log.write(values)
        self.accelerator.log(flatten(values), step=self.state.step)

    def _save(self) -> None:
        self.checkpoints.save(self.state, self.identity)

    def _is_interrupted(self, interrupt: Interrupt) -> bool:
        """Whether any process was asked to stop: all must save together."""
        if self.accelerator.num_processes == 1:
            return interrupt.is_requested
        requested = torch.tensor(float(interrupt.is_requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(requested, "sum"))


def _summed(metrics: Sequence[Metrics]) -> Metrics:
    return Metrics.of(torch.stack([of_batch.stacked() for of_batch in metrics]).sum(0))


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
