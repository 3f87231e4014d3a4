"""Heads as others publish them: understood by their tensors' names, checked by their shapes, then read into a drafter of ours.

A format is a table of names, ours and theirs; one file per method makes it. Everything else, what is missing, extra or misshaped,
follows from the table. This file knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from headstart.drafters.registry import method
from headstart.formats.weights import TensorShape, Weights

if TYPE_CHECKING:
    from headstart.drafters.parts.heads import Heads
    from headstart.formats.target_info import TargetInfo
    from headstart.target.embed_head import EmbedHead

MAX = 64  # heads, and layers of a head; more can only be a mistake in a name
PREFIX = "prefix."  # tensors of a decoder layer whose sizes only the target's configuration tells


@dataclass(frozen=True, eq=False)
class Published:
    """Heads of others, not read yet.

    layout: what a person would call the format. settings: of the method's `config_type`, but for what the target must tell.
    hidden, vocab: their widths; vocab is None where they speak through the target's head. names: ours to theirs, whole; None
    stands for zeros. unused: theirs that are accepted and left out, with their shapes. has_trunk: a whole model is in the same
    files, and is the target. base: the target that they name. refused: why they cannot be imported at all.
    """

    weights: Weights
    method: str
    layout: str
    settings: Mapping[str, Any]
    hidden: int
    vocab: int | None
    names: Mapping[str, str | None]
    ours: tuple[str, ...]  # names in the files that belong to the heads, not to a trunk
    unused: Mapping[str, TensorShape] = field(default_factory=dict)
    has_prefix: bool = False
    has_trunk: bool = False
    base: str | None = None
    notes: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def parameters(self) -> int:
        """Numbers that a drafter of these heads has."""
        theirs = [name for name in self.names.values() if name in self.weights.shapes]
        return sum(torch.Size(self.weights.shapes[name]).numel() for name in theirs if name)

    def problems(self, target_config: Any = None) -> Iterator[str]:
        """What keeps them from being imported, one sentence each. target_config: of the target, where known."""
        if self.refused:
            yield self.refused
            return
        wanted = self._wanted(target_config)
        for name, theirs in self.names.items():
            shape = wanted.pop(name, None)
            is_known = target_config is not None or not name.startswith(PREFIX)
            yield from self._problem(theirs, shape if is_known else None)
        yield from (f"{name}, which their format does not know" for name in wanted)
        for theirs, shape in self.unused.items():
            yield from self._problem(theirs, shape)
        for theirs in sorted({*self.ours} - {*self.names.values()} - self.unused.keys()):
            yield f"a tensor that has no place in {self.layout}: {theirs}"

    def _problem(self, theirs: str | None, shape: TensorShape | None) -> Iterator[str]:
        if theirs is None:
            return
        if theirs not in self.weights.shapes:
            yield f"{theirs} is missing"
        elif shape is not None and self.weights.shapes[theirs] != shape:
            yield f"{theirs} has the shape {list(self.weights.shapes[theirs])} and should have {list(shape)}"

    def _wanted(self, target_config: Any) -> dict[str, TensorShape]:
        """Ours, by name, with the shapes that they must have."""
        with torch.device("meta"):
            drafter = self._empty(target_config)
        return {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}

    @property
    def kind(self) -> Any:
        """The class of their method's drafters."""
        return method(self.method)

    def _empty(self, target_config: Any) -> Heads:
        settings = dict(self.settings)
        if self.has_prefix and target_config is not None:
            settings["prefix"] = prefix_of(target_config, self)
        made: Heads = self.kind(self.kind.config_type.model_validate(settings), self.hidden, self.vocab or 1)
        return made

    def for_target(
        self, target_info: TargetInfo, embed_head: Callable[[], EmbedHead] | None = None, taps: Sequence[int] = ()
    ) -> Self:
        """The same, once their target is known, and what only that can settle is settled.

        embed_head: makes those of the target, asked only where they matter; None where it is not at hand. taps: layers of the
        target that
        a person says they read, by their outputs, from 0. Raises ValueError where that is not for a person to say.
        """
        if taps:
            raise ValueError(f"--taps names layers of the target, but {self.layout} read its last one; leave --taps out")
        return self

    def check(self, target_info: TargetInfo, target_config: Any) -> None:
        """Raise ValueError where they do not fit the target, or are not whole."""
        if not self.refused:
            self.check_sizes(target_info)
        for problem in self.problems(target_config):
            raise self.error(problem)

    def check_sizes(self, target_info: TargetInfo) -> None:
        """Raise ValueError where they are for a target of other sizes."""
        for what, theirs, its in (
            ("a hidden size", self.hidden, target_info.hidden),
            ("a vocabulary", self.vocab, target_info.vocab),
        ):
            if theirs is not None and theirs != its:
                where = self.weights.files[0]
                raise ValueError(f"the heads in {where} have {what} of {theirs}, but the target {target_info.name} has {its}")

    def error(self, problem: str) -> ValueError:
        """What is raised where a problem keeps them from being imported."""
        return ValueError(f"the heads in {self.weights.files[0]} cannot be imported: {problem}")

    def read(self, target_info: TargetInfo, target_config: Any) -> Heads:
        """The drafter, for that target. Raises ValueError where they do not fit the target, or are not whole."""
        self.check(target_info, target_config)
        with torch.device("meta"):
            shapes = self._empty(target_config).state_dict()
        with torch.random.fork_rng(devices=[]):
            drafter = self._empty(target_config)
        drafter.vocab = target_info.vocab
        drafter.load_state_dict({name: self._tensor(name, like) for name, like in shapes.items()}, assign=True)
        return drafter.eval()

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        theirs = self.names[name]
        return torch.zeros(like.shape) if theirs is None else self._plain(theirs)

    def _plain(self, theirs: str) -> Tensor:
        """One of their tensors. Raises ValueError where its numbers are not plain ones."""
        tensor = self.weights[theirs]
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            raise ValueError(f"{theirs} in {self.weights.files[0]} is of type {tensor.dtype}; quantized heads cannot be imported")
        return tensor


