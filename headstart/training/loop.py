"""The loop: steps, and what happens between them.

A step's loss is the sum over all its batches, on all processes, divided by the number of positions that count in them: it does
not matter how a step is cut into batches and processes. This file knows steps. It refuses to know methods, models and files.
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
from headstart.training.run_log import Measure, RunLog, described, flat, measures
from headstart.training.run_state import Checkpoints, Identity, State

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """What is learned from. order: of the train texts. total: batches the budget buys. per_step: of all processes."""

    dataset: Dataset | Packed
    order: BatchOrder
    total: int
    per_step: int

    @property
    def steps(self) -> int:
        return -(-self.total // self.per_step)

    def batches(self, step: int) -> list[tuple[int, ...]]:
        """The batches of a step, as indices of texts; the last step may have fewer."""
        first = step * self.per_step
        last = min(first + self.per_step, self.total)
        return [tuple(self.dataset.train[place] for place in self.order[position]) for position in range(first, last)]


class Loop:
    """One run. loss_module, optimizers: as accelerate prepared them. measure: what metrics and loss are told as. decode,
    decode_every:
    what a real decode gives now, and the steps between two of them, or None."""

    def __init__(
        self, config: RunConfig, batch_plan: BatchPlan, loss_module: torch.nn.Module, optimizers: Sequence[Any], accelerator:
        Accelerator,
        checkpoints: Checkpoints, identity: Identity, report: RunLog, measure: Measure = measures,
        decode: Callable[[], float] | None = None, decode_every: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.batch_plan, self.loss_module, self.optimizers, self.accelerator = (
            config,
            batch_plan,
            loss_module,
            optimizers,
            accelerator,
        )
        self.measure, self.decode_every = measure, decode_every
        self.checkpoints, self.identity, self.report, self.decode = checkpoints, identity, report, decode
        self.state = State()
        self._pace_began = (0.0, 0)  # seconds and tokens at the last line

    def see_through(self, state: State, command: str) -> dict[str, Any]:
        """`run`, and what is said and closed when it ends, in whatever way. command: of `headstart`, which goes on with it."""
        try:
            return self.run(state)
        except KeyboardInterrupt:
            again = f"headstart {command} --config {self.config.out / 'config.yaml'} --resume"
            self.report.say(f"stopped after step {state.step}; go on with: {again} (--finish in its place ends the run there)")
            raise
        finally:
            self.accelerator.end_training()

    def end_at(self, state: State) -> dict[str, Any]:
        """What `see_through` returns, of a run that learns nothing more; held-out texts are measured, where there are some."""
        self.state = state
        try:
            return self.evaluate() if self.batch_plan.dataset.held_out else {}
        finally:
            self.accelerator.end_training()

    def left_out(self) -> dict[str, int]:
        """What a run that was ended early is told to have been meant for."""
        return {} if self.state.step == self.batch_plan.steps else {"steps_planned": self.batch_plan.steps}

    def run(self, state: State) -> dict[str, Any]:
        """From `state` to the end of the budget; what was measured last, on held-out texts where there are some.

        Raises KeyboardInterrupt after saving, and ValueError for a loss that is no number or a disk that is full.
        """
        self.state = state
        self._pace_began = (state.seconds, state.tokens)
        last: dict[str, Any] = {}
        with Interrupt() as interrupt, self.report.running(state.step, self.batch_plan.steps):
            while state.step < self.batch_plan.steps:
                began = time.perf_counter()
                norm = self._step()
                state.seconds += time.perf_counter() - began
                last = self._watch(norm) or last
                if self._is_pulled(interrupt):
                    self._save()
                    raise KeyboardInterrupt
        return self.evaluate() if self.batch_plan.dataset.held_out else last

    # -- one step --

    def _step(self) -> float:
        """Learn from the next batches; the norm of the gradient before it is clipped."""
        batches = self.batch_plan.batches(self.state.step)
        count = sum(self.batch_plan.dataset.texts[index].num_counted for batch in batches for index in batch)
        own = self._share(batches)
        self.loss_module.train()
        loss, metrics = self._gradients(own, count)
        loss, metrics = self._everywhere(loss, metrics)
        self._check_number(float(loss), batches, "loss")
        norm = float(self.accelerator.clip_grad_norm_(self.loss_module.parameters(), self.config.clip or math.inf))
        if self.accelerator.scaler is None:  # a scaler skips such a step by itself
            self._check_number(norm, batches, "gradient")
        self._set_pace()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._note(batches, float(loss), metrics)
        return norm

    def _share(self, batches: Sequence[tuple[int, ...]]) -> list[TextBatch]:
        """This process's batches, as many as every other's."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        own = [self.batch_plan.dataset.pad(batch) for batch in batches[rank::processes]]
        missing = -(-len(batches) // processes) - len(own)
        return own + [self.batch_plan.dataset.nothing()] * missing

    def _gradients(self, own: Sequence[TextBatch], count: int) -> tuple[Tensor, Metrics]:
        """Add up gradients, and exchange them with the last batch only. Returns the summed loss of this process, and metrics."""
        scale = self.accelerator.num_processes / count  # processes' gradients are averaged, and shall be summed
        losses, metrics = [], []
        for place, texts in enumerate(own):
            is_last = place == len(own) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.loss_module):
                loss, found = self.loss_module(texts)
                self.accelerator.backward(loss * scale)
            losses.append(loss.detach())
            metrics.append(found)
        return torch.stack(losses).sum(), Metrics.of(torch.stack([found.stacked() for found in metrics]).sum(0))

    def _everywhere(self, loss: Tensor, metrics: Metrics) -> tuple[Tensor, Metrics]:
        """Summed over processes, on the host."""
        stacked = metrics.stacked()
        both = torch.cat([loss.to(stacked).reshape(1), stacked.flatten()])
        both = self.accelerator.reduce(both, "sum").cpu()
        return both[0], Metrics.of(both[1:].reshape(stacked.shape))

    def _check_number(self, value: float, batches: Sequence[tuple[int, ...]], what: str) -> None:
        if math.isfinite(value):
            return
        newest = self.checkpoints.newest()
        texts = ", ".join(str(index) for batch in batches for index in batch[:4])
        kept = f"the checkpoint of step {int(newest.name[5:])} is kept" if newest else "no checkpoint was written yet"
        raise ValueError(
            f"the {what} of step {self.state.step + 1} is {value}, with texts {texts} (counted from 0, in the order of the data); "
            f"{kept}; lower learning_rate (now {self.config.learning_rate:g}), or look at these texts"
        )

    def _set_pace(self) -> None:
        share = lr_schedule(self.state.step, self.batch_plan.steps, self.config.warmup, self.config.schedule, self.config.floor)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * share

    def _note(self, batches: Sequence[tuple[int, ...]], loss: float, metrics: Metrics) -> None:
        state = self.state
        state.step += 1
        state.batches += len(batches)
        state.tokens += sum(len(self.batch_plan.dataset.texts[index].tokens) for batch in batches for index in batch)
        before = torch.tensor(state.window) if state.window else torch.zeros_like(metrics.stacked())
        state.window = (before + metrics.stacked()).tolist()
        state.window_loss += loss

    # -- between steps --

    def _watch(self, norm: float) -> dict[str, Any] | None:
        """Whatever is due after this step; what was measured, if something was."""
        step, is_end = self.state.step, self.state.step == self.batch_plan.steps
        self.report.advance(step)
        found = self._log(norm) if step % self.config.log_every == 0 or is_end else None
        if _is_due(step, self.config.eval_every) and self.batch_plan.dataset.held_out and not is_end:
            found = self.evaluate()
        if _is_due(step, self.decode_every) and self.decode is not None:
            self._decode(self.decode())
        if _is_due(step, self.config.save_every) or is_end:
            self._save()
        return found

    def _log(self, norm: float) -> dict[str, Any]:
        state = self.state
        found = self.measure(Metrics.of(torch.tensor(state.window)), state.window_loss, "")
        seconds, tokens = state.seconds - self._pace_began[0], state.tokens - self._pace_began[1]
        rate = tokens / seconds if seconds else 0.0
        values = {"step": state.step, "tokens": state.tokens, **found, "learning_rate": self.optimizers[0].param_groups[0]["lr"]}
        values |= {"gradient": norm, "seconds": round(state.seconds, 3), "tokens_per_second": round(rate, 1)}
        self._publish(values)
        self.report.tell(values, self.batch_plan.steps, state.seconds / state.step * (self.batch_plan.steps - state.step))
        self._pace_began = (state.seconds, state.tokens)
        state.window, state.window_loss = [], 0.0
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Measures of the held-out texts, by teacher forcing."""
        dataset = self.batch_plan.dataset
        lengths = [len(dataset.texts[index].tokens) for index in dataset.held_out]
        batches = [tuple(dataset.held_out[place] for place in batch) for batch in evenly(lengths, self.config.rows)]
        self.loss_module.eval()
        losses, metrics = zip(*(self.loss_module(texts) for texts in self._share(batches)), strict=True)
        loss, total = self._everywhere(
            torch.stack(losses).sum(), Metrics.of(torch.stack([found.stacked() for found in metrics]).sum(0))
        )
        found = self.measure(total, float(loss), "held_out_")
        self._publish({"step": self.state.step, **found})
        self.report.say(f"step {self.state.step}/{self.batch_plan.steps}  {described(found)}")
        return found

    def _decode(self, tau: float) -> None:
        self._publish({"step": self.state.step, "decoded_tau": tau})
        self.report.say(f"step {self.state.step}/{self.batch_plan.steps}  decoded: tau {tau:.3f}")

    def _publish(self, values: dict[str, Any]) -> None:
        self.report.write(values)
        self.accelerator.log(flat(values), step=self.state.step)

    def _save(self) -> None:
        self.checkpoints.save(self.state, self.identity)

    def _is_pulled(self, interrupt: Interrupt) -> bool:
        """Whether any process was asked to stop: all must save together."""
        if self.accelerator.num_processes == 1:
            return interrupt.is_pulled
        pulled = torch.tensor(float(interrupt.is_pulled), device=self.accelerator.device)
        return bool(self.accelerator.reduce(pulled, "sum"))


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
