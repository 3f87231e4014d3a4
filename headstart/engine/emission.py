"""What a request emits of the tokens that a round decided: up to its stop token, stop string or limit, with log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.engine.scheduler import Request, Stream


@dataclass(frozen=True)
class Emission:
    """What one request emits in one round.

    tokens: the emitted ones, a beginning of those that were decided.
    guessed: per token, whether a drafter had proposed it.
    text: what became final with them; empty without a stream.
    finish_reason: "stop" or "length" where the answer ends with them, else None.
    stream: the text stream after them, a new object, or None.
    """

    tokens: tuple[int, ...]
    guessed: tuple[bool, ...]
    text: str
    finish_reason: str | None
    stream: Stream | None


def emission_of(request: Request, decided: tuple[int, ...]) -> Emission:
    """What a request emits of the tokens that were decided in a round; the last of them is the target's own, the others are drafts.

    The request is not changed. Raises what its text stream raises.
    """
    tokens, stop_string, text = _until_stop(request, decided), None, ""
    stream = request.stream and request.stream.copy()
    if stream is not None:
        piece = stream.push(tokens)
        tokens, stop_string, text = tokens[: piece.num_tokens_used], piece.stopped, piece.text
    reason = None
    if stop_string is not None or tokens[-1] in request.stop_ids:
        reason = "stop"
    elif len(tokens) == request.left:
        reason = "length"
    if stream is not None and stop_string is None and reason is not None:
        rest = stream.flush()
        text += rest.text
        reason = reason if rest.stopped is None else "stop"
    guessed = tuple(index < len(decided) - 1 for index in range(len(tokens)))
    return Emission(tokens, guessed, text, reason, stream)


def _until_stop(request: Request, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens up to the first stop token, and no more than may be emitted."""
    for index, token in enumerate(tokens[: request.left]):
        if token in request.stop_ids:
            return tokens[: index + 1]
    return tokens[: request.left]


def token_logprobs(
    logits: Tensor, asked: Sequence[int], tokens: Sequence[int], num_alternatives: int
) -> list[tuple[float, dict[int, float]]]:
    """Per token its raw log-probability under the target (before temperature and penalties), and those of the best alternatives.

    logits: [asked, vocab] of a round.
    asked: per token, the index of its line in `logits`.
    """
    indices = torch.tensor([asked, tokens]).to(logits.device, non_blocking=True)
    lines = torch.log_softmax(logits[indices[0]].double(), -1)
    chosen = lines.gather(-1, indices[1][:, None]).squeeze(-1).tolist()
    best = lines.topk(num_alternatives, -1)
    tables = [dict(zip(ids, values, strict=True)) for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return list(zip(chosen, tables, strict=True))
