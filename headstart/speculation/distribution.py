"""The distribution from which a row samples: settings as tensors, truncation, penalties. Must not import models or drafters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from headstart.speculation.calibration import Calibration
from headstart.speculation.noise import NoiseOfTexts, signed
from headstart.speculation.params import SamplingParams


@dataclass(frozen=True, eq=False)
class SamplingTensors:
    """The sampling settings of several rows as tensors, made once when the set of rows changes.

    temperature: [rows] float32, 0 is greedy.
    top_k: [rows] int64, 0 is off.
    top_p: [rows] float64: 0.3 in float32 is more than 0.3, which decides where a mass equals it; infinity is off.
    min_p: [rows] float32, 0 is off.
    repetition: [rows] float32, repetition penalty.
    presence: [rows] float32, presence penalty.
    frequency: [rows] float32, frequency penalty.
    seeds: [rows] int64, the signed integers with the seeds' bits.
    host_seeds: the seeds, on the host.
    biases: [biases] row, token and value of each logit bias; None for no bias.
    is_sampled: whether some row is not greedy; on the host, as the next four.
    is_truncated: whether some row that is not greedy has top_k, top_p or min_p.
    max_top_k: the largest top_k of these rows, 0 for none.
    has_min_p: whether some of these rows has min_p.
    has_penalties: whether some row has penalties.
    noise: of the rows' seeds, kept from round to round.
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
    has_min_p: bool
    has_penalties: bool
    noise: NoiseOfTexts = field(default_factory=NoiseOfTexts)
    _by_level: dict[int, tuple[Calibration, Tensor]] = field(default_factory=dict, init=False)  # calibration temperatures

    @cached_property
    def is_greedy(self) -> Tensor:
        """[rows] bool, whether the temperature is 0."""
        return self.temperature == 0

    @cached_property
    def divisors(self) -> Tensor:
        """[rows, 1] float32, the temperature, above 0 for greedy rows too."""
        return self.temperature[:, None].clamp(min=torch.finfo(torch.float32).tiny)

    def calibration_temperature_of(self, calibration: Calibration, level: int) -> Tensor:
        """[rows] calibration temperature of children of depth `level`; kept, because it is the same in every round."""
        cached = self._by_level.get(level)
        if cached is None or cached[0] is not calibration:
            cached = calibration, calibration.calibration_temperature_at(self.temperature, level)
            self._by_level[level] = cached
        return cached[1]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device | str = "cpu") -> SamplingTensors:
        """The settings of rows with these params and seeds, one each per row."""

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        sampled = [p for p in params if p.temperature > 0]
        biases = [(row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias.items()]
        return cls(
            temperature=column([p.temperature for p in params]),
            top_k=column([min(p.top_k or 0, 2**31) for p in params], torch.int64),
            top_p=column([math.inf if p.top_p is None or p.top_p == 1 else p.top_p for p in params], torch.float64),
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
            has_min_p=any(p.min_p for p in sampled),
            has_penalties=any(p.has_penalties for p in params),
        )

    def rows(self, rows: Tensor) -> SamplingTensors:
        """The settings of `rows` ([n] indices), one line per logits line; biases stay those of all rows.

        Settings of a single row stay one line, which broadcasts.
        """
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
    """Whether tokens are inside top-k, top-p and min-p: for one token per line, without a sort.

    A token is inside top-k if fewer than k logits are larger, inside top-p if the larger ones within top-k have less than
    probability p together, and inside min-p if its probability is at least that share of the best. Of equal logits, the lower
    index counts as larger. Sums are float64, so that no line depends on the number of lines.
    logits: [n, vocab] after penalties.
    sampling: one line per logits line, none greedy.
    """

    def __init__(self, logits: Tensor, sampling: SamplingTensors) -> None:
        self.sampling = sampling
        self.scaled = (logits - logits.amax(-1, keepdim=True)).div_(sampling.divisors)  # [n, vocab], best at 0
        self.mass = self.scaled.exp()
        total = self.mass.sum(-1, dtype=torch.float64)
        if sampling.max_top_k:
            top = self.mass.topk(min(sampling.max_top_k, logits.shape[-1]), -1).values.cumsum(-1, dtype=torch.float64)
            last = (sampling.top_k.clamp(1, top.shape[-1])[:, None] - 1).expand(top.shape[0], 1)
            total = torch.where(sampling.top_k > 0, top.gather(-1, last).squeeze(-1), total)
        self.limit = sampling.top_p * total  # [n], bound of the mass of larger logits

    @cached_property
    def index(self) -> Tensor:
        """[vocab] int64, the index of each token."""
        return torch.arange(self.scaled.shape[-1], device=self.scaled.device)

    def admits(self, candidates: Tensor) -> Tensor:
        """Whether candidates are inside: bool of their shape. candidates: [n] or [n, k] indices into vocab."""
        lines = candidates.reshape(len(self.mass), -1)
        score = self.scaled.gather(-1, lines)
        is_sparse = lines.device.type == "cpu" and lines.shape[1] > 1  # for one candidate, picking logits takes longer
        before, count = self._larger_on_host(lines, score) if is_sparse else self._larger(lines, score)
        is_in = before < self.limit[:, None]
        if self.sampling.max_top_k:
            is_in &= (self.sampling.top_k == 0)[:, None] | (count < self.sampling.top_k[:, None])
        if self.sampling.has_min_p:
            is_in &= score.exp() >= self.sampling.min_p[:, None]
        return is_in.reshape(candidates.shape)

    def _larger(self, candidates: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """[n, k] mass, and number if there is a top-k, of the logits that are larger than each candidate's, which is `score`."""
        scaled, candidates, score = self.scaled[:, None], candidates[..., None], score[..., None]
        larger = (scaled > score).logical_or_((scaled == score).logical_and_(self.index < candidates))
        return (self.mass[:, None] * larger).sum(-1, dtype=torch.float64), larger.sum(-1)

    def _larger_on_host(self, candidates: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the logits that are not smaller than a line's last candidate only: on a host, few operations count.

        A line's masses are added in the order of the vocabulary, whatever the other candidates and lines.
        """
        vocab, chosen, lowest = self.mass.shape[1], candidates.numpy(), score.numpy()
        scaled = self.scaled.numpy()
        found = np.flatnonzero(~(scaled < lowest.min(-1, keepdims=True)))  # in no line nothing, nan or not
        lines = found // vocab
        values, ids, lowest = scaled.reshape(-1)[found, None], (found - lines * vocab)[:, None], lowest[lines]
        larger = (values > lowest) | ((values == lowest) & (ids < chosen[lines]))
        firsts = np.searchsorted(lines, np.arange(len(chosen)))
        mass = self.mass.numpy().reshape(-1)[found, None] * larger
        before = np.add.reduceat(mass, firsts, dtype=np.float64)
        count = np.add.reduceat(larger, firsts, dtype=np.int64) if self.sampling.max_top_k else before
        return torch.from_numpy(before), torch.from_numpy(count)

    def members(self) -> Tensor:
        """[n, vocab] bool: `admits` of every token, by the same arithmetic. Costs a sort."""
        scaled, order = self.scaled.sort(dim=-1, descending=True, stable=True)
        larger = torch.zeros_like(self.mass, dtype=torch.float64)
        larger[:, 1:] = self.mass.gather(-1, order).cumsum(-1, dtype=torch.float64)[:, :-1]
        is_in = larger < self.limit[:, None]
        if self.sampling.max_top_k:
            is_in &= (self.sampling.top_k == 0)[:, None] | (self.index < self.sampling.top_k[:, None])
        if self.sampling.has_min_p:
            is_in &= scaled.exp() >= self.sampling.min_p[:, None]
        return torch.empty_like(is_in).scatter_(-1, order, is_in)


def warp(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """The distribution that is sampled, after temperature and truncation. Costs a sort.

    `rejection` and `typical` use it; tests compare `Truncation` with it.
    logits: [n, vocab] after penalties.
    sampling: one line per logits line.
    Returns [n, vocab] float64; each line sums to one, greedy lines are one-hot.
    """
    values, order = logits.double().sort(dim=-1, descending=True, stable=True)  # stable: ties by lower index
    greedy = sampling.is_greedy[:, None]
    temperature = torch.where(greedy, 1, sampling.temperature[:, None])
    distribution = torch.exp((values - values[:, :1]) / temperature)  # the best has mass 1
    rank = torch.arange(distribution.shape[-1], device=distribution.device)
    distribution = distribution * ((sampling.top_k[:, None] == 0) | (rank < sampling.top_k[:, None]))
    mass = distribution.cumsum(-1)
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1)
    is_in_top_p = before < sampling.top_p[:, None] * mass[:, -1:]
    distribution = distribution * is_in_top_p * (distribution >= sampling.min_p[:, None])
    distribution = torch.where(greedy, (rank == 0).double(), distribution)
    return torch.zeros_like(distribution).scatter_(-1, order, distribution / distribution.sum(-1, keepdim=True))


class History:
    """The tokens of each seat's prompt and output, for penalties; kept only while some request has them.

    seen: [seats, vocab] bool, whether the token is in the prompt or the output.
    written: [seats, vocab] int32, how often the token is in the output. The root is in the output as soon as it is known.
    """

    def __init__(self, seats: int, vocab: int, device: torch.device | str) -> None:
        self.seen = torch.zeros(seats, vocab, dtype=torch.bool, device=device)
        self.written = torch.zeros(seats, vocab, dtype=torch.int32, device=device)

    def start(self, seat: int, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
        """Replace the tokens of a seat by those of a new request."""
        self.seen[seat] = False
        self.written[seat] = 0
        self.seen[seat, torch.tensor([*prompt], dtype=torch.int64).to(self.seen.device, non_blocking=True)] = True
        self.write(seat, output)

    def write(self, seat: int, tokens: Sequence[int]) -> None:
        """Add tokens to the output of a seat."""
        if tokens:
            ids = torch.tensor([*tokens]).to(self.seen.device, non_blocking=True)
            self.seen[seat, ids] = True
            self.written[seat].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))


def penalise(logits: Tensor, sampling: SamplingTensors, seen: Tensor, written: Tensor) -> Tensor:
    """[n, vocab] logits after repetition (Keskar et al. 2019, as in Hugging Face), frequency and presence penalties (OpenAI).

    logits: [n, vocab].
    sampling: one line per logits line.
    seen: [n, vocab] bool, as in `History`.
    written: [n, vocab] int, as in `History`.
    """
    factor = sampling.repetition[:, None]
    logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    return logits - sampling.frequency[:, None] * written - sampling.presence[:, None] * (written > 0)
