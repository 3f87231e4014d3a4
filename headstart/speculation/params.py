"""The settings of one request: `SamplingParams` and the checks of its fields. Must not import torch."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Real
from reprlib import repr as shortened
from typing import Any, TypedDict

from headstart.speculation.checks import require

MOST_ANSWERS = 2**14  # per prompt: all are queued before the first begins, and each keeps its tokens until the last has ended
_LARGE = 1e6  # with settings beyond this, float32 logits lose their differences or overflow


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it stops. No field is ignored: what cannot be done is refused.

    max_tokens: most tokens of an answer.
    temperature: 0 is greedy.
    top_k: sample among the k most probable tokens; None: all. Truncations apply in the order of these fields.
    top_p: sample among the most probable tokens that have this much probability together (nucleus); None: all.
    min_p: sample among tokens with at least this share of the best token's probability; None: all.
    repetition_penalty: divides or multiplies the logits of tokens of prompt and output, as in Hugging Face; 1 is off.
    presence_penalty: subtracted from the logits of tokens of the output, as at OpenAI; 0 is off.
    frequency_penalty: subtracted once per occurrence in the output, as at OpenAI; 0 is off.
    logit_bias: added to the logits of these token ids; -inf forbids a token.
    seed: 64-bit integer; None draws one, which the answer reports.
    n: answers per prompt.
    stop: strings that end the text; the text is cut before them.
    stop_token_ids: token ids that end the text, besides those of the model.
    ignore_eos: whether the model's own stop tokens do not end the text.
    logprobs: number of alternatives whose log-probabilities are reported per token, 0: of the token only; None: off.
    Raises ValueError for a value of the wrong type or out of bounds.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        require(0 <= self.temperature <= _LARGE, "temperature", self.temperature, f"0 (greedy) or positive, at most {_LARGE:g}")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1, or None for off")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1], or None for off")
        require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1], or None for off")
        bounds = f"between -{_LARGE:g} and {_LARGE:g}"
        for name in ("presence_penalty", "frequency_penalty"):
            require(abs(getattr(self, name)) <= _LARGE, name, getattr(self, name), f"{bounds}; 0 is off")
        is_moderate = 1 / _LARGE <= self.repetition_penalty <= _LARGE
        require(is_moderate, "repetition_penalty", self.repetition_penalty, f"between {1 / _LARGE:g} and {_LARGE:g}; 1 is off")
        for token, bias in self.logit_bias.items():
            require(abs(bias) <= _LARGE or bias == -math.inf, f"logit_bias of token {token}", bias, f"{bounds}, or -inf")
        require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", self.seed, "a 64-bit integer, or None to draw one")
        require(1 <= self.n <= MOST_ANSWERS, "n", self.n, f"between 1 and {MOST_ANSWERS}; for more, ask again with another seed")
        require(all(self.stop), "stop", self.stop, "strings that are not empty")
        require(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "None, or the number of alternatives")

    def _check_types(self) -> None:
        """Convert every field to its declared type. Raises ValueError where that would change its value."""
        for name, convert in _CONVERTERS.items():
            value = getattr(self, name)
            if type(value) is not _TYPES[convert] and not (value is None and name in _OPTIONAL):
                object.__setattr__(self, name, convert(name, value))

    @property
    def has_penalties(self) -> bool:
        """Whether a repetition, presence or frequency penalty is on."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class SamplingSettings(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments, for editors and type checkers. A test compares the two."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None


# Names of these settings in other libraries, for error messages.
SYNONYMS = {
    "best_of": "n",
    "do_sample": "temperature",
    "eos_token_id": "stop_token_ids",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "num_return_sequences": "n",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "temp": "temperature",
    "top_logprobs": "logprobs",
}


def read_settings(params: object, settings: Mapping[str, Any]) -> SamplingParams:
    """`params` with the fields named in `settings` replaced.

    params: None for the defaults.
    Raises ValueError for params of another type, and for a name that is not a field.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise ValueError(f"params is {shortened(params)}; it must be SamplingParams, or left out for settings by name")
    names = [known.name for known in fields(SamplingParams)]
    for name in settings:
        if name not in names:
            similar = [SYNONYMS[name]] if name in SYNONYMS else get_close_matches(name, names, 1)
            hint = f"did you mean {similar[0]}?" if similar else f"the settings are {', '.join(names)}"
            raise ValueError(f"{name} is no sampling setting; {hint}")
    return replace(params or SamplingParams(), **settings)


def _integer(name: str, value: object) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise _wrong_type(name, value, "a whole number")


def _real(name: str, value: object) -> float:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong_type(name, value, "a number")
    return float(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "True or False")
    return value


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(item, str) for item in items):
        raise _wrong_type(name, value, "a string or a list of strings")
    return items


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise _wrong_type(name, value, "a list of token ids")
    return tuple(_integer(f"an item of {name}", item) for item in value)


def _biases(name: str, value: object) -> Mapping[int, float]:
    if not isinstance(value, Mapping):
        raise _wrong_type(name, value, "a dict of token ids and numbers")
    return {_integer(f"a token of {name}", token): _real(f"{name} of token {token}", bias) for token, bias in value.items()}


def _wrong_type(name: str, value: object, kind: str) -> ValueError:
    return ValueError(f"{name} is {shortened(value)}; it must be {kind}" + (", or None" if name in _OPTIONAL else ""))


# The converter of each field, and the type that each converter leaves unchanged (None: it converts every value).
_CONVERTERS = {
    **dict.fromkeys(("max_tokens", "top_k", "seed", "n", "logprobs"), _integer),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"), _real),
    "logit_bias": _biases,
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _flag,
}
_TYPES = {_integer: int, _real: float, _flag: bool, _biases: None, _strings: None, _token_ids: None}
_OPTIONAL = frozenset(("top_k", "top_p", "min_p", "seed", "logprobs"))
