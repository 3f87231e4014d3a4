"""What forwards with a `Probe` tell about a model: shapes and windows of its layers, and state that passes beside its attention.

With a probe that lets each token attend to itself only, the output of a token can depend on another token only through something
other than attention: a recurrence, a convolution, positions that the model counts itself. A tree cannot share such state.
This module must not import forests or KV caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.target.attention import Probe

if TYPE_CHECKING:
    from headstart.target.target import Target

NUM_TOKENS = 8  # of a probed text


def probe_layers(target: Target) -> tuple[Probe, int]:
    """What each layer passes to its attention in a forward of two tokens, and the width of the logits.

    Raises ValueError, naming the model and the reason, where a layer does not use the attention function, masks by itself or is
    not causal, and where the logits are nan.
    """
    probe, model = Probe(), target.model
    try:
        logits = target.probe([0, 1], probe)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refusal(target, str(error)) from None
    missing = target.num_layers - len(probe.shapes)
    if missing == target.num_layers:
        raise refusal(target, "it bypasses the attention interface of transformers (alibi, or modelling code older than it)")
    if missing:
        raise refusal(
            target, f"it keeps a state of its own in {missing} of {target.num_layers} layers (recurrent or linear attention)"
        )
    if bool(logits.isnan().any()):
        raise refusal(target, "it answers with nan, so its weights are damaged; copy them again")
    if probe.masking:
        raise refusal(target, f"{', '.join(sorted(probe.masking))} makes an attention mask of its own")
    if probe.looking_ahead or not getattr(model.config.get_text_config(), "is_causal", True):
        layers = ", ".join(sorted(probe.looking_ahead)) or "config.is_causal"
        raise refusal(target, f"its attention sees later tokens too ({layers})")
    return probe, int(logits.shape[-1])


def refusal(target: Target, reason: str) -> ValueError:
    """The error for a model that cannot be served exactly."""
    return ValueError(f"{target.name} ({type(target.model).__name__}) cannot be a target: {reason}")


def convolutions(target: Target) -> list[str]:
    """Class names of the modules that run in a forward and own a convolution along the text, whatever its weights are."""
    owners = [
        module
        for module in target.model.modules()
        if any(isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1 for child in module.children())
    ]
    ran: list[str] = []
    hooks = [module.register_forward_hook(lambda module, _args, _out: ran.append(type(module).__name__)) for module in owners]
    try:
        target.probe([0, 1] * (NUM_TOKENS // 2), Probe())
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(set(ran))


def changed_middle(target: Target, seed: int) -> tuple[Tensor, Tensor]:
    """[2, vocab] each: logits of the first and last token of two texts that differ in between; every token attends to itself only.

    They differ where something other than attention carries state from token to token.
    """
    one, other = (target.probe(text, Probe(alone=True))[:: NUM_TOKENS - 1] for text in _texts_with_changed_middle(target, seed))
    return one, other


def reversed_text(target: Target, seed: int) -> tuple[Tensor, Tensor]:
    """[tokens, vocab] each: logits of a text, and of the same text with tokens and positions reversed; each attends to itself only.

    Both in the order of the text. They differ where the model does not take positions from `position_ids`.
    """
    text, _ = _texts_with_changed_middle(target, seed)
    forwards = target.probe(text, Probe(alone=True))
    backwards = target.probe(text[::-1], Probe(alone=True), list(range(len(text)))[::-1])
    return forwards, backwards.flip(0)


def mixers(target: Target, seed: int) -> list[str]:
    """Class name of the first module whose output differs at the first or last token though its input there is the same.

    Found on the two texts of `changed_middle`; empty where no module is that clear.
    """
    records = [_records(target, text) for text in _texts_with_changed_middle(target, seed)]
    for (name, inputs, outputs), (_, other_inputs, other_outputs) in zip(*records, strict=True):
        if inputs and _equal(inputs, other_inputs) and not _equal(outputs, other_outputs):
            return [name]
    return []


def _texts_with_changed_middle(target: Target, seed: int) -> tuple[list[int], list[int]]:
    """Two texts with the same first and last token."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randint(0, target.vocab, (2, NUM_TOKENS), generator=generator).tolist()
    return one, [one[0], *other[1:-1], one[-1]]


def _records(target: Target, text: list[int]) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """For every module, in the order in which they finish: class name, and inputs and outputs at the first and last token."""
    records: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def first_and_last(values: Any) -> list[Tensor]:
        tensors = [value for value in values if isinstance(value, Tensor) and value.ndim > 2 and value.shape[1] == len(text)]
        return [value[0, :: len(text) - 1] for value in tensors]

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        outputs = out if isinstance(out, tuple | list) else (out,)
        records.append((type(module).__name__, first_and_last([*args, *kwargs.values()]), first_and_last(outputs)))

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in target.model.modules()]
    try:
        target.probe(text, Probe(alone=True))
    finally:
        for hook in hooks:
            hook.remove()
    return records


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))
