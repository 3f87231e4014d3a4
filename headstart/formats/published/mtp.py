"""MTP modules in a model's files, under the names of those who publish them: DeepSeek-V3 and GLM, MiMo, Qwen and Mellum.

transformers leaves these tensors out when it loads or saves a model. Around its decoder layer, a module has four tensors, whose
names identify the family. The layer is built from the model's own configuration; see `headstart.formats.published.layer_tensors`.
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

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # names in the model that the modules come with
COPIES = {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": HEAD}  # copies that some modules store, and of what
COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")  # keys of a configuration
DEPTH = 3  # draft depth: the last module is used again where there are fewer
_SCALES = re.compile(r".*(weight_scale|weight_scale_inv|input_scale|weight_scale_2|qweight|qzeros|weight_packed|absmax)$")
_INV_FREQ = "self_attn.rotary_emb.inv_freq"  # rotary frequencies in older checkpoints; computed here, never read
_MODULE_LIKE = re.compile(r"(.*[._])?(mtp|nextn)[._0-9].*")
_UNSUPPORTED = ("chain_hidden_post_norm", "logits_mup_width_multiplier", "mtp_per_layer_config")  # keys of configurations


@dataclass(frozen=True)
class Naming:
    """The tensor names of one family of models.

    words: the family, for a person.
    stage: prefix of a module's names, with `{}` for its number.
    enorm, hnorm, eh_proj, norm: names behind the prefix: norms of the embedding and of the hidden state, projection, final norm.
    layer: prefix of the decoder layer's names behind `stage`.
    hidden_first: whether the projection reads [hidden state, embedding]; else [embedding, hidden state].
    """

    words: str
    stage: str
    enorm: str
    hnorm: str
    eh_proj: str
    norm: str
    layer: str = ""
    hidden_first: bool = False

    def numbers(self, weights: Weights, num_layers: int) -> list[int]:
        """Numbers of the modules, ascending. Where they are counted as layers of the model, those after its last layer.

        num_layers: of the model.
        """
        if "{}" not in self.stage:
            around = {f"{self.stage}{part}.weight" for part in (self.enorm, self.hnorm, self.eh_proj)}
            return [0] if around & weights.shapes.keys() else []
        pattern = re.compile(re.escape(self.stage).replace(r"\{\}", r"(\d{1,4})"))
        numbers = {int(prefix[1]) for name in weights.shapes if (prefix := pattern.match(name))}
        return sorted(number for number in numbers if number >= self.first(num_layers))

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
    """MTP modules of a model whose tensors are not read yet.

    naming: the family's names.
    stages: prefix of each module's names.
    """

    naming: Naming
    stages: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters of a drafter of these modules."""
        stored = {*self.head_tensors} - self.unused.keys()
        return sum(torch.Size(self.weights.shapes[name]).numel() for name in stored)

    def problems(self, target_config: Any = None) -> Iterator[str]:
        """What prevents importing them, one sentence each. target_config: the target's; None: the layers are not checked."""
        if self.refused or (quantized := next(filter(_SCALES.fullmatch, self.head_tensors), None)):
            yield self.refused or (
                f"{quantized} shows that they are quantized, which is not supported; convert the checkpoint to bfloat16, "
                f"as its makers describe"
            )
            return
        if unsupported := None if target_config is None else _unsupported(target_config):
            yield unsupported
            return
        expected = {**self._around(), **self.unused}
        layers = {} if target_config is None else self._layers(target_config)
        for stored, shape in {**expected, **layers}.items():
            yield from self._problem(stored, shape)
        for stored in sorted({*self.head_tensors} - expected.keys() - layers.keys()) if layers else ():
            if not stored.endswith(_INV_FREQ):
                yield f"a tensor that has no place in a module of this model's kind: {stored}"

    def _around(self) -> ShapesByName:
        """Expected shapes of the tensors around the layers, by the name in the files."""
        shapes = {
            "enorm": (self.hidden,),
            "hnorm": (self.hidden,),
            "eh_proj": (self.hidden, 2 * self.hidden),
            "norm": (self.hidden,),
        }
        return {f"{stage}{getattr(self.naming, part)}.weight": shape for stage in self.stages for part, shape in shapes.items()}

    def _layers(self, target_config: Any) -> ShapesByName:
        """Expected shapes of the layers' tensors, by the name in the files, in the layout in which each layer is stored."""
        with torch.device("meta"):
            block = self._untrained(target_config).stages[0].block
        return {
            stage + self.naming.layer + name: shape
            for stage in self.stages
            for name, shape in self._layout(stage, layouts(block)).items()
        }

    def _layout(self, stage: str, known: tuple[ShapesByName, ShapesByName]) -> ShapesByName:
        """The one of two layouts of which the files have more names."""
        return max(known, key=lambda shapes: sum(stage + self.naming.layer + name in self.weights.shapes for name in shapes))

    def _untrained(self, target_config: Any) -> Any:
        settings = {**self.settings, "block": layer_settings(target_config)}
        return self.kind(self.kind.config_type.model_validate(settings), self.hidden, self.vocab or 1)

    def read(self, target_info: TargetInfo, target_config: Any) -> Heads:
        """The drafter for this target, as `Published.read` returns it.

        Raises ValueError as that does, and where a module has an embedding or LM head that differs from the model's.
        """
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
        heads: Heads = drafter.eval()
        return heads

    def _fill(self, stage: str, module: Any, layers: ShapesByName) -> None:
        """Read one module. module: a `Stage` on the "meta" device."""
        naming, prefix = self.naming, stage + self.naming.layer
        around = {
            f"{part}.weight": self._floats(f"{stage}{getattr(naming, part)}.weight") for part in ("enorm", "hnorm", "eh_proj")
        }
        layer = {name.removeprefix(prefix): self._floats(name) for name in layers if name.startswith(prefix)}
        module.block = filled(module.block, layer, self._floats(f"{stage}{naming.norm}.weight"))
        module.load_state_dict(around, strict=False, assign=True)

    def _compare(self, copy: str) -> None:
        """Raise ValueError where a module's copy of the embedding or the LM head differs from the model's."""
        original = _original(self.weights, next(name for suffix, name in COPIES.items() if copy.endswith(suffix)))
        if not torch.equal(self.weights[copy], self.weights[original]):
            raise ValueError(
                f"the heads in {self.weights.files[0]} cannot be imported: {copy} is not the same as the model's own {original}, "
                f"and modules with an LM head of their own are not supported"
            )


