"""Published heads of any format: checked by the names and shapes of their tensors, then read into a drafter.

A format is a table of tensor names, ours to theirs, which one module per method makes; what is missing, extra or of a wrong shape
follows from the table. Must not import a method.
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
PREFIX = "prefix."  # our names of Hydra++'s decoder layer, whose sizes only the target's configuration gives


@dataclass(frozen=True, eq=False)
class Published:
    """Published heads whose tensors are not read yet.

    weights: the tensors in their files.
    method: name of the method, as "medusa".
    layout: the format in words, for a person.
    settings: fields of the method's `config_type`, without those that only the target determines.
    hidden: width of the hidden states that they read.
    vocab: width of their logits; None: they use the target's LM head.
    names: maps our tensor names to theirs; None: filled with zeros.
    head_tensors: names in the files that belong to the heads, not to a model in the same files.
    unused: their tensors that are checked and left out, with the expected shapes.
    has_prefix: whether there is a decoder layer under `PREFIX`.
    has_trunk: whether a complete model is in the same files; it is their target.
    base: name of the target that their configuration gives, or None.
    notes: sentences for a person.
    refused: why they cannot be imported whatever the target is, or None.
    """

    weights: Weights
    method: str
    layout: str
    settings: Mapping[str, Any]
    hidden: int
    vocab: int | None
    names: Mapping[str, str | None]
    head_tensors: tuple[str, ...]
    unused: Mapping[str, TensorShape] = field(default_factory=dict)
    has_prefix: bool = False
    has_trunk: bool = False
    base: str | None = None
    notes: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters of a drafter of these heads."""
        stored = [name for name in self.names.values() if name in self.weights.shapes]
        return sum(torch.Size(self.weights.shapes[name]).numel() for name in stored if name)

    def problems(self, target_config: Any = None) -> Iterator[str]:
        """What prevents importing them, one sentence each.

        target_config: the target's configuration; None: what depends on it is not checked.
        """
        if self.refused:
            yield self.refused
            return
        expected = self._expected_shapes(target_config)
        for name, stored in self.names.items():
            shape = expected.pop(name, None)
            is_known = target_config is not None or not name.startswith(PREFIX)
            yield from self._problem(stored, shape if is_known else None)
        yield from (f"{name}, which their format does not know" for name in expected)
        for stored, shape in self.unused.items():
            yield from self._problem(stored, shape)
        for stored in sorted({*self.head_tensors} - {*self.names.values()} - self.unused.keys()):
            yield f"a tensor that has no place in {self.layout}: {stored}"

    def _problem(self, stored: str | None, shape: TensorShape | None) -> Iterator[str]:
        """A tensor that is missing or of another shape. stored: its name in the files; shape: expected, None where unknown."""
        if stored is None:
            return
        if stored not in self.weights.shapes:
            yield f"{stored} is missing"
        elif shape is not None and self.weights.shapes[stored] != shape:
            yield f"{stored} has the shape {list(self.weights.shapes[stored])} and should have {list(shape)}"

    def _expected_shapes(self, target_config: Any) -> dict[str, TensorShape]:
        """Shapes of the drafter's tensors, by our names."""
        with torch.device("meta"):
            drafter = self._untrained(target_config)
        return {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}

    @property
    def kind(self) -> Any:
        """The drafter class of their method."""
        return method(self.method)

    def _untrained(self, target_config: Any) -> Heads:
        """A drafter of these settings with untrained weights."""
        settings = dict(self.settings)
        if self.has_prefix and target_config is not None:
            settings["prefix"] = prefix_of(target_config, self)
        drafter: Heads = self.kind(self.kind.config_type.model_validate(settings), self.hidden, self.vocab or 1)
        return drafter

    def for_target(
        self, target_info: TargetInfo, embed_head: Callable[[], EmbedHead] | None = None, taps: Sequence[int] = ()
    ) -> Self:
        """These heads with the settings that only their target determines.

        embed_head: makes the target's embedding and LM head, called only where they matter; None: not available.
        taps: layers of the target that the heads read, as a person names them: outputs, counted from 0.
        Raises ValueError where a person may not name the taps.
        """
        if taps:
            raise ValueError(f"--taps names layers of the target, but {self.layout} read its last one; leave --taps out")
        return self

    def check(self, target_info: TargetInfo, target_config: Any) -> None:
        """Raise ValueError where they do not fit the target, or tensors are missing, extra or of a wrong shape."""
        if not self.refused:
            self.check_sizes(target_info)
        for problem in self.problems(target_config):
            raise self.error(problem)

    def check_sizes(self, target_info: TargetInfo) -> None:
        """Raise ValueError where the target has another hidden size or vocabulary."""
        for what, expected, actual in (
            ("a hidden size", self.hidden, target_info.hidden),
            ("a vocabulary", self.vocab, target_info.vocab),
        ):
            if expected is not None and expected != actual:
                where = self.weights.files[0]
                raise ValueError(f"the heads in {where} have {what} of {expected}, but the target {target_info.name} has {actual}")

    def error(self, problem: str) -> ValueError:
        """The exception for a problem that prevents importing them."""
        return ValueError(f"the heads in {self.weights.files[0]} cannot be imported: {problem}")

    def read(self, target_info: TargetInfo, target_config: Any) -> Heads:
        """The drafter for this target, in evaluation mode, in the dtype of the files, on the CPU.

        Raises ValueError as `check` does, and for quantized tensors.
        """
        self.check(target_info, target_config)
        with torch.device("meta"):
            shapes = self._untrained(target_config).state_dict()
        with torch.random.fork_rng(devices=[]):
            drafter = self._untrained(target_config)
        drafter.vocab = target_info.vocab
        drafter.load_state_dict({name: self._tensor(name, like) for name, like in shapes.items()}, assign=True)
        return drafter.eval()

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        """The tensor of one of our names. like: of its shape."""
        stored = self.names[name]
        return torch.zeros(like.shape) if stored is None else self._floats(stored)

    def _floats(self, stored: str) -> Tensor:
        """One of their tensors. Raises ValueError for integers and 8-bit floats, as quantized heads have."""
        tensor = self.weights[stored]
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            raise ValueError(f"{stored} in {self.weights.files[0]} is of type {tensor.dtype}; quantized heads cannot be imported")
        return tensor


