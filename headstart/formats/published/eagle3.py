"""Published heads of EAGLE-3, as SafeAILab and SpecForge write them (`midlayer.*`), and speculators and others (`layers.0.*`).

How files are read where they leave something open: positions are the heads' own, with base 10000 where none is given, since their
authors train with that base whatever the target has. A missing `norm_before_residual` is False, as in speculators; vLLM takes True,
and SGLang knows only False. Tapped layers: see `headstart.formats.published.taps`. `d2t` holds offsets: the id of a token in the
target minus its index in the draft vocabulary; `t2d` must agree with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from headstart.formats.gguf_reader import ARCHITECTURE
from headstart.formats.published import layer_config
from headstart.formats.published.base import MAX, Published, base_of, disagreements
from headstart.formats.published.eagle import STORED_EMBEDDING, Unprefixed, is_other, tensor_names
from headstart.formats.published.eagle3_head import HEAD, KEPT, OFFSETS, Eagle3Head
from headstart.formats.published.layer_config import section
from headstart.formats.published.taps import layer_numbers
from headstart.formats.weights import TensorShape, Weights

_OLD_NORMS = ("aux_norm_low.", "aux_norm_mid.", "aux_norm_high.")  # norms of the taps, in files older than `fc_norm`
_LEFT_OUT = (KEPT, "verifier_lm_head.weight", "verifier_norm.weight")  # derived from other tensors, or used in training only
_LAYERS = re.compile(r"layers\.(\d{1,4})\..*")


def match(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """The EAGLE-3 heads that these weights are; None where they are none."""
    unprefixed = Unprefixed(weights)
    if not _is_eagle3(unprefixed, config):
        return None
    heads = Eagle3Head(
        weights=weights,
        method="eagle3",
        layout="EAGLE-3 heads" + _storage(config),
        settings={},
        hidden=0,
        vocab=None,
        names={},
        head_tensors=(),
        base=_base(config),
    )
    try:
        _require_known(unprefixed, config)
        return _SettingsReader(unprefixed, config).fill(heads)
    except ValueError as error:
        return replace(heads, refused=str(error))


class _SettingsReader:
    """Reads sizes and settings, from tensors first and then from the configuration.

    inner: the part of the configuration that describes the layers.
    first: prefix of the first layer's names.
    width: of the layers.
    norms: prefixes of the norms of taps, in order.
    hidden: width of the target's hidden states.
    count: number of the target's layers that they read.
    """

    def __init__(self, unprefixed: Unprefixed, config: Mapping[str, Any]) -> None:
        self.unprefixed, self.config = unprefixed, config
        self.inner = section(config, "transformer_layer_config") or config
        self.first = "midlayer." if unprefixed.inside("midlayer.") else "layers.0."
        self.width, columns = unprefixed.sized("fc.weight", 2)
        self.norms = [name for name in _fc_norms(unprefixed) if f"{name}weight" in unprefixed.full]
        norm = unprefixed.shapes.get(f"{self.norms[0]}weight") if self.norms else None
        self.hidden = _number(config, "target_hidden_size") or (norm[0] if norm else self.width)
        if columns % self.hidden:
            raise ValueError(f"fc.weight has {columns} columns, no multiple of the {self.hidden} of a target's hidden states")
        self.count = columns // self.hidden

    def fill(self, heads: Eagle3Head) -> Eagle3Head:
        """The heads with everything that is known without their target. Raises ValueError for what cannot be imported."""
        vocab, weights = self._vocab(), heads.weights
        settings = self._settings(vocab)
        names: dict[str, str | None] = dict(
            self.unprefixed.stored_names(tensor_names("eagle3", settings, self.hidden, vocab), self._renames())
        )
        return replace(
            heads,
            settings=settings,
            hidden=self.hidden,
            vocab=vocab,
            names=names if HEAD in self.unprefixed.full else {**names, HEAD: None},
            head_tensors=tuple(weights.shapes),
            unused=self._unused(vocab, settings),
            notes=tuple(self._doubts(vocab)),
            count=self.count,
            numbers=layer_numbers(self.config),
            convention="inputs" if _is_of_speculators(self.config) or ARCHITECTURE in self.config else None,
        )

    def _vocab(self) -> int | None:
        """Vocabulary size of the target; None where neither tensors nor configuration give it."""
        for name, dims in ((STORED_EMBEDDING, 2), (KEPT, 1)):
            if name in self.unprefixed.full:
                return self.unprefixed.sized(name, dims)[0]
        declared = _number(self.inner, "vocab_size") or _number(self.config, "vocab_size")
        return declared or (None if OFFSETS in self.unprefixed.full else self._rows())

    def _rows(self) -> int | None:
        """Rows of their LM head; None where they have none."""
        return self.unprefixed.sized(HEAD, 2)[0] if HEAD in self.unprefixed.full else None

    def _draft_vocab(self, vocab: int | None) -> int | None:
        """Size of the draft vocabulary; None for all tokens of the target."""
        if OFFSETS in self.unprefixed.full:
            (count,) = self.unprefixed.sized(OFFSETS, 1)
            if self._rows() is None:
                raise ValueError(f"{HEAD} is missing, and only their own can score the {count} tokens of {OFFSETS}")
            return None if count == vocab else count
        declared, rows = _number(self.config, "draft_vocab_size"), self._rows()
        if rows is None and (declared not in (None, vocab) or self.width != self.hidden):
            raise ValueError(
                f"{HEAD} is missing, and the target's own does not fit {declared or vocab} tokens and a width of {self.width}"
            )
        if rows is not None and rows != vocab:
            raise ValueError(f"{HEAD} scores {rows} tokens of a vocabulary of {vocab}, but no {OFFSETS} says which ones")
        return None

    def _settings(self, vocab: int | None) -> dict[str, Any]:
        if STORED_EMBEDDING not in self.unprefixed.full and self.width != self.hidden:
            raise ValueError(
                f"{STORED_EMBEDDING} is missing, and the target's own is {self.hidden} wide, but their layer {self.width}"
            )
        layer = self.unprefixed.inside(self.first)
        settings = {
            "taps": tuple(range(self.count)),  # until the target is known
            "draft_vocab": self._draft_vocab(vocab),
            "embedding": "own" if STORED_EMBEDDING in self.unprefixed.full else "shared",
            "block": layer_config.block(self.inner, layer, self.width, self._num_layers()),
            "context": layer_config.limit(self.inner),
            "fc_bias": "fc.bias" in self.unprefixed.full,
            "norm_before_fc": bool(self._flag("norm_before_fc")) or "input_norm.weight" in self.unprefixed.full,
            "fc_norm": bool(self._flag("fc_norm")) or bool(self.norms),
            "norm_output": bool(self._flag("norm_output")),
            "norm_before_residual": bool(self._flag("norm_before_residual")),
        }
        if settings["norm_before_fc"] and settings["fc_norm"]:
            raise ValueError("they have a norm for each layer they read and one for all, and nothing says which comes first")
        return settings

    def _num_layers(self) -> int:
        numbers = [int(layer[1]) for name in self.unprefixed.full if (layer := _LAYERS.fullmatch(name))]
        count = 1 + max([0, *numbers])
        if count > MAX:
            raise ValueError(f"their layers count to {count}; {MAX} is the most")
        return count

    def _flag(self, key: str) -> bool | None:
        """A boolean of the configuration; None where it gives none."""
        sections = (self.config, section(self.config, "eagle_config"), self.inner)
        value = next((each[key] for each in sections if each.get(key) is not None), None)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"their config.json says {key} = {value!r}, which should be true or false")
        return value

    def _renames(self) -> list[tuple[str, str]]:
        norms = [(f"fc_norms.{index}.", name) for index, name in enumerate(_fc_norms(self.unprefixed))]
        return [("block.layers.0.", self.first), ("block.", ""), ("embedding.", "embed_tokens."), ("ids", OFFSETS), *norms]

    def _unused(self, vocab: int | None, settings: Mapping[str, Any]) -> dict[str, TensorShape]:
        shapes = {name: self.unprefixed.shapes[name] for name in _LEFT_OUT if name in self.unprefixed.full}
        if KEPT in shapes and vocab is not None:
            shapes[KEPT] = (vocab,)
        if OFFSETS in self.unprefixed.full and settings["draft_vocab"] is None:
            shapes[OFFSETS] = self.unprefixed.shapes[OFFSETS]
        return self.unprefixed.rotary_tables() | {self.unprefixed.full[name]: shape for name, shape in shapes.items()}

    def _doubts(self, vocab: int | None) -> Iterator[str]:
        yield from layer_config.doubts(self.inner, self.unprefixed.inside(self.first))
        if _is_of_speculators(self.config) and self._flag("norm_before_residual") is None:
            yield "their config.json says no norm_before_residual: false, as speculators has it, where vLLM takes true"
        for key, name in (("fc_norm", "fc_norm.0.weight"), ("norm_before_fc", "input_norm.weight"), ("bias", "fc.bias")):
            if self._flag(key) is False and name in self.unprefixed.full:
                yield f"their config.json says {key} = false, but there is {name}; the tensors count"
        counted = {"hidden_size": self.width, "vocab_size": vocab, "num_hidden_layers": self._num_layers()}
        yield from disagreements(self.inner, {key: count for key, count in counted.items() if count is not None})
        if (rows := self._rows()) is not None:
            yield from disagreements(self.config, {"draft_vocab_size": rows})


def _is_eagle3(unprefixed: Unprefixed, config: Mapping[str, Any]) -> bool:
    """Whether there are tensors that only EAGLE-3 heads have, or the configuration calls them so."""
    if is_other(unprefixed, config) or config.get("speculators_model_type") == "eagle":
        return False
    called = " ".join(map(str, (config.get("speculators_model_type"), *(config.get("architectures") or ()))))
    is_called = re.search(r"eagle3|peagle", called, re.IGNORECASE) is not None
    prefixes = ("midlayer.", "layers.0.hidden_norm.", OFFSETS, "fc_norm.0.", "mask_hidden", *_OLD_NORMS)
    return is_called or any(name.startswith(prefixes) for name in unprefixed.full)


def _storage(config: Mapping[str, Any]) -> str:
    """Who stores heads like this, where it is not their authors' way."""
    if ARCHITECTURE in config:
        return " as llama.cpp stores them"
    return " as speculators stores them" if _is_of_speculators(config) else ""


