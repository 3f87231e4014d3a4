"""Which token a row takes: its distribution, its noise, and the choice that both make.

The token at absolute position `i` of a request is `argmax_v (z_v + T * g(seed, i, v))`: Gumbel-max with counter-based noise, so
the distribution is softmax(z / T) and the token is a function of history, seed and position alone. Drafters choose with the same
noise.
This file knows logits, sampling and noise. It refuses to know trees' shapes, models and drafters.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from numbers import Real
from reprlib import repr as shortened
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from headstart.speculation.calibration import UNFITTED, Calibration
from headstart.speculation.noise import gumbel, noise_key, noise_keys, signed

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
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(0 <= self.temperature <= _LARGE, "temperature", self.temperature, f"0 (greedy) or positive, at most {_LARGE:g}")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1, or None for off")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1], or None for off")
        _require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1], or None for off")
        between = f"between -{_LARGE:g} and {_LARGE:g}"
        for name in ("presence_penalty", "frequency_penalty"):
            _require(abs(getattr(self, name)) <= _LARGE, name, getattr(self, name), f"{between}; 0 is off")
        is_moderate = 1 / _LARGE <= self.repetition_penalty <= _LARGE
        _require(is_moderate, "repetition_penalty", self.repetition_penalty, f"between {1 / _LARGE:g} and {_LARGE:g}; 1 is off")
        for token, bias in self.logit_bias.items():
            _require(abs(bias) <= _LARGE or bias == -math.inf, f"logit_bias of token {token}", bias, f"{between}, or -inf")
        _require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", self.seed, "a 64-bit integer, or None to draw one")
        _require(1 <= self.n <= MOST_ANSWERS, "n", self.n, f"between 1 and {MOST_ANSWERS}; ask again for more, with another seed")
        _require(all(self.stop), "stop", self.stop, "strings that are not empty")
        _require(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "None, or the number of alternatives")

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


def _require(is_met: bool, name: str, value: object, limit: str) -> None:
    if not is_met:
        raise ValueError(f"{name} is {value}; it must be {limit}")


# -- sampling -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SamplingTensors:
    """The sampling settings of several rows as tensors, made once when the set of rows changes.

    temperature, min_p, repetition, presence, frequency: [rows] float32; top_p: [rows] float64, for 0.3 must mean 0.3 where
    masses tie with it; top_k: [rows] int64, 0 for off; seeds: [rows]
    int64, and host_seeds the same on the host. biases: (row, token, value) triples as three tensors, or None. The flags say on the
    host what is used at all.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    seeds: Tensor
    host_seeds: tuple[int, ...]
    biases: tuple[Tensor, Tensor, Tensor] | None
    is_sampled: bool
    is_truncated: bool
    max_top_k: int
    has_penalties: bool
    _calibration_temperatures: dict[int, tuple[Calibration, Tensor]] = field(
        default_factory=dict, init=False
    )  # by depth, of the last calibration

    def calibration_temperature_of(self, calibration: Calibration, level: int) -> Tensor:
        """[rows] tau_d of children of depth `level`; worked out once, for temperatures do not change from round to round."""
        found = self._calibration_temperatures.get(level)
        if found is None or found[0] is not calibration:
            found = self._calibration_temperatures[level] = (
                calibration,
                calibration.calibration_temperature_at(self.temperature, level),
            )
        return found[1]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device | str = "cpu") -> SamplingTensors:
        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        sampled = [p for p in params if p.temperature > 0]
        biases = [(row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias.items()]
        return cls(
            temperature=column([p.temperature for p in params]),
            top_k=column([min(p.top_k or 0, 2**31) for p in params], torch.int64),
            top_p=column([1.0 if p.top_p is None else p.top_p for p in params], torch.float64),
            min_p=column([p.min_p or 0.0 for p in params]),
            repetition=column([p.repetition_penalty for p in params]),
            presence=column([p.presence_penalty for p in params]),
            frequency=column([p.frequency_penalty for p in params]),
            seeds=column([signed(seed) for seed in seeds], torch.int64),
            host_seeds=tuple(seeds),
            biases=_triples(biases, device) if biases else None,
            is_sampled=bool(sampled),
            is_truncated=any(p.top_k or (p.top_p or 1) < 1 or p.min_p for p in sampled),
            max_top_k=max((p.top_k or 0 for p in sampled), default=0),
            has_penalties=any(p.has_penalties for p in params),
        )

    def rows(self, rows: Tensor) -> SamplingTensors:
        """The sampling of `rows` ([n] indices), one line per logits line, for everything except the biases.

        A single row's distribution stays one line, for it broadcasts."""
        if len(self.temperature) == 1:
            return self
        names = ("temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency", "seeds")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def _triples(biases: Sequence[tuple[int, int, float]], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens, values = zip(*biases, strict=True)
    dtypes = (torch.int64, torch.int64, torch.float32)
    parts = zip((rows, tokens, values), dtypes, strict=True)
    first, second, third = (torch.tensor(part, dtype=dtype).to(device, non_blocking=True) for part, dtype in parts)
    return first, second, third


class Truncation:
    """Which tokens survive top-k, top-p and min-p, asked one candidate a line, without a sort.

    logits: [n, vocab] after penalties; sampling: one line per logits line, all sampled. A token is inside top-k if fewer than k
    logits are larger, inside top-p if the mass of the larger ones (within top-k) is below p, inside min-p if its chance is at
    least that share of the best. Ties go to the lower index. Sums are float64, so that no line depends on how many there are.
    """

    def __init__(self, logits: Tensor, sampling: SamplingTensors) -> None:
        self.sampling = sampling
        calibration_temperature = sampling.temperature[:, None].clamp(min=torch.finfo(torch.float32).tiny)
        self.scaled = (logits - logits.amax(-1, keepdim=True)).div_(calibration_temperature)  # [n, vocab], best at 0
        self.mass = self.scaled.exp()
        self.index = torch.arange(logits.shape[-1], device=logits.device)
        total = self.mass.sum(-1, dtype=torch.float64)
        if sampling.max_top_k:
            top = self.mass.topk(min(sampling.max_top_k, logits.shape[-1]), -1).values.cumsum(-1, dtype=torch.float64)
            last = (sampling.top_k.clamp(1, top.shape[-1])[:, None] - 1).expand(top.shape[0], 1)
            total = torch.where(sampling.top_k > 0, top.gather(-1, last).squeeze(-1), total)
        self.limit = torch.where(sampling.top_p < 1, sampling.top_p * total, torch.inf)  # [n], what may be larger than a member

    def admits(self, candidates: Tensor) -> Tensor:
        """candidates: [n] indices into vocab. Returns [n] bool."""
        own = self.scaled.gather(-1, candidates[:, None])
        larger = (self.scaled > own).logical_or_((self.scaled == own).logical_and_(self.index < candidates[:, None]))
        is_in = (self.mass * larger).sum(-1, dtype=torch.float64) < self.limit
        if self.sampling.max_top_k:
            is_in &= (self.sampling.top_k == 0) | (larger.sum(-1) < self.sampling.top_k)
        return is_in & (own.squeeze(-1).exp() >= self.sampling.min_p)

    def members(self) -> Tensor:
        """[n, vocab] bool: what `admits` says of every token, by the same arithmetic. Costs a sort."""
        scaled, order = self.scaled.sort(dim=-1, descending=True, stable=True)
        larger = torch.zeros_like(self.mass, dtype=torch.float64)
        larger[:, 1:] = self.mass.gather(-1, order).cumsum(-1, dtype=torch.float64)[:, :-1]
        is_in = larger < self.limit[:, None]
        if self.sampling.max_top_k:
            is_in &= (self.sampling.top_k == 0)[:, None] | (self.index < self.sampling.top_k[:, None])
        is_in &= scaled.exp() >= self.sampling.min_p[:, None]
        return torch.empty_like(is_in).scatter_(-1, order, is_in)


def warp(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """The distribution that is really sampled, by the book, with a sort: the oracle of `Truncation`, and what `rejection` needs.

    logits: [n, vocab] after penalties; sampling: one line per logits line. Returns [n, vocab] float64, lines sum to one; greedy
    lines are one-hot.
    """
    values, order = logits.double().sort(dim=-1, descending=True, stable=True)  # stable: ties by lower index
    greedy = sampling.temperature[:, None] == 0
    distribution = torch.exp(
        (values - values[:, :1]) / torch.where(greedy, 1, sampling.temperature[:, None])
    )  # the best has mass 1
    rank = torch.arange(distribution.shape[-1], device=distribution.device)
    distribution = distribution * ((sampling.top_k[:, None] == 0) | (rank < sampling.top_k[:, None]))
    mass = distribution.cumsum(-1)
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1)
    distribution = (
        distribution
        * ((before < sampling.top_p[:, None] * mass[:, -1:]) | (sampling.top_p[:, None] >= 1))
        * (distribution >= sampling.min_p[:, None])
    )
    distribution = torch.where(greedy, (rank == 0).double(), distribution)
    return torch.zeros_like(distribution).scatter_(-1, order, distribution / distribution.sum(-1, keepdim=True))


# -- history ----------------------------------------------------------------------------------------------------------------


class History:
    """What each seat has read and written, as counts per token: only while some request uses penalties.

    seen: [seats, vocab] bool, prompt and output; written: [seats, vocab] int32, output only. The root counts as written as
    soon as it is known.
    """

    def __init__(self, seats: int, vocab: int, device: torch.device | str) -> None:
        self.seen = torch.zeros(seats, vocab, dtype=torch.bool, device=device)
        self.written = torch.zeros(seats, vocab, dtype=torch.int32, device=device)

    def start(self, seat: int, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
        self.seen[seat] = False
        self.written[seat] = 0
        self.seen[seat, torch.tensor([*prompt], dtype=torch.int64).to(self.seen.device, non_blocking=True)] = True
        self.write(seat, output)

    def write(self, seat: int, tokens: Sequence[int]) -> None:
        if tokens:
            ids = torch.tensor([*tokens]).to(self.seen.device, non_blocking=True)
            self.seen[seat, ids] = True
            self.written[seat].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))


def penalise(logits: Tensor, sampling: SamplingTensors, seen: Tensor, written: Tensor) -> Tensor:
    """Repetition (Keskar et al. 2019, as in Hugging Face), then frequency and presence (OpenAI) penalties.

    logits, written: [n, vocab]; seen: [n, vocab] bool; sampling: one line per logits line.
    """
    factor = sampling.repetition[:, None]
    logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    return logits - sampling.frequency[:, None] * written - sampling.presence[:, None] * (written > 0)


# -- the rows of a round ----------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Children for several parents. tokens: [n, k] target ids, best first; chances: [n, k] float32, each given its parent;
    distribution: [n, vocab] from which the children were drawn, under the `rejection` rule, else None."""

    tokens: Tensor
    chances: Tensor
    distribution: Tensor | None


@dataclass(frozen=True, eq=False)
class Paths:
    """Where drafting parents stand. rows: [n] row of the round; tokens: [n, level] drafts from the root's child to the parent
    itself; places: [n] a number that differs between parents of one level, for noise that must not be shared."""

    rows: Tensor
    tokens: Tensor
    places: Tensor


@dataclass(eq=False)
class Rows:
    """The rows that draft in a round, and everything that depends on their sampling.

    seats, roots, root_positions: on the host, per row: its seat, the root's token and the root's position. depths: how deep each
    row may
    draft (0 = not). width: children per parent at most; beam: parents expanded per level and row; nodes: how
    many drafts can be verified in all.
    vocab: the target's logits width. noise_rule: "shared" for `coupled`, "fresh" for `rejection`, "none" for `typical`.
    """

    seats: tuple[int, ...]
    roots: tuple[int, ...]
    root_positions: tuple[int, ...]
    depths: tuple[int, ...]
    width: int
    beam: int
    nodes: int
    sampling: SamplingTensors
    vocab: int
    noise_rule: str = "shared"
    history: History | None = None
    parents: frozenset[tuple[int, ...]] = frozenset()  # paths of ranks to expand, where the plan is a fixed shape
    min_gain: float = 0.0  # kept tokens that the nodes of another level must promise together
    _noise: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seats)

    @property
    def max_depth(self) -> int:
        return max(self.depths, default=0)

    @cached_property
    def positions(self) -> Tensor:
        """[rows] int64: the roots' positions, on the device of the sampling."""
        return torch.tensor(self.root_positions).to(self.sampling.seeds.device, non_blocking=True)

    def noise(self, level: int) -> Tensor:
        """[rows, vocab] Gumbel noise of the position `level` after each root: evaluated once per round, shared by all."""
        if level not in self._noise:
            keys = [
                [noise_key(seed, place + level)] for seed, place in zip(self.sampling.host_seeds, self.root_positions, strict=True)
            ]
            device = self.sampling.seeds.device
            self._noise[level] = gumbel(torch.tensor(keys).to(device, non_blocking=True), torch.arange(self.vocab, device=device))
        return self._noise[level]

    def adjust(self, logits: Tensor, paths: Paths, ids: Tensor | None = None) -> Tensor:
        """Penalties and biases of each line's row and path. logits: [n, vocab] or [n, len(ids)]; float32 or wider."""
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self.sampling.has_penalties:
            assert self.history is not None
            seats = torch.tensor(self.seats).to(logits.device, non_blocking=True)[paths.rows]
            seen, written = self.history.seen[seats], self.history.written[seats]
            if paths.tokens.shape[1]:
                valid = (paths.tokens >= 0).to(torch.int32)
                written = written.scatter_add(1, paths.tokens.clamp(min=0), valid)
                seen = seen | (written > 0)
            if ids is not None:
                seen, written = seen[:, ids], written[:, ids]
            logits = penalise(logits, self.sampling.rows(paths.rows), seen, written)
        if self.sampling.biases is not None:
            logits = logits + self._bias.to(logits.dtype)[paths.rows][:, slice(None) if ids is None else ids]
        return logits

    @cached_property
    def _bias(self) -> Tensor:
        """[rows, vocab] what each row adds to its logits."""
        assert self.sampling.biases is not None
        rows, tokens, values = self.sampling.biases
        return torch.zeros(len(self), self.vocab, device=values.device).index_put_((rows, tokens), values)

    def choose(
        self,
        logits: Tensor,
        level: int,
        paths: Paths,
        k: int,
        ids: Tensor | None = None,
        calibration: Calibration = UNFITTED,
    ) -> Choice:
        """A drafter's logits turned into children, under each row's own distribution and the noise that the rule prescribes.

        logits: [n, vocab], or [n, draft_vocab] with `ids` [draft_vocab] naming the target token of each column; one line per
        entry of `paths`. level: depth of the children (a root's children: 1). k: children per parent. calibration: how the
        drafter's scores become chances.
        """
        logits = self.adjust(logits, paths, ids)
        sampling = self.sampling.rows(paths.rows)
        k = min(k, logits.shape[-1])
        if self.noise_rule == "fresh" and self.sampling.is_sampled:
            ranks = calibration.of_ranks(sampling.temperature, level, k)
            return self._draw(logits, level, paths, sampling, ranks, ids)
        scores = logits
        if self.sampling.is_sampled and self.noise_rule == "shared":
            noise = self.noise(level) if len(self) == 1 else self.noise(level)[paths.rows]  # a single row's broadcasts
            scores = torch.addcmul(logits, sampling.temperature[:, None], noise if ids is None else noise[:, ids])
        best = scores.topk(k, -1)
        calibration_temperature = self.sampling.calibration_temperature_of(calibration, level)
        calibration_temperature = (
            calibration_temperature if len(calibration_temperature) == 1 else calibration_temperature[paths.rows]
        )
        # One division for both: a chance above one by a rounding would put a child before its parent.
        chances = torch.exp(
            best.values / calibration_temperature[:, None]
            - torch.logsumexp(scores / calibration_temperature[:, None], -1, keepdim=True)
        )
        tokens = best.indices if ids is None else ids[best.indices]
        if self.sampling.is_truncated:
            truncation = Truncation(logits, sampling)
            admitted = torch.stack([truncation.admits(child) for child in best.indices.T], -1)
            chances = chances * (admitted | (sampling.temperature[:, None] == 0))
        return Choice(tokens, chances.float(), None)

    def _draw(
        self, logits: Tensor, level: int, paths: Paths, sampling: SamplingTensors, ranks: Tensor, ids: Tensor | None
    ) -> Choice:
        """Children drawn without replacement (Gumbel top-k, Kool et al. 2019) with noise used nowhere else.

        The noise is keyed by the round (the root's position), the level and the parent's place: a position that is drafted
        again in a later round must not meet the same noise. Chances are those of the ranks, for a draw may not be judged by
        what was drawn. ranks: [n, k] these chances, or one line for all.
        """
        distribution = warp(logits, sampling)
        round_keys = noise_keys(sampling.seeds, self.positions[paths.rows])
        keys = noise_keys(round_keys, level * 2**20 + paths.places + 2**40)
        scores = distribution.log() + gumbel(keys[:, None], torch.arange(distribution.shape[-1], device=distribution.device))
        drawn = scores.topk(ranks.shape[1], -1).indices
        wide = (
            distribution
            if ids is None
            else distribution.new_zeros(distribution.shape[0], self.vocab).index_copy_(1, ids, distribution)
        )
        return Choice(drawn if ids is None else ids[drawn], ranks.expand_as(drawn), wide)

    def decide(self, logits: Tensor, levels: Tensor, span: range, paths: Paths, tries: int = 2) -> tuple[Tensor, Tensor]:
        """The target's own token after each asked node, and whether it is certain.

        logits: [asked, vocab]; levels: [asked] the node's depth (root: 0), all within `span`; paths: rows and ancestors.
        Truncation is judged on the best few candidates only; where none of `tries` is inside, the second result
        ([asked] bool) is False and the caller asks again with `decide_fully`.
        """
        logits = self.adjust(logits, paths)
        if not self.sampling.is_sampled:
            return logits.argmax(-1), torch.ones_like(levels, dtype=torch.bool)
        sampling = self.sampling.rows(paths.rows)
        scores = self._scores(logits, levels, span, paths.rows, sampling)
        tokens = scores.argmax(-1)
        if not self.sampling.is_truncated:
            return tokens, torch.ones_like(levels, dtype=torch.bool)
        truncation = Truncation(logits, sampling)
        is_sure = truncation.admits(tokens) | (sampling.temperature == 0)
        for _ in range(tries - 1):
            if scores.device.type == "cpu" and bool(is_sure.all()):  # asking is free there
                break
            scores.scatter_(-1, tokens[:, None], torch.where(is_sure, torch.inf, -torch.inf)[:, None].to(scores.dtype))
            tokens = scores.argmax(-1)
            is_sure = is_sure | truncation.admits(tokens)
        return tokens, is_sure

    def decide_fully(self, logits: Tensor, levels: Tensor, span: range, paths: Paths) -> Tensor:
        """As `decide`, always certain: the whole truncated distribution is laid out. Costs a sort."""
        logits = self.adjust(logits, paths)
        sampling = self.sampling.rows(paths.rows)
        scores = self._scores(logits, levels, span, paths.rows, sampling)
        is_out = ~Truncation(logits, sampling).members() & (sampling.temperature > 0)[:, None]
        return scores.masked_fill(is_out, -torch.inf).argmax(-1)

    def _scores(self, logits: Tensor, levels: Tensor, span: range, rows: Tensor, sampling: SamplingTensors) -> Tensor:
        """z + T g of the position after each asked node: [asked, vocab]."""
        if len(span) == 1:
            noise = self.noise(span[0] + 1)[rows]
        else:
            noise = torch.stack([self.noise(level + 1) for level in span])[levels - span[0], rows]
        return torch.addcmul(logits, sampling.temperature[:, None], noise)
