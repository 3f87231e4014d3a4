"""Published heads of EAGLE and EAGLE-2, whose files are alike, and what EAGLE-3's files have in common with them.

One decoder layer without a norm before its attention and without a final norm; the projection reads [embedding, hidden state].
Engines differ where files do: vLLM drops `fc.bias`, SGLang adds one where there is none; here the tensors decide. The embedding
stored with most heads is a copy of the target's; where it differs, it is kept as the heads' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from headstart.drafters.registry import method
from headstart.formats.published import layer_config
from headstart.formats.published.base import Published, base_of, disagreements, num_rows
from headstart.formats.weights import TensorShape, Weights

if TYPE_CHECKING:
    from headstart.drafters.parts.heads import Heads
    from headstart.formats.target_info import TargetInfo
    from headstart.target.embed_head import EmbedHead

EMBEDDING, STORED_EMBEDDING = "embedding.weight", "embed_tokens.weight"  # our name, and theirs
_INV_FREQ = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # rotary frequencies in older checkpoints; computed here, never read
Renames = Sequence[tuple[str, str]]  # prefixes of names: ours, and theirs


class Unprefixed:
    """Names of tensors without the `model.` that some files put before them.

    full: maps each name without it to the name in the files.
    shapes: shape of every tensor, by the name without it.
    """

    def __init__(self, weights: Weights) -> None:
        self.full: dict[str, str] = {}
        for name in weights.shapes:
            self.full.setdefault(name.removeprefix("model."), name)
        self.shapes = {unprefixed: weights.shapes[name] for unprefixed, name in self.full.items()}

    def sized(self, name: str, dims: int) -> TensorShape:
        """Shape of a tensor. Raises ValueError where it has another number of dimensions than `dims`, or is empty."""
        shape = self.shapes[name]
        if len(shape) != dims or 0 in shape:
            raise ValueError(f"{self.full[name]} has the shape {list(shape)} and should be a {'matrix' if dims == 2 else 'list'}")
        return shape

    def inside(self, prefix: str) -> dict[str, TensorShape]:
        """Shapes of the tensors whose names begin with `prefix`, by the rest of the name."""
        return {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}

    def stored_names(self, names: Sequence[str], renames: Renames) -> dict[str, str]:
        """Maps our tensor names to theirs. renames: the first pair whose prefix of ours fits a name applies to it."""
        stored = {}
        for name in names:
            ours, theirs = next((pair for pair in renames if name.startswith(pair[0])), ("", ""))
            unprefixed = theirs + name.removeprefix(ours)
            stored[name] = self.full.get(unprefixed, unprefixed)
        return stored

    def rotary_tables(self) -> dict[str, TensorShape]:
        """Shapes of the tables of rotary frequencies, which are left out, by the name in the files."""
        return {self.full[name]: shape for name, shape in self.shapes.items() if _INV_FREQ.fullmatch(name)}


@dataclass(frozen=True, eq=False)
class EagleHead(Published):
    """Published EAGLE heads; their embedding may turn out to be the target's."""

    def for_target(
        self, target_info: TargetInfo, embed_head: Callable[[], EmbedHead] | None = None, taps: Sequence[int] = ()
    ) -> Self:
        """The heads without their embedding where it equals the target's, both rounded to the coarser of the two dtypes."""
        heads = super().for_target(target_info, embed_head, taps)
        if self.refused or embed_head is None or EMBEDDING not in self.names:
            return heads
        self.check_sizes(target_info)
        stored = self._floats(str(self.names[EMBEDDING]))
        embedding = embed_head().embed_weight
        is_same = stored.shape == embedding.shape and (
            torch.equal(stored.to(embedding.dtype), embedding) or torch.equal(stored, embedding.to(stored.dtype))
        )
        return self._without_embedding() if is_same else self._noted("their embedding is not the target's, and kept as their own")

    def _without_embedding(self) -> Self:
        stored = str(self.names[EMBEDDING])
        return replace(
            self,
            settings={**self.settings, "embedding": "shared"},
            names={ours: name for ours, name in self.names.items() if ours != EMBEDDING},
            unused={**self.unused, stored: self.weights.shapes[stored]},
            notes=(*self.notes, "their embedding is the target's, and left out"),
        )

    def _noted(self, note: str) -> Self:
        return replace(self, notes=(*self.notes, note))

    def read(self, target_info: TargetInfo, target_config: Any) -> Heads:
        """The drafter for this target, as `Published.read` returns it, and with the same errors."""
        return Published.read(self.for_target(target_info), target_info, target_config)


