"""Published heads of EAGLE-3, as SafeAILab and SpecForge write them (`midlayer.*`), and speculators and others (`layers.0.*`).

Where files leave something open, this is how they are read. Positions are the heads' own, from base 10000 where none is said: their
authors train with that base whatever the target has. A missing `norm_before_residual` is False, as speculators has it; vLLM takes
True, and SGLang knows only False. For layers of the target see `headstart.formats.published.taps`. `d2t` holds offsets, the
number of a
token less its place among the drafter's; `t2d` must agree with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from headstart.formats.draft_vocab import first_difference, ids_from_offsets, offsets_error
from headstart.formats.published import layer_config as blocks
from headstart.formats.published.base import MAX, Published, base_of, disagreements
from headstart.formats.published.eagle import TABLE, EagleHead, Unprefixed, is_other, wanted
from headstart.formats.published.layer_config import section
from headstart.formats.published.taps import checked, taps_of, told
from headstart.formats.weights import TensorShape, Weights

if TYPE_CHECKING:
    from headstart.formats.target_info import TargetInfo
    from headstart.target.embed_head import EmbedHead

HEAD = "lm_head.weight"
OFFSETS, KEPT = "d2t", "t2d"
_OLD_NORMS = ("aux_norm_low.", "aux_norm_mid.", "aux_norm_high.")  # of the taps, in files older than `fc_norm`
_LEFT_OUT = (KEPT, "verifier_lm_head.weight", "verifier_norm.weight")  # what follows from others, and what only training needs
_LAYERS = re.compile(r"layers\.(\d{1,4})\..*")


@dataclass(frozen=True, eq=False, kw_only=True)
class Eagle3Head(EagleHead):
    """count: how many layers of the target they read. numbers: which, as their configuration counts; are_inputs: and whether that
    is known to mean inputs. is_fitted: whether `settings` says it in our terms. head: the target's own, where they speak by it."""

    count: int = 0
    numbers: tuple[int, ...] | None = None
    are_inputs: bool = False
    is_fitted: bool = False
    head: Tensor | None = None

    def problems(self, target_config: Any = None) -> Iterator[str]:
        found = [*super().problems(target_config)]
        yield from found
        if not found and (wrong := self._wrong_ids()):
            yield wrong

    def for_target(
        self, target_info: TargetInfo, embed_head: Callable[[], EmbedHead] | None = None, taps: Sequence[int] = ()
    ) -> Self:
        """Layers are counted as here, and what is the target's own is found there. Raises ValueError where it cannot be told which
        layers they read."""
        if self.refused or (self.is_fitted and not taps):
            return self
        self.check_sizes(target_info)
        try:
            named = self._taps(target_info.layers, taps)
        except ValueError as error:
            raise self.error(str(error)) from None
        found = replace(self, settings={**self.settings, "taps": named}, vocab=self.vocab or target_info.vocab, is_fitted=True)
        if self.names[HEAD] is None and embed_head is not None:
            lent = embed_head()
            found = replace(found, head=lent.lm_head_weight * lent.scale)
        return super(Eagle3Head, found).for_target(target_info, embed_head)

    def _taps(self, num_layers: int, named: Sequence[int]) -> tuple[int, ...]:
        if named:
            return checked(named, self.count, num_layers)
        return taps_of(self.numbers, self.count, num_layers, self.are_inputs)

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        if name == "ids":
            return self._ids().sort().values
        if name != HEAD:
            return super()._tensor(name, like)
        if self.names[HEAD] is None:
            if self.head is None:
                raise self.error(f"{HEAD} is missing, and the target's own is not at hand")
            return self.head
        rows = self._floats(str(self.names[HEAD]))
        return rows if self.offsets is None else rows[self._ids().argsort()]  # in the order of the target's tokens

    @property
    def offsets(self) -> str | None:
        """The name of their list of tokens."""
        return Unprefixed(self.weights).full.get(OFFSETS)

    def _ids(self) -> Tensor:
        """[draft vocab] of the target's tokens, in their order."""
        return ids_from_offsets(self.weights[str(self.offsets)])

    def _wrong_ids(self) -> str | None:
        if self.offsets is None:
            return None
        if error := offsets_error(self.offsets, self.weights[self.offsets], self.vocab):
            return error
        mask = (
            Unprefixed(self.weights).full.get(KEPT) if self.settings["draft_vocab"] is not None else None
        )  # unused with all tokens
        token = None if mask is None else first_difference(self._ids(), self.weights[mask])
        return None if token is None else f"{self.offsets} and {mask} do not agree on whether token {token} can be drafted"