def match(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """The MTP modules in a model's files; None where there are none, or no complete model."""
    text = config.get("text_config") or config
    num_layers = text.get("num_hidden_layers")
    if EMBEDDING not in weights.shapes or not isinstance(num_layers, int):
        return None
    for naming in NAMINGS:
        if numbers := naming.numbers(weights, num_layers):
            return _modules(naming, weights, text, numbers)
    unknown = tuple(filter(_MODULE_LIKE.fullmatch, weights.shapes))
    refused = f"their names are not known here, such as {unknown[0]}" if unknown else None
    return _modules(NAMINGS[0], weights, text, [], unknown, refused) if unknown else None


def declared_modules(config: Mapping[str, Any]) -> str | None:
    """The key and value with which a `config.json` declares MTP modules, as "num_mtp_modules = 1"; None where it does not."""
    text = config.get("text_config") or config
    return next((f"{key} = {text[key]}" for key in COUNTS if isinstance(text.get(key), int) and text[key] > 0), None)


def _modules(
    naming: Naming,
    weights: Weights,
    config: Mapping[str, Any],
    numbers: list[int],
    head_tensors: tuple[str, ...] = (),
    refused: str | None = None,
) -> Modules:
    """The modules of these numbers. head_tensors: names of their tensors, where the naming does not give them."""
    count, stages = len(numbers), tuple(naming.stage.format(number) for number in numbers)
    head_tensors = head_tensors or tuple(name for name in weights.shapes if name.startswith(stages))
    copies = {
        name: weights.shapes[_original(weights, original)]
        for name in head_tensors
        for suffix, original in COPIES.items()
        if name.endswith(suffix)
    }
    return Modules(
        weights=weights,
        method="mtp",
        layout="MTP modules inside a whole model" + (f", named as {naming.words} name them" if stages else ""),
        settings={"num_modules": count, "depth": max(DEPTH, count), "hidden_first": naming.hidden_first},
        hidden=weights.shapes[EMBEDDING][-1],
        vocab=None,
        names={},
        head_tensors=head_tensors,
        unused=copies,
        has_trunk=True,
        notes=disagreements(config, dict.fromkeys(COUNTS, count)) if stages else (),
        refused=refused or _misnumbered(naming, config, numbers, head_tensors),
        naming=naming,
        stages=stages,
    )


def _misnumbered(naming: Naming, config: Mapping[str, Any], numbers: list[int], head_tensors: tuple[str, ...]) -> str | None:
    """What is wrong with the numbers of modules or of their layers, or None."""
    first = naming.first(config["num_hidden_layers"])
    if numbers != [*range(first, first + len(numbers))]:
        return f"they are numbered {', '.join(map(str, numbers))}, but the first should be {first} and none be left out"
    second = naming.stage + naming.layer.replace("0", "1")
    if naming.layer and any(name.startswith(second) for name in head_tensors):
        return f"they have several layers after one projection ({second}*), which is not supported"
    return None


def _original(weights: Weights, name: str) -> str:
    """The name under which the model stores its embedding or LM head; tied ones are stored once, as the embedding."""
    return name if name in weights.shapes else EMBEDDING


def _unsupported(target_config: Any) -> str | None:
    """Why modules of a model of this configuration cannot be imported, or None."""
    text = target_config.get_text_config()
    for name in _UNSUPPORTED:
        if getattr(text, name, None) is not None:
            return f"their model's configuration has {name}, which is not supported"
    kinds = getattr(text, "mtp_layer_types", None) or ()
    if len({*kinds}) > 1:
        return f"they are of different kinds ({', '.join(kinds)}), but only modules of one kind are supported"
    return None


def layer_settings(target_config: Any) -> dict[str, Any]:
    """Settings of a module's decoder layer: as transformers describes it, else like the model's last layer."""
    text = target_config.get_text_config()
    return block_of(text.get_mtp_config() if getattr(text, "num_mtp_layers", None) else text)
