"""The loss of a drafter over all depths, computed and differentiated in parts, so that all logits never exist at once.

Must not import a method, a target or an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headstart.drafters.parts.losses import CHUNK, Batch, HeadOutput, Metrics, Objective, OutputHead

Teach = Callable[[Tensor], Tensor]  # the target's last hidden states [n, hidden] -> its logits [n, vocab]


def drafter_loss(outputs: Iterator[HeadOutput], batch: Batch, objective: Objective, teach: Teach) -> tuple[Tensor, Metrics]:
    """The loss of all depths, a scalar, and metrics.

    The loss is summed over the positions that count; divide by the first of `Metrics.counts` for the mean.

    outputs: one per depth, from 1.
    teach: called only where the objective has a teacher.
    """
    losses, columns = zip(*loss_by_depth(outputs, batch, objective, teach), strict=True)
    return torch.stack(losses).sum(), Metrics.of(torch.stack(columns, 1))


def loss_by_depth(
    outputs: Iterator[HeadOutput], batch: Batch, objective: Objective, teach: Teach
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each depth its weighted, summed loss, a scalar, and its column of `Metrics.stacked`, [4].

    Parameters are those of `drafter_loss`.
    """
    unbroken = torch.ones_like(batch.loss_mask)  # positions at which all best guesses so far were right
    for depth, output in enumerate(outputs, 1):
        counted = batch.counted(depth)
        rows, positions = counted.nonzero(as_tuple=True)
        tokens = batch.tokens[rows, positions + depth + 1]
        last_hidden = batch.last_hidden[rows, positions + depth] if objective.has_teacher else None
        loss, hits = chunked_loss(output.output_head, output.states[rows, positions], tokens, last_hidden, objective, teach)
        right = torch.zeros_like(unbroken)
        right[rows, positions] = hits
        unbroken = unbroken & right
        column = torch.stack([loss.detach(), *(count.sum().float() for count in (counted, hits, unbroken))])
        yield objective.decay ** (depth - 1) * loss, column


# Features [rows, length, width] -> for each part its loss, a scalar, and its columns of `Metrics.stacked`, [4, depths of the part].
Parts = Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]


def backward_by_part(parts: Parts, features: Tensor, weights: Iterable[nn.Parameter]) -> tuple[Tensor, Metrics]:
    """The sum of the parts' losses, a scalar, and metrics, with the memory of one part.

    Each part is run and differentiated before the next one begins; the gradients of features and weights are kept, and reach the
    trunk when the sum is differentiated (Gloeckle et al. 2024, section 2).

    parts: yields losses that share nothing except the features and the weights.
    features: [rows, length, width].
    weights: all that learn in any part.
    """
    columns: list[Tensor] = []

    def losses(inputs: Tensor, _: slice) -> Iterator[Tensor]:
        for loss, column in parts(inputs):
            columns.append(column.detach())
            yield loss

    unique = list({id(weight): weight for weight in weights}.values())
    total = _summed(losses, features, [slice(None)], unique)
    return total, Metrics.of(torch.cat(columns, 1))


def chunked_loss(
    output_head: OutputHead, states: Tensor, tokens: Tensor, last_hidden: Tensor | None, objective: Objective, teach: Teach
) -> tuple[Tensor, Tensor]:
    """The summed loss of many positions, a scalar, and which best guesses were right, [n] bool; `CHUNK` positions at a time.

    Gradients are taken chunk by chunk while the logits exist, so that neither they nor a second forward are needed later.

    states: [n, width].
    tokens: [n] int64.
    last_hidden: [n, hidden], or None without a teacher.
    """
    hits = torch.zeros(len(states), dtype=torch.bool, device=states.device)

    def losses(inputs: Tensor, chunk: slice) -> Iterator[Tensor]:
        logits = output_head(inputs)
        with torch.no_grad():
            teacher_logits = None if last_hidden is None else teach(last_hidden[chunk])
        best = logits.detach().float().argmax(-1)  # the same as in bf16, where a CPU takes four times as long
        hits[chunk] = (best if output_head.ids is None else output_head.ids[best]) == tokens[chunk]
        yield objective(logits, tokens[chunk], teacher_logits, output_head.ids).sum()

    chunks = [slice(start, start + CHUNK) for start in range(0, len(states), CHUNK)]
    return _summed(losses, states, chunks, output_head.weights), hits


Losses = Callable[[Tensor, slice], Iterator[Tensor]]  # a slice of the inputs, and which -> losses, scalars


def _summed(losses: Losses, inputs: Tensor, chunks: Sequence[slice], weights: Iterable[nn.Parameter]) -> Tensor:
    """The sum of all losses of all chunks of the inputs, each differentiated before the next one is computed."""
    learning = [weight for weight in weights if weight.requires_grad]
    total: Tensor = _SummedLosses.apply(losses, chunks, inputs, *learning)  # type: ignore[no-untyped-call]
    return total


class _SummedLosses(torch.autograd.Function):
    """Forward and backward of each loss at once; keeps the gradients of inputs and weights, never logits."""

    @staticmethod
    def forward(ctx: Any, losses: Losses, chunks: Sequence[slice], inputs: Tensor, *weights: Tensor) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        sums = [torch.zeros_like(tensor) for tensor in (inputs, *weights)] if needs_grad else []
        total = inputs.new_zeros((), dtype=torch.float32)
        for chunk in chunks:
            with torch.set_grad_enabled(needs_grad):
                part = inputs[chunk].detach().requires_grad_(needs_grad)
                for loss in losses(part, chunk):
                    if needs_grad:
                        grads = torch.autograd.grad(loss, [part, *weights], allow_unused=True)
                        _add([sums[0][chunk], *sums[1:]], grads)
                    total = total + loss.detach()
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, *(grad * saved for saved in ctx.saved_tensors)


@torch.no_grad()
def _add(sums: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for total, grad in zip(sums, grads, strict=True):
        if grad is not None:
            total += grad