def match(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """The EAGLE heads that these weights are; None where they are none."""
    unprefixed = Unprefixed(weights)
    if not _is_eagle(unprefixed, config):
        return None
    hidden, layer = num_rows(weights, [unprefixed.full["fc.weight"]]), unprefixed.inside("layers.0.")
    vocab = num_rows(weights, [unprefixed.full[STORED_EMBEDDING]]) if STORED_EMBEDDING in unprefixed.full else None
    has_bias = "fc.bias" in unprefixed.full
    heads = EagleHead(
        weights=weights,
        method="eagle",
        layout="EAGLE heads",
        settings={},
        hidden=hidden,
        vocab=vocab,
        names={},
        head_tensors=tuple(weights.shapes),
        unused=unprefixed.rotary_tables(),
        base=base_of(config),
    )
    try:
        settings = {
            "block": layer_config.block(config, layer, hidden, 1),
            "context": layer_config.limit(config),
            "bias": has_bias,
            "embedding": "shared" if vocab is None else "own",
        }
        notes = [*layer_config.doubts(config, layer), *_doubts(config, has_bias, hidden, vocab)]
        our_names = tensor_names("eagle", settings, hidden, vocab)
        names = unprefixed.stored_names(our_names, [("block.", ""), ("embedding.", "embed_tokens.")])
    except ValueError as error:
        return replace(heads, refused=str(error))
    return replace(heads, settings=settings, names=names, notes=tuple(notes))


def tensor_names(kind: str, settings: Mapping[str, Any], hidden: int, vocab: int | None) -> list[str]:
    """Names of the tensors of a drafter.

    kind: name of its method.
    settings: fields of the method's `config_type`.
    hidden, vocab: widths of the target's hidden states and logits.
    Raises ValueError for settings that no drafter can have.
    """
    drafter = method(kind)
    with torch.device("meta"):
        return [*drafter(drafter.config_type.model_validate(dict(settings)), hidden, vocab or 1).state_dict()]


def is_other(unprefixed: Unprefixed, config: Mapping[str, Any]) -> bool:
    """Whether the heads are of a later method that has names in common with EAGLE, such as DFlash."""
    kind = config.get("speculators_model_type")
    called = " ".join(map(str, config.get("architectures") or ()))
    is_called = "dflash_config" in config or re.search("dflash|dspark", called, re.IGNORECASE) is not None
    return is_called or kind not in (None, "eagle", "eagle3", "peagle") or "hidden_norm.weight" in unprefixed.full


def _is_eagle(unprefixed: Unprefixed, config: Mapping[str, Any]) -> bool:
    """Whether there is a projection of [embedding, hidden state], or one beside a layer. A complete model may have an `fc` too."""
    fc = unprefixed.shapes.get("fc.weight")
    if fc is None or is_other(unprefixed, config) or ("norm.weight" in unprefixed.full and unprefixed.inside("layers.1.")):
        return False
    return (len(fc) == 2 and fc[1] == 2 * fc[0]) or bool(unprefixed.inside("layers.0."))


def _doubts(config: Mapping[str, Any], has_bias: bool, hidden: int, vocab: int | None) -> Iterator[str]:
    if isinstance(config.get("bias"), bool) and config["bias"] != has_bias:
        declared, stored = str(config["bias"]).lower(), "one" if has_bias else "none"
        yield f"their config.json says bias = {declared}, their tensors have {stored}; the tensors count"
    yield from disagreements(config, {"hidden_size": hidden, **({} if vocab is None else {"vocab_size": vocab})})