def prefix_of(target_config: Any, published: Published) -> dict[str, Any]:
    """Settings of Hydra++'s decoder layer, which has the form of the target's own layers.

    Raises ValueError for a target with another kind of rotary positions than the default one.
    """
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


def num_rows(weights: Weights, names: Sequence[str]) -> int:
    """Rows of the first of these matrices that the files have. Raises ValueError where it is no matrix."""
    name = next(name for name in names if name in weights.shapes)
    shape = weights.shapes[name]
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} in {weights.files[0]} has the shape {list(shape)} and should be a matrix")
    return shape[0]


def base_of(config: Mapping[str, Any]) -> str | None:
    """The name of the model that heads were made for, from their `config.json`; None where it has none."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def check_counts(weights: Weights, num_heads: int, num_layers: int) -> None:
    """Raise ValueError where there are more than `MAX` heads or layers, counted by the tensors' names."""
    if max(num_heads, num_layers) > MAX:
        raise ValueError(
            f"the tensors in {weights.files[0]} count {num_heads} heads of {num_layers} layers; {MAX} is the most of either"
        )


def disagreements(config: Mapping[str, Any], counted: Mapping[str, int]) -> tuple[str, ...]:
    """Sentences where a `config.json` gives another number than the tensors, which are right.

    counted: the tensors' numbers, by the keys of that file.
    """
    return tuple(
        f"their config.json says {key} = {config[key]}, their tensors {count}; the tensors count"
        for key, count in counted.items()
        if key in config and config[key] != count
    )
