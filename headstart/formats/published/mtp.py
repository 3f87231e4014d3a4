"""MTP modules that come with a model, under the names of those who publish them: DeepSeek-V3 and GLM, MiMo, Qwen and Mellum.

transformers leaves these tensors out when it loads a model, and when it saves one. Around its decoder layer, a module has four
tensors whose names tell the family. The layer is what the model's own configuration makes of it; see
`headstart.formats.published.layer_tensors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headstart.drafters.parts.decoder import block_of
from headstart.formats.published.base import Published, disagreements
from headstart.formats.published.layer_tensors import ShapesByName, filled, layouts
from headstart.formats.weights import Weights

if TYPE_CHECKING:
    from headstart.drafters.parts.heads import Heads
    from headstart.formats.target_info import TargetInfo

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # of the model around
COPIES = {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": HEAD}  # that some modules keep
COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")  # in a configuration
DEPTH = 3  # how deep modules draft: the last one is used again
_SCALES = re.compile(r".*(weight_scale|weight_scale_inv|input_scale|weight_scale_2|qweight|qzeros|weight_packed|absmax)$")
_TABLE = "self_attn.rotary_emb.inv_freq"  # of older checkpoints; made anew, never read
_LIKE = re.compile(r"(.*[._])?(mtp|nextn)[._0-9].*")
_ALIEN = ("chain_hidden_post_norm", "logits_mup_width_multiplier", "mtp_per_layer_config")  # of configurations, see `_unlike`


@dataclass(frozen=True)
class Naming:
    """Names of a family. stage: what a module's names begin with, `{}` being its number; layer: and behind that, those of its
    decoder layer. hidden_first: whether the projection reads [state, embedding]."""

    words: str
    stage: str
    enorm: str
    hnorm: str
    eh_proj: str
    norm: str
    layer: str = ""
    hidden_first: bool = False

    def numbers(self, weights: Weights, num_layers: int) -> list[int]:
        """Of the modules. Where they are counted as layers of the model, those behind its last."""
        if "{}" not in self.stage:
            around = {f"{self.stage}{part}.weight" for part in (self.enorm, self.hnorm, self.eh_proj)}
            return [0] if around & weights.shapes.keys() else []
        pattern = re.compile(re.escape(self.stage).replace(r"\{\}", r"(\d{1,4})"))
        found = {int(one[1]) for name in weights.shapes if (one := pattern.match(name))}
        return sorted(number for number in found if number >= self.first(num_layers))

    def first(self, num_layers: int) -> int:
        """The number of the first module."""
        return num_layers if self.stage.startswith("model.layers.") else 0


NAMINGS = (
    Naming("DeepSeek-V3 and GLM", "model.layers.{}.", "enorm", "hnorm", "eh_proj", "shared_head.norm"),
    Naming(
        "MiMo", "model.mtp_layers.{}.", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm", hidden_first=True
    ),
    Naming("Qwen and Mellum", "mtp.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm", layer="layers.0."),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Modules(Published):
    """MTP modules of a model, not read yet. `names` holds what stands around the layers; stages: what the names of each module
    begin with."""

    naming: Naming
    stages: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Numbers that a drafter of these modules has."""
        theirs = {*self.head_tensors} - self.unused.keys()
        return sum(torch.Size(self.weights.shapes[name]).numel() for name in theirs)

    def problems(self, target_config: Any = None) -> Iterator[str]:
        """What keeps them from being imported. Without `target_config`, nothing is said of the layers."""
        if self.refused or (quantized := next(filter(_SCALES.fullmatch, self.head_tensors), None)):
            yield self.refused or (
                f"{quantized} says that they are quantized, which they must not be here; convert the checkpoint to bfloat16, "
                f"as its makers describe"
            )
            return
        if unlike := None if target_config is None else _unlike(target_config):
            yield unlike
            return
        wanted = {**self._around(), **self.unused}
        layers = {} if target_config is None else self._layers(target_config)
        for theirs, shape in {**wanted, **layers}.items():
            yield from self._problem(theirs, shape)
        for theirs in sorted({*self.head_tensors} - wanted.keys() - layers.keys()) if layers else ():
            if not theirs.endswith(_TABLE):
                yield f"a tensor that has no place in a module of this model's kind: {theirs}"

    def _around(self) -> ShapesByName:
        """What stands around the layers."""
        shapes = {
            "enorm": (self.hidden,),
            "hnorm": (self.hidden,),
            "eh_proj": (self.hidden, 2 * self.hidden),
            "norm": (self.hidden,),
        }
        return {f"{stage}{getattr(self.naming, part)}.weight": shape for stage in self.stages for part, shape in shapes.items()}

    def _layers(self, target_config: Any) -> ShapesByName:
        """Tensors of the layers, each in the layout that it is stored in."""
        with torch.device("meta"):
            block = self._untrained(target_config).stages[0].block
        return {
            stage + self.naming.layer + name: shape
            for stage in self.stages
            for name, shape in self._layout(stage, layouts(block)).items()
        }

    def _layout(self, stage: str, known: tuple[ShapesByName, ShapesByName]) -> ShapesByName:
        return max(known, key=lambda shapes: sum(stage + self.naming.layer + name in self.weights.shapes for name in shapes))

    def _untrained(self, target_config: Any) -> Any:
        settings = {**self.settings, "block": _block(target_config)}
        return self.kind(self.kind.config_type.model_validate(settings), self.hidden, self.vocab or 1)

    def read(self, target_info: TargetInfo, target_config: Any) -> Heads:
        """The drafter, for that target. Raises ValueError where they do not fit the target, are not whole, or speak through
        another head than the model's own."""
        self.check(target_info, target_config)
        for copy in self.unused:
            self._compare(copy)
        with torch.device("meta"):
            drafter = self._untrained(target_config)
        drafter.vocab = target_info.vocab
        layers = self._layers(target_config)
        with torch.random.fork_rng(devices=[]):
            for stage, module in zip(self.stages, drafter.stages, strict=True):
                self._fill(stage, module, layers)
        assert not any(tensor.is_meta for tensor in drafter.state_dict().values()), "a tensor was forgotten"
        ready: Heads = drafter.eval()
        return ready

    def _fill(self, stage: str, module: Any, layers: ShapesByName) -> None:
        """Read one module. module: a `Stage` without memory."""
        naming, prefix = self.naming, stage + self.naming.layer
        around = {
            f"{part}.weight": self._floats(f"{stage}{getattr(naming, part)}.weight") for part in ("enorm", "hnorm", "eh_proj")
        }
        layer = {name.removeprefix(prefix): self._floats(name) for name in layers if name.startswith(prefix)}
        module.block = filled(module.block, layer, self._floats(f"{stage}{naming.norm}.weight"))
        module.load_state_dict(around, strict=False, assign=True)

    def _compare(self, copy: str) -> None:
        """Raise ValueError where a module's copy of the embedding or the head is none."""
        end = _end(self.weights, next(end for name, end in COPIES.items() if copy.endswith(name)))
        if not torch.equal(self.weights[copy], self.weights[end]):
            raise ValueError(
                f"the heads in {self.weights.files[0]} cannot be imported: {copy} is not the same as the model's own {end}, and "
                f"modules that speak through a head of their own are not known here"
            )


