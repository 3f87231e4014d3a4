"""The settings of one request: `SamplingParams` and the checks of every field. Imports no torch."""

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

MOST_ANSWERS = 2**14  # to one prompt: all are queued before the first begins, and each holds its tokens until the last has ended
_LARGE = 1e6  # no setting beyond this means anything, and float32 logits would lose their differences or overflow


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it stops; every field is honoured or refused, never ignored.

    temperature: 0 is greedy. top_k, top_p, min_p: truncation, None for off, applied in this order after the temperature.
    repetition_penalty: Hugging Face's, over prompt and output; presence_penalty, frequency_penalty: OpenAI's, over output.
    logit_bias: added to the logits of these token ids. seed: None draws one, which the answer reports.
    n: samples per prompt. stop: strings that end the text, cut before them. stop_token_ids: besides the model's own.
    ignore_eos: the model's own stop tokens do not stop. logprobs: None, or 0 and more alternatives per token.
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
        between = f"between -{_LARGE:g} and {_LARGE:g}"
        for name in ("presence_penalty", "frequency_penalty"):
            require(abs(getattr(self, name)) <= _LARGE, name, getattr(self, name), f"{between}; 0 is off")
        is_moderate = 1 / _LARGE <= self.repetition_penalty <= _LARGE
        require(is_moderate, "repetition_penalty", self.repetition_penalty, f"between {1 / _LARGE:g} and {_LARGE:g}; 1 is off")
        for token, bias in self.logit_bias.items():
            require(abs(bias) <= _LARGE or bias == -math.inf, f"logit_bias of token {token}", bias, f"{between}, or -inf")
        require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", self.seed, "a 64-bit integer, or None to draw one")
        require(1 <= self.n <= MOST_ANSWERS, "n", self.n, f"between 1 and {MOST_ANSWERS}; ask again for more, with another seed")
        require(all(self.stop), "stop", self.stop, "strings that are not empty")
        require(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "None, or the number of alternatives")

    def _check_types(self) -> None:
        """Bring every field to the type that it is declared with. Raises ValueError where that would change its value."""
        for name, read in _READERS.items():
            value = getattr(self, name)
            if type(value) is not _PLAIN[read] and not (value is None and name in _OPTIONAL):
                object.__setattr__(self, name, read(name, value))

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class SamplingSettings(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments, for editors and type checkers."""

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


# What other libraries call these settings.
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
    """`params` (None: the defaults) with some fields replaced. Raises ValueError for other params and a name that is no field."""
    if params is not None and not isinstance(params, SamplingParams):
        raise ValueError(f"params is {shortened(params)}; it must be SamplingParams, or left out for settings by name")
    known = [known.name for known in fields(SamplingParams)]
    for name in settings:
        if name not in known:
            similar = [SYNONYMS[name]] if name in SYNONYMS else get_close_matches(name, known, 1)
            hint = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(known)}"
            raise ValueError(f"{name} is no sampling setting; {hint}")
    return replace(params or SamplingParams(), **settings)


def _whole(name: str, value: object) -> int:
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
    return tuple(_whole(f"an item of {name}", item) for item in value)


def _biases(name: str, value: object) -> Mapping[int, float]:
    if not isinstance(value, Mapping):
        raise _wrong_type(name, value, "a dict of token ids and numbers")
    return {_whole(f"a token of {name}", token): _real(f"{name} of token {token}", bias) for token, bias in value.items()}


def _wrong_type(name: str, value: object, kind: str) -> ValueError:
    return ValueError(f"{name} is {shortened(value)}; it must be {kind}" + (", or None" if name in _OPTIONAL else ""))


# How each field is read, and the type that a reader leaves as it is (NoneType: it looks at every value).
_READERS = {
    **dict.fromkeys(("max_tokens", "top_k", "seed", "n", "logprobs"), _whole),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"), _real),
    "logit_bias": _biases,
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _flag,
}
_PLAIN = {_whole: int, _real: float, _flag: bool, _biases: None, _strings: None, _token_ids: None}
_OPTIONAL = frozenset(("top_k", "top_p", "min_p", "seed", "logprobs"))