def prefix_of(target_config: Any, published: Published) -> dict[str, Any]:
    """Settings of the extra decoder layer, which is shaped after the target's own layers."""
    text = target_config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"the heads in {published.weights.files[0]} have a decoder layer shaped after the target's, whose positions are of "
            f"type {rope['rope_type']!r}; only plain rotary positions can be imported"
        )
    gate = published.names[f"{PREFIX}layers.0.mlp.gate_proj.weight"]
    return {
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "intermediate_size": published.weights.shapes.get(gate or "", (text.intermediate_size,))[0],
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "rms_norm_eps": float(getattr(text, "rms_norm_eps", 1e-5)),
    }


def height(weights: Weights, names: Sequence[str]) -> int:
    """Rows of the first of these matrices that is there. Raises ValueError where it is no matrix."""
    name = next(name for name in names if name in weights.shapes)
    shape = weights.shapes[name]
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} in {weights.files[0]} has the shape {list(shape)} and should be a matrix")
    return shape[0]


def base_of(config: Mapping[str, Any]) -> str | None:
    """The model that heads say they were made for."""
    said = config.get("base_model_name_or_path")
    return said if isinstance(said, str) and said else None


def check_counts(weights: Weights, num_heads: int, num_layers: int) -> None:
    """Raise ValueError where the names count further than any heads go."""
    if max(num_heads, num_layers) > MAX:
        raise ValueError(
            f"the tensors in {weights.files[0]} count {num_heads} heads of {num_layers} layers; {MAX} is the most of either"
        )


def disagreements(config: Mapping[str, Any], counted: Mapping[str, int]) -> tuple[str, ...]:
    """Where their `config.json` miscounts: the tensors are right. counted: by the keys of that file."""
    return tuple(
        f"their config.json says {key} = {config[key]}, their tensors {count}; the tensors count"
        for key, count in counted.items()
        if key in config and config[key] != count
    )
