"""Published heads of EAGLE and EAGLE-2, which are the same: as their authors write them, and what EAGLE-3's files share with those.

One layer without a norm before its attention and none behind it; its projection reads the embedding first. Engines differ where
files do: vLLM drops `fc.bias`, SGLang makes one up where there is none; here the tensors count. The embedding that is stored with
most heads is a copy of the target's; where it is not, it is the heads' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from headstart.drafters.registry import method
from headstart.formats.published import layer_config as blocks
from headstart.formats.published.base import Published, base_of, disagreements, num_rows
from headstart.formats.weights import TensorShape, Weights

if TYPE_CHECKING:
    from headstart.drafters.parts.heads import Heads
    from headstart.formats.target_info import TargetInfo
    from headstart.target.embed_head import EmbedHead

EMBEDDING, TABLE = "embedding.weight", "embed_tokens.weight"  # ours, theirs
_ANGLES = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # of older checkpoints; made anew, never read
Renames = Sequence[tuple[str, str]]  # beginnings of names, ours and theirs


class Unprefixed:
    """Names of tensors without the `model.` that some files put before them."""

    def __init__(self, weights: Weights) -> None:
        self.full: dict[str, str] = {}
        for name in weights.shapes:
            self.full.setdefault(name.removeprefix("model."), name)
        self.shapes = {unprefixed: weights.shapes[name] for unprefixed, name in self.full.items()}

    def sized(self, name: str, dims: int) -> TensorShape:
        """TensorShape of a tensor that is there. Raises ValueError where it has another number of dimensions, or is empty."""
        shape = self.shapes[name]
        if len(shape) != dims or 0 in shape:
            raise ValueError(f"{self.full[name]} has the shape {list(shape)} and should be a {'matrix' if dims == 2 else 'list'}")
        return shape

    def inside(self, prefix: str) -> dict[str, TensorShape]:
        """ShapesByName of the tensors behind a beginning of names, by what follows it."""
        return {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}

    def named(self, wanted: Sequence[str], renames: Renames) -> dict[str, str]:
        """Names of ours to those in the files."""
        found = {}
        for name in wanted:
            ours, theirs = next((pair for pair in renames if name.startswith(pair[0])), ("", ""))
            unprefixed = theirs + name.removeprefix(ours)
            found[name] = self.full.get(unprefixed, unprefixed)
        return found

    def angles(self) -> dict[str, TensorShape]:
        """Tables of positions, which are left out."""
        return {self.full[name]: shape for name, shape in self.shapes.items() if _ANGLES.fullmatch(name)}


@dataclass(frozen=True, eq=False)
class EagleHead(Published):
    """Heads whose embedding may turn out to be the target's."""

    def for_target(
        self, target_info: TargetInfo, embed_head: Callable[[], EmbedHead] | None = None, taps: Sequence[int] = ()
    ) -> Self:
        """Their embedding is left out where it is the target's, once both are rounded to the coarser type."""
        found = super().for_target(target_info, embed_head, taps)
        if self.refused or embed_head is None or EMBEDDING not in self.names:
            return found
        self.check_sizes(target_info)
        theirs = self._floats(str(self.names[EMBEDDING]))
        table = embed_head().embed_weight
        is_same = theirs.shape == table.shape and (
            torch.equal(theirs.to(table.dtype), table) or torch.equal(theirs, table.to(theirs.dtype))
        )
        return self._without_table() if is_same else self._noted("their embedding is not the target's, and kept as their own")

    def _without_table(self) -> Self:
        theirs = str(self.names[EMBEDDING])
        return replace(
            self,
            settings={**self.settings, "embedding": "shared"},
            names={ours: name for ours, name in self.names.items() if ours != EMBEDDING},
            unused={**self.unused, theirs: self.weights.shapes[theirs]},
            notes=(*self.notes, "their embedding is the target's, and left out"),
        )

    def _noted(self, note: str) -> Self:
        return replace(self, notes=(*self.notes, note))

    def read(self, target_info: TargetInfo, target_config: Any) -> Heads:
        """The drafter, for that target. Raises ValueError where they do not fit the target, or are not whole."""
        return Published.read(self.for_target(target_info), target_info, target_config)


def match(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """What these EAGLE heads are; None where there are none."""
    unprefixed = Unprefixed(weights)
    if not _is_eagle(unprefixed, config):
        return None
    hidden, layer = num_rows(weights, [unprefixed.full["fc.weight"]]), unprefixed.inside("layers.0.")
    vocab = num_rows(weights, [unprefixed.full[TABLE]]) if TABLE in unprefixed.full else None
    has_bias = "fc.bias" in unprefixed.full
    found = EagleHead(
        weights=weights,
        method="eagle",
        layout="EAGLE heads",
        settings={},
        hidden=hidden,
        vocab=vocab,
        names={},
        head_tensors=tuple(weights.shapes),
        unused=unprefixed.angles(),
        base=base_of(config),
    )
    try:
        settings = {
            "block": blocks.block(config, layer, hidden, 1),
            "context": blocks.limit(config),
            "bias": has_bias,
            "embedding": "shared" if vocab is None else "own",
        }
        notes = [*blocks.doubts(config, layer), *_doubts(config, has_bias, hidden, vocab)]
        names = unprefixed.named(wanted("eagle", settings, hidden, vocab), [("block.", ""), ("embedding.", "embed_tokens.")])
    except ValueError as error:
        return replace(found, refused=str(error))
    return replace(found, settings=settings, names=names, notes=tuple(notes))


def wanted(kind: str, settings: Mapping[str, Any], hidden: int, vocab: int | None) -> list[str]:
    """Names of the tensors that a drafter of these settings has. Raises ValueError where there can be none."""
    drafter = method(kind)
    with torch.device("meta"):
        return [*drafter(drafter.config_type.model_validate(dict(settings)), hidden, vocab or 1).state_dict()]


def is_other(unprefixed: Unprefixed, config: Mapping[str, Any]) -> bool:
    """Whether they are of a method that came after EAGLE and has names in common with it, as DFlash."""
    kind = config.get("speculators_model_type")
    called = " ".join(map(str, config.get("architectures") or ()))
    is_called = "dflash_config" in config or re.search("dflash|dspark", called, re.IGNORECASE) is not None
    return is_called or kind not in (None, "eagle", "eagle3", "peagle") or "hidden_norm.weight" in unprefixed.full


def _is_eagle(unprefixed: Unprefixed, config: Mapping[str, Any]) -> bool:
    """A projection of [embedding, state], or one beside a layer. A whole model may have an `fc` too."""
    fc = unprefixed.shapes.get("fc.weight")
    if fc is None or is_other(unprefixed, config) or ("norm.weight" in unprefixed.full and unprefixed.inside("layers.1.")):
        return False
    return (len(fc) == 2 and fc[1] == 2 * fc[0]) or bool(unprefixed.inside("layers.0."))


def _doubts(config: Mapping[str, Any], has_bias: bool, hidden: int, vocab: int | None) -> Iterator[str]:
    if isinstance(config.get("bias"), bool) and config["bias"] != has_bias:
        said, found = str(config["bias"]).lower(), "one" if has_bias else "none"
        yield f"their config.json says bias = {said}, their tensors have {found}; the tensors count"
    yield from disagreements(config, {"hidden_size": hidden, **({} if vocab is None else {"vocab_size": vocab})})
