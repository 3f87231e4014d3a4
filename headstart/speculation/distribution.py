"""The distribution that a row samples from: its settings as tensors, truncation, penalties and the warped distribution.

Must not import trees, models or drafters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headstart.speculation.calibration import Calibration
from headstart.speculation.noise import signed
from headstart.speculation.params import SamplingParams


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
