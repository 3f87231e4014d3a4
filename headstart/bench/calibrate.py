"""Measuring a drafter on the target's own answers: how warm its chances should be, which ranks are right, which trees pay.

The target answers prompts with known seeds, while the features of whatever becomes certain are noted; then the drafter says, at
every position, what it would have proposed there. Nothing is estimated from what was drafted, so one pass serves every tree.
This file knows answers, ranks and scores. It refuses to know how a method computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from headstart.drafters import Drafter
from headstart.drafters.parts.losses import CHUNK, NONE, Batch, HeadOutput, columns
from headstart.engine.engine import Engine
from headstart.engine.scheduler import Request
from headstart.engine.stats import Stats
from headstart.speculation.calibration import (
    UNFITTED,
    Calibration,
    HeadsPlan,
    Tree,
    acceptance,
    expected_calibration_error,
    sparse_tree,
    walk,
)
from headstart.speculation.noise import gumbel, mix, noise_keys, signed
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Chain, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept
from headstart.target.cache import Seating
from headstart.target.embed_head import EmbedHead
from headstart.target.target import Target

WIDTH = 8  # ranks that are told apart, and up to which a parent counts as kept
SIZES = (8, 16, 32, 64)  # drafts of the static trees
COLDEST, WARMEST = 0.05, 20.0  # bounds of tau_d: a drafter that is always right would have it at 0
BEYOND = 2**31  # the rank of a token behind the end of an answer: no path has it
MOST_SCORES = 2**25  # that are held for a fit, per depth: 128 MiB

Ids = Sequence[int]


class TrainedDrafter(Drafter, Protocol):
    """A drafter that can also say, for a whole text at once, what it would propose at each position."""

    @property
    def depth(self) -> int: ...

    def states(self, batch: Batch) -> Iterator[HeadOutput]: ...

    def clone(self) -> Self: ...

    def eval(self) -> Self: ...

    def bind(self, embed_head: EmbedHead) -> Self: ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Self: ...


@dataclass(frozen=True)
class DecodeTrial:
    """Whose answers to what. prompts: token ids; the seed of prompt `i` is `mix(seed, i)`. stop_ids: end an answer."""

    target: Target
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int = 64
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def decode(
        self,
        drafter: Drafter,
        planner: Planner,
        temperature: float,
        on_answer: Callable[[int, Request], None] = lambda place, done: None,
    ) -> Stats:
        """Answer every prompt and count. on_answer: gets each prompt's place and its finished request."""
        longest = max(map(len, self.prompts)) + self.max_tokens + max(planner.headroom(1), self.target.min_nodes)
        memory = longest * (self.target.slot_bytes + drafter.slot_bytes)
        engine = Engine(self.target, drafter, planner, max_rows=1, memory=memory)
        for place, prompt in enumerate(self.prompts):
            params = SamplingParams(max_tokens=self.max_tokens, temperature=temperature, seed=mix(self.seed, place))
            request = engine.add(prompt, params, stop_ids=self.stop_ids)
            for _ in engine.run():
                pass
            on_answer(place, request)
        return engine.stats