def _is_of_speculators(config: Mapping[str, Any]) -> bool:
    return any(key in config for key in ("speculators_model_type", "speculators_config", "transformer_layer_config"))


def _base(config: Mapping[str, Any]) -> str | None:
    verifier = section(section(config, "speculators_config"), "verifier")
    return base_of({"base_model_name_or_path": verifier.get("name_or_path")}) or base_of(config)


def _require_known(unprefixed: Unprefixed, config: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the tensor or key, for related formats that compute something else."""
    if "mask_hidden" in unprefixed.full or config.get("speculators_model_type") == "peagle" or config.get("parallel_drafting"):
        raise ValueError("they are P-EAGLE's, which draft all tokens at once from mask_hidden, and not one after another")
    if latent := next((name for name in unprefixed.full if re.search(r"self_attn\.(q_a|kv_a)_proj", name)), None):
        raise ValueError(f"{latent} belongs to latent attention, and only layers like a Llama's can be imported")
    if expert := next((name for name in unprefixed.full if ".mlp.experts." in name), None):
        raise ValueError(f"{expert} belongs to a mixture of experts, and only layers like a Llama's can be imported")
    if section(config, "eagle_config").get("use_aux_hidden_state") is False:
        raise ValueError(
            "their config.json says use_aux_hidden_state = false: they read the last hidden state only, without fc.weight"
        )
    if "fc.weight" not in unprefixed.full:
        raise ValueError("fc.weight is missing, which projects the target's hidden states to their layer")


def _fc_norms(unprefixed: Unprefixed) -> Iterator[str]:
    """Prefixes of the names of the norms of taps, in order."""
    if any(name.startswith(_OLD_NORMS) for name in unprefixed.full):
        return iter(_OLD_NORMS)
    return (f"fc_norm.{index}." for index in range(MAX))


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else None