def match(weights: Weights, config: Mapping[str, Any]) -> Published | None:
    """What these EAGLE-3 heads are; None where there are none."""
    unprefixed = Unprefixed(weights)
    if not _is_eagle3(unprefixed, config):
        return None
    found = Eagle3Head(
        weights=weights,
        method="eagle3",
        layout="EAGLE-3 heads" + (" as speculators stores them" if _is_of_speculators(config) else ""),
        settings={},
        hidden=0,
        vocab=None,
        names={},
        head_tensors=(),
        base=_base(config),
    )
    try:
        _require_known(unprefixed, config)
        return _File(unprefixed, config).fill(found)
    except ValueError as error:
        return replace(found, refused=str(error))


class _File:
    """Sizes and settings, from tensors first and then from the configuration."""

    def __init__(self, unprefixed: Unprefixed, config: Mapping[str, Any]) -> None:
        self.unprefixed, self.config = unprefixed, config
        self.inner = section(config, "transformer_layer_config") or config
        self.first = "midlayer." if unprefixed.inside("midlayer.") else "layers.0."
        self.width, columns = unprefixed.sized("fc.weight", 2)
        self.norms = [name for name in _fc_norms(unprefixed) if f"{name}weight" in unprefixed.full]
        norm = unprefixed.shapes.get(f"{self.norms[0]}weight") if self.norms else None
        self.hidden = _number(config, "target_hidden_size") or (norm[0] if norm else self.width)
        if columns % self.hidden:
            raise ValueError(f"fc.weight has {columns} columns, no multiple of the {self.hidden} of a target's states")
        self.count = columns // self.hidden

    def fill(self, found: Eagle3Head) -> Eagle3Head:
        """The heads, with everything that is known without their target. Raises ValueError for what cannot be imported."""
        vocab, weights = self._vocab(), found.weights
        settings = self._settings(vocab)
        names: dict[str, str | None] = dict(self.unprefixed.named(wanted("eagle3", settings, self.hidden, vocab), self._renames()))
        return replace(
            found,
            settings=settings,
            hidden=self.hidden,
            vocab=vocab,
            names=names if HEAD in self.unprefixed.full else {**names, HEAD: None},
            head_tensors=tuple(weights.shapes),
            unused=self._unused(vocab, settings),
            notes=tuple(self._doubts(vocab)),
            count=self.count,
            numbers=told(self.config),
            are_inputs=_is_of_speculators(self.config),
        )

    def _vocab(self) -> int | None:
        """Of the target, where anything tells it."""
        for name, dims in ((TABLE, 2), (KEPT, 1)):
            if name in self.unprefixed.full:
                return self.unprefixed.sized(name, dims)[0]
        said = _number(self.inner, "vocab_size") or _number(self.config, "vocab_size")
        return said or (None if OFFSETS in self.unprefixed.full else self._rows())

    def _rows(self) -> int | None:
        return self.unprefixed.sized(HEAD, 2)[0] if HEAD in self.unprefixed.full else None

    def _draft_vocab(self, vocab: int | None) -> int | None:
        """How many tokens they can say; None for all."""
        if OFFSETS in self.unprefixed.full:
            (count,) = self.unprefixed.sized(OFFSETS, 1)
            if self._rows() is None:
                raise ValueError(f"{HEAD} is missing, and only theirs can say the {count} tokens of {OFFSETS}")
            return None if count == vocab else count
        said, rows = _number(self.config, "draft_vocab_size"), self._rows()
        if rows is None and (said not in (None, vocab) or self.width != self.hidden):
            raise ValueError(
                f"{HEAD} is missing, and the target's own does not fit {said or vocab} tokens and a width of {self.width}"
            )
        if rows is not None and rows != vocab:
            raise ValueError(f"{HEAD} says {rows} tokens of a vocabulary of {vocab}, but no {OFFSETS} says which ones")
        return None

    def _settings(self, vocab: int | None) -> dict[str, Any]:
        if TABLE not in self.unprefixed.full and self.width != self.hidden:
            raise ValueError(f"{TABLE} is missing, and the target's own is {self.hidden} wide, but their layer {self.width}")
        layer = self.unprefixed.inside(self.first)
        settings = {
            "taps": tuple(range(self.count)),  # until the target is known
            "draft_vocab": self._draft_vocab(vocab),
            "embedding": "own" if TABLE in self.unprefixed.full else "shared",
            "block": blocks.block(self.inner, layer, self.width, self._num_layers()),
            "context": blocks.limit(self.inner),
            "fc_bias": "fc.bias" in self.unprefixed.full,
            "norm_before_fc": bool(self._said("norm_before_fc")) or "input_norm.weight" in self.unprefixed.full,
            "fc_norm": bool(self._said("fc_norm")) or bool(self.norms),
            "norm_output": bool(self._said("norm_output")),
            "norm_before_residual": bool(self._said("norm_before_residual")),
        }
        if settings["norm_before_fc"] and settings["fc_norm"]:
            raise ValueError("they have a norm for each layer they read and one for all, and nothing says which comes first")
        return settings

    def _num_layers(self) -> int:
        numbers = [int(found[1]) for name in self.unprefixed.full if (found := _LAYERS.fullmatch(name))]
        count = 1 + max([0, *numbers])
        if count > MAX:
            raise ValueError(f"their layers count to {count}; {MAX} is the most")
        return count

    def _said(self, key: str) -> bool | None:
        """A switch of the configuration; None where it says nothing."""
        places = (self.config, section(self.config, "eagle_config"), self.inner)
        said = next((place[key] for place in places if place.get(key) is not None), None)
        if said is not None and not isinstance(said, bool):
            raise ValueError(f"their config.json says {key} = {said!r}, which should be true or false")
        return said

    def _renames(self) -> list[tuple[str, str]]:
        norms = [(f"fc_norms.{place}.", name) for place, name in enumerate(_fc_norms(self.unprefixed))]
        return [("block.layers.0.", self.first), ("block.", ""), ("embedding.", "embed_tokens."), ("ids", OFFSETS), *norms]

    def _unused(self, vocab: int | None, settings: Mapping[str, Any]) -> dict[str, TensorShape]:
        found = {name: self.unprefixed.shapes[name] for name in _LEFT_OUT if name in self.unprefixed.full}
        if KEPT in found and vocab is not None:
            found[KEPT] = (vocab,)
        if OFFSETS in self.unprefixed.full and settings["draft_vocab"] is None:
            found[OFFSETS] = self.unprefixed.shapes[OFFSETS]
        return self.unprefixed.angles() | {self.unprefixed.full[name]: shape for name, shape in found.items()}

    def _doubts(self, vocab: int | None) -> Iterator[str]:
        yield from blocks.doubts(self.inner, self.unprefixed.inside(self.first))
        if _is_of_speculators(self.config) and self._said("norm_before_residual") is None:
            yield "their config.json says no norm_before_residual: false, as speculators has it, where vLLM takes true"
        for key, name in (("fc_norm", "fc_norm.0.weight"), ("norm_before_fc", "input_norm.weight"), ("bias", "fc.bias")):
            is_there = name in self.unprefixed.full
            if self._said(key) is False and is_there:
                yield f"their config.json says {key} = false, but there is {name}; the tensors count"
        counted = {"hidden_size": self.width, "vocab_size": vocab, "num_hidden_layers": self._num_layers()}
        yield from disagreements(self.inner, {key: count for key, count in counted.items() if count is not None})
        if (rows := self._rows()) is not None:
            yield from disagreements(self.config, {"draft_vocab_size": rows})