class Recorder:
    """The drafter it is given, and a note of the features of every token that becomes certain, of one request at a time."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.name, self.slot_bytes, self.planner = drafter.name, drafter.slot_bytes, drafter.planner
        self.taps = drafter.taps if drafter.taps[-1:] == (-1,) else (*drafter.taps, -1)
        self._noted: list[Tensor] = []

    def batch(self, tokens: Ids, num_prompt: int) -> Batch:
        """The text whose tokens were just noted, as a lesson; its last token was never scored, its features are zero."""
        noted = torch.cat(self._noted)[: len(tokens) - 1]
        self._noted.clear()
        noted = torch.cat([noted, torch.zeros_like(noted[:1])])[None]
        text = torch.tensor([tokens], device=noted.device)
        width = noted.shape[-1] // len(self.taps)
        counts = torch.arange(len(tokens), device=noted.device)[None] >= num_prompt
        return Batch(text, counts, noted[..., : width * len(self._drafter.taps)], noted[..., -width:])

    def attach(self, target: Target, seating: Seating) -> None:
        self._drafter.attach(target, seating)

    def extend(self, kept: Kept) -> None:
        assert kept.features is not None, "a recorder taps the last layer"
        self._noted.append(kept.features)
        width = kept.features.shape[-1] // len(self.taps) * len(self._drafter.taps)
        self._drafter.extend(replace(kept, features=kept.features[:, :width]))

    def propose(self, rows: Rows) -> Drafts:
        return self._drafter.propose(rows)

    def fork(self, source: int, seat: int, length: int) -> None:
        raise AssertionError("a recorder follows one request at a time")

    def free(self, seat: int) -> None:
        self._drafter.free(seat)


# -- what the drafter would have said ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Observation:
    """One answer, seen by the drafter. ranks: [tokens - 1, depth] as `chances.walk` reads them, on the host. scores: per depth
    [n, vocab] z + T g, and decided: per depth [n] the token decided there, at positions whose parents were kept."""

    ranks: Tensor
    scores: tuple[Tensor, ...]
    decided: tuple[Tensor, ...]


@torch.inference_mode()
def observe(drafter: TrainedDrafter, batch: Batch, temperature: float, seed: int, most: int) -> Observation:
    """Ranks of the decided tokens of one text among what the drafter would propose, given the text before them.

    most: positions whose scores are kept, per depth. A guess at position j is ranked with the noise g(seed, j), as in a round.
    """
    first = int(batch.loss_mask[0].int().argmax()) - 1  # t of the first round: its root t + 1 is the first output token
    count = batch.tokens.shape[1] - 2 - first
    ranks, scores, decided = [], [], []
    kept = torch.ones(max(0, count), dtype=torch.bool, device=batch.tokens.device)
    for depth, guess in enumerate(drafter.states(batch), 1):
        size = max(0, count - depth + 1)  # roots that still have a token so far behind them
        at = first + torch.arange(size, device=batch.tokens.device)
        tokens = columns(batch.tokens[0, at + depth + 1], guess.output_head.ids)
        column, lines = _ranked(guess, at, tokens, depth, temperature, seed, kept[:size].nonzero().squeeze(-1)[:most])
        ranks.append(torch.nn.functional.pad(column, (0, len(kept) - size), value=BEYOND))
        scores.append(lines)
        decided.append(tokens[kept[:size]][:most])
        kept &= ranks[-1] < WIDTH
    return Observation(torch.stack(ranks, 1).cpu(), tuple(scores), tuple(decided))


def _ranked(
    guess: HeadOutput, at: Tensor, tokens: Tensor, depth: int, temperature: float, seed: int, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """[n] ranks of `tokens`, columns of its logits, at positions `at` of a text, and the scores of the `wanted` ones, [wanted,
    vocab]."""
    column, lines = torch.zeros_like(at), [torch.empty(0, device=at.device)]
    for start in range(0, len(at), CHUNK):
        chunk = slice(start, start + CHUNK)
        scores = _scores(guess, at[chunk], depth, temperature, seed)
        own = scores.gather(1, tokens[chunk, None].clamp(min=0))
        column[chunk] = torch.where(tokens[chunk] == NONE, BEYOND, (scores > own).sum(-1))
        lines.append(scores[wanted[(wanted >= start) & (wanted < start + CHUNK)] - start].float())
    return column, torch.cat(lines)


def _scores(guess: HeadOutput, at: Tensor, depth: int, temperature: float, seed: int) -> Tensor:
    """z + T g(seed, position) of what is guessed at positions `at` [n] of a text: [n, vocab]."""
    logits = guess.output_head(guess.states[0, at])
    if temperature == 0:
        return logits
    positions, ids = at + depth + 1, guess.output_head.ids
    keys = noise_keys(torch.full_like(positions, signed(seed)), positions)
    return logits + temperature * gumbel(keys[:, None], torch.arange(logits.shape[-1], device=at.device) if ids is None else ids)


# -- fitting ----------------------------------------------------------------------------------------------------------------


def fit_calibration_temperature(scores: Tensor, decided: Tensor, steps: int = 20) -> float:
    """The tau that makes softmax(scores / tau) give what was decided the largest likelihood, within bounds.

    scores: [n, vocab]; decided: [n] columns, `NONE` for tokens that the drafter cannot say, which on_progress nothing. The negative
    log-likelihood is convex in b = 1 / tau, with the slope E_b[s] - s_decided: a bracketed Newton search for where that is zero
    on average.
    """
    scores, decided = scores[decided != NONE], decided[decided != NONE]
    scores = scores - scores.amax(-1, keepdim=True)
    own = scores.gather(1, decided[:, None]).double().mean()
    low, high = 1 / WARMEST, 1 / COLDEST
    b = 1.0
    for _ in range(steps):
        distribution = torch.softmax(b * scores, -1)
        mean = (distribution * scores).sum(-1)
        slope = float(mean.double().mean() - own)
        bend = float(((distribution * scores.square()).sum(-1) - mean.square()).double().mean())
        low, high = (b, high) if slope < 0 else (low, b)
        step = b - slope / bend if bend > 0 else 0.0
        last, b = b, step if low < step < high else math.sqrt(low * high)
        if abs(b / last - 1) < 1e-4:
            break
    return 1 / b


def calibration_error(scores: Sequence[Tensor], decided: Sequence[Tensor], calibration_temperature: Sequence[float]) -> float:
    """Of the chances of the first `WIDTH` children of kept parents, all depths together."""
    chances, happened = [], []
    for lines, tokens, tau in zip(scores, decided, calibration_temperature, strict=True):
        if not len(tokens):
            continue
        best = lines.topk(min(WIDTH, lines.shape[-1]), -1)
        chances.append(torch.softmax(lines / tau, -1).gather(1, best.indices).flatten())
        happened.append((best.indices == tokens[:, None]).flatten())
    return expected_calibration_error(torch.cat(chances), torch.cat(happened))


@dataclass(frozen=True)
class CalibrationResult:
    """What was found at one temperature.

    positions: roots observed. table: [depth][rank] acceptance given that the parent was kept; calibration_temperature: [depth].
    errors: expected
    calibration error of the chances before and after fitting, on the same texts. chain, chain_measured: tau of a chain of the
    drafter's depth, replayed from the ranks and by decoding. trees: by size.
    """

    temperature: float
    positions: int
    table: tuple[tuple[float, ...], ...]
    calibration_temperature: tuple[float, ...]
    errors: tuple[float, float]
    chain: float
    chain_measured: float
    trees: dict[int, Tree]


def calibrate(
    trial: DecodeTrial,
    drafter: TrainedDrafter,
    temperatures: Sequence[float] = (0.0, 0.7, 1.0),
    sizes: Sequence[int] = SIZES,
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[HeadsPlan, list[CalibrationResult]]:
    """Measure a drafter that is not attached yet. on_progress: called after each answer.

    Raises ValueError where there is nothing to measure, and for temperatures or sizes that cannot be.
    """
    wanted = sorted({*map(float, temperatures)})
    if not wanted or not trial.prompts or trial.max_tokens < 3:
        raise ValueError("calibration needs a temperature, a prompt, and answers of at least 3 tokens; give it more")
    target = trial.target
    student = drafter.clone().eval().bind(target.embed_head).to(target.device, target.dtype)
    results = [_find(trial, drafter, student, temperature, sizes, on_progress) for temperature in wanted]
    calibration = Calibration(
        tuple(wanted), tuple(finding.calibration_temperature for finding in results), tuple(finding.table for finding in results)
    )
    return HeadsPlan(calibration, {finding.temperature: finding.trees for finding in results}), results


def _find(
    trial: DecodeTrial,
    drafter: TrainedDrafter,
    student: TrainedDrafter,
    temperature: float,
    sizes: Sequence[int],
    on_progress: Callable[[], None],
) -> CalibrationResult:
    recorder = Recorder(drafter)
    most = max(1, MOST_SCORES // trial.target.vocab // len(trial.prompts))
    seen: list[Observation] = []

    def on_answer(place: int, done: Request) -> None:
        batch = recorder.batch((*done.prompt, *done.output), len(done.prompt))
        seen.append(observe(student, batch, temperature, done.seed, most))
        on_progress()

    tau = trial.decode(recorder, Chain(drafter.depth), temperature, on_answer).tau
    ranks = [one.ranks for one in seen]
    scores = [torch.cat(lines) for lines in zip(*(one.scores for one in seen), strict=True)]
    decided = [torch.cat(tokens) for tokens in zip(*(one.decided for one in seen), strict=True)]
    table = acceptance(torch.cat(ranks), WIDTH)
    if not any(table[0]):
        raise ValueError(
            f"none of the drafter's first {WIDTH} guesses was ever right at temperature {temperature:g}; "
            "give more prompts, or train it first"
        )
    calibration_temperature = _fit_temperatures(scores, decided)
    trees = {size: _tree(table, size, ranks) for size in sizes}
    before = UNFITTED.calibration_temperature[0] * len(scores)
    errors = calibration_error(scores, decided, before), calibration_error(scores, decided, calibration_temperature)
    paths = [(0,) * depth for depth in range(1, drafter.depth + 1)]
    return CalibrationResult(
        temperature, sum(map(len, ranks)), table, calibration_temperature, errors, walk(ranks, paths), tau, trees
    )


def _fit_temperatures(scores: Sequence[Tensor], decided: Sequence[Tensor]) -> tuple[float, ...]:
    """Per depth; where nothing tells, for no parent was ever kept, that of the depth before."""
    fitted: list[float] = []
    for lines, tokens in zip(scores, decided, strict=True):
        fitted.append(fit_calibration_temperature(lines, tokens) if (tokens != NONE).any() else fitted[-1])
    return tuple(fitted)


def _tree(table: Sequence[Sequence[float]], size: int, ranks: Sequence[Tensor]) -> Tree:
    paths = sparse_tree(table, size)
    return Tree(paths, walk(ranks, paths))