def match(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """The MTP modules in the files of a model; None where there are none, or no model."""
    text = config.get("text_config") or config
    num_layers = text.get("num_hidden_layers")
    if EMBEDDING not in weights.shapes or not isinstance(num_layers, int):
        return None
    for naming in NAMINGS:
        if numbers := naming.numbers(weights, num_layers):
            return _modules(naming, weights, text, numbers)
    strange = tuple(filter(_LIKE.fullmatch, weights.shapes))
    refused = f"their names are none that are known here, such as {strange[0]}" if strange else None
    return _modules(NAMINGS[0], weights, text, [], strange, refused) if strange else None


def declared_modules(config: Mapping[str, Any]) -> str | None:
    """Where a `config.json` says that a model has MTP modules: how it says so."""
    text = config.get("text_config") or config
    return next((f"{key} = {text[key]}" for key in COUNTS if isinstance(text.get(key), int) and text[key] > 0), None)


def _modules(
    naming: Naming,
    weights: Weights,
    config: Mapping[str, Any],
    numbers: list[int],
    ours: tuple[str, ...] = (),
    refused: str | None = None,
) -> Modules:
    count, stages = len(numbers), tuple(naming.stage.format(number) for number in numbers)
    ours = ours or tuple(name for name in weights.shapes if name.startswith(stages))
    copies = {name: weights.shapes[_end(weights, COPIES[own])] for name in ours for own in COPIES if name.endswith(own)}
    return Modules(
        weights=weights,
        method="mtp",
        layout="MTP modules inside a whole model" + (f", named as {naming.words} name them" if stages else ""),
        settings={"num_modules": count, "depth": max(DEPTH, count), "hidden_first": naming.hidden_first},
        hidden=weights.shapes[EMBEDDING][-1],
        vocab=None,
        names={},
        head_tensors=ours,
        unused=copies,
        has_trunk=True,
        notes=disagreements(config, dict.fromkeys(COUNTS, count)) if stages else (),
        refused=refused or _miscounted(naming, config, numbers, ours),
        naming=naming,
        stages=stages,
    )


def _miscounted(naming: Naming, config: Mapping[str, Any], numbers: list[int], ours: tuple[str, ...]) -> str | None:
    first = naming.first(config["num_hidden_layers"])
    if numbers != [*range(first, first + len(numbers))]:
        return f"they are numbered {', '.join(map(str, numbers))}, but the first should be {first} and none be left out"
    second = naming.stage + naming.layer.replace("0", "1")
    if naming.layer and any(name.startswith(second) for name in ours):
        return f"they have several layers behind one projection ({second}*), which is not known here"
    return None


def _end(weights: Weights, name: str) -> str:
    """An end of the model around; where its head is its embedding, only that is stored."""
    return name if name in weights.shapes else EMBEDDING


def _unlike(target_config: Any) -> str | None:
    """Why modules of a model of this configuration are none that a drafter here can be."""
    text = target_config.get_text_config()
    for name in _ALIEN:
        if getattr(text, name, None) is not None:
            return f"their model's configuration has {name}, which modules here do not"
    kinds = getattr(text, "mtp_layer_types", None) or ()
    if len({*kinds}) > 1:
        return f"they are of different kinds ({', '.join(kinds)}), but modules here are all of one"
    return None


def _block(target_config: Any) -> dict[str, Any]:
    """Settings of a module's decoder layer: what transformers says that it is, else one like the model's last."""
    text = target_config.get_text_config()
    return block_of(text.get_mtp_config() if getattr(text, "num_mtp_layers", None) else text)