def _is_eagle3(unprefixed: Unprefixed, config: Mapping[str, Any]) -> bool:
    """By tensors that only such heads have, or by what their configuration calls them."""
    if is_other(unprefixed, config) or config.get("speculators_model_type") == "eagle":
        return False
    called = " ".join(map(str, (config.get("speculators_model_type"), *(config.get("architectures") or ()))))
    is_called = re.search(r"eagle3|peagle", called, re.IGNORECASE) is not None
    own = ("midlayer.", "layers.0.hidden_norm.", OFFSETS, "fc_norm.0.", "mask_hidden", *_OLD_NORMS)
    return is_called or any(name.startswith(own) for name in unprefixed.full)


def _is_of_speculators(config: Mapping[str, Any]) -> bool:
    return any(key in config for key in ("speculators_model_type", "speculators_config", "transformer_layer_config"))


def _base(config: Mapping[str, Any]) -> str | None:
    verifier = section(section(config, "speculators_config"), "verifier")
    return base_of({"base_model_name_or_path": verifier.get("name_or_path")}) or base_of(config)


def _require_known(unprefixed: Unprefixed, config: Mapping[str, Any]) -> None:
    """Raise ValueError, by name, for relatives that compute something else."""
    if "mask_hidden" in unprefixed.full or config.get("speculators_model_type") == "peagle" or config.get("parallel_drafting"):
        raise ValueError("they are P-EAGLE's, which guess all tokens at once from mask_hidden, and not one after another")
    if latent := next((name for name in unprefixed.full if re.search(r"self_attn\.(q_a|kv_a)_proj", name)), None):
        raise ValueError(f"{latent} belongs to latent attention, and only layers like a Llama's can be imported")
    if expert := next((name for name in unprefixed.full if ".mlp.experts." in name), None):
        raise ValueError(f"{expert} belongs to a mixture of experts, and only layers like a Llama's can be imported")
    if section(config, "eagle_config").get("use_aux_hidden_state") is False:
        raise ValueError("their config.json says use_aux_hidden_state = false: they read the last state only, without fc.weight")
    if "fc.weight" not in unprefixed.full:
        raise ValueError("fc.weight is missing, without which nothing leads from the target's states to their layer")


def _fc_norms(unprefixed: Unprefixed) -> Iterator[str]:
    """Beginnings of the norms of taps, in their order."""
    if any(name.startswith(_OLD_NORMS) for name in unprefixed.full):
        return iter(_OLD_NORMS)
    return (f"fc_norm.{place}." for place in range(MAX))


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else None
