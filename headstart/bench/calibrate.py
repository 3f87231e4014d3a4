"""Calibrating a drafter on the target's own answers: chances that are true, ranks that are right, static trees that pay.

The target answers prompts with known seeds; then the drafter ranks every decided token. Nothing is estimated from what was drafted,
so one pass serves every tree. Must not import a method of drafting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headstart.bench.observation import WIDTH, Observation, Recorder, TrainedDrafter, observe
from headstart.drafters import Drafter
from headstart.drafters.parts.losses import NONE
from headstart.engine.engine import Engine
from headstart.engine.memory import request_bytes
from headstart.engine.scheduler import Request
from headstart.engine.stats import Stats
from headstart.speculation.calibration import UNFITTED, Calibration, acceptance, expected_calibration_error, sparse_tree, walk
from headstart.speculation.heads_plan import HeadsPlan, Tree
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Chain, Planner
from headstart.target.target import Target

SIZES = (8, 16, 32, 64)  # drafts of the static trees
LOWEST, HIGHEST = 0.05, 20.0  # bounds of a calibration temperature: a drafter that is always right would have it at 0
MAX_SCORES = 2**25  # numbers that are held for a fit, per depth: 128 MiB


@dataclass(frozen=True)
class DecodeTrial:
    """Prompts that a target answers.

    prompts: token ids; the seed of prompt `i` is `mix(seed, i)`.
    max_tokens: of each answer.
    stop_ids: tokens that end an answer.
    """

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
        on_answer: Callable[[int, Request], None] = lambda index, request: None,
    ) -> Stats:
        """Answer every prompt, and return the statistics. on_answer: gets the index of each prompt and its finished request."""
        memory = request_bytes(self.target, drafter, planner, max(map(len, self.prompts)) + self.max_tokens)
        engine = Engine(self.target, drafter, planner, max_rows=1, memory=memory)
        for index, prompt in enumerate(self.prompts):
            params = SamplingParams(max_tokens=self.max_tokens, temperature=temperature, seed=mix(self.seed, index))
            request = engine.add(prompt, params, stop_ids=self.stop_ids)
            for _ in engine.run():
                pass
            on_answer(index, request)
        return engine.stats


# -- fitting ----------------------------------------------------------------------------------------------------------------


def fit_calibration_temperature(scores: Tensor, decided: Tensor, steps: int = 20) -> float:
    """The calibration temperature tau that maximises the likelihood of the decided tokens under softmax(scores / tau), in bounds.

    scores: [n, vocab].
    decided: [n] columns; `NONE`, a token outside the draft vocabulary, counts for nothing.
    The negative log-likelihood is convex in b = 1 / tau, with the slope E_b[s] - s_decided: a bracketed Newton search for where
    that is zero on average.
    """
    scores, decided = scores[decided != NONE], decided[decided != NONE]
    scores = scores - scores.amax(-1, keepdim=True)
    decided_mean = scores.gather(1, decided[:, None]).double().mean()
    low, high = 1 / HIGHEST, 1 / LOWEST
    b = 1.0
    for _ in range(steps):
        distribution = torch.softmax(b * scores, -1)
        mean = (distribution * scores).sum(-1)
        slope = float(mean.double().mean() - decided_mean)
        curvature = float(((distribution * scores.square()).sum(-1) - mean.square()).double().mean())
        low, high = (b, high) if slope < 0 else (low, b)
        step = b - slope / curvature if curvature > 0 else 0.0
        last, b = b, step if low < step < high else math.sqrt(low * high)
        if abs(b / last - 1) < 1e-4:
            break
    return 1 / b


def calibration_error(scores: Sequence[Tensor], decided: Sequence[Tensor], calibration_temperature: Sequence[float]) -> float:
    """Expected calibration error of the chances of the first `WIDTH` children of kept parents, all depths together.

    scores: per depth [n, vocab]. decided: per depth [n] columns. calibration_temperature: per depth.
    """
    chances, happened = [], []
    for scores_at_depth, tokens, tau in zip(scores, decided, calibration_temperature, strict=True):
        if not len(tokens):
            continue
        best = scores_at_depth.topk(min(WIDTH, scores_at_depth.shape[-1]), -1)
        chances.append(torch.softmax(scores_at_depth / tau, -1).gather(1, best.indices).flatten())
        happened.append((best.indices == tokens[:, None]).flatten())
    return expected_calibration_error(torch.cat(chances), torch.cat(happened))


@dataclass(frozen=True)
class CalibrationResult:
    """What was measured at one temperature.

    temperature: of the answers.
    positions: roots that were observed.
    table: [depth][rank] acceptance rate, given that the parent was kept.
    calibration_temperature: [depth].
    errors: expected calibration error of the chances before and after fitting, on the same texts.
    chain: tau (acceptance length) of a chain of the drafter's depth, replayed from the ranks.
    chain_measured: the same by decoding.
    trees: the best static tree by its number of drafts.
    texts: ranks of every answer, as `walk` takes them.
    """

    temperature: float
    positions: int
    table: tuple[tuple[float, ...], ...]
    calibration_temperature: tuple[float, ...]
    errors: tuple[float, float]
    chain: float
    chain_measured: float
    trees: dict[int, Tree]
    texts: tuple[Tensor, ...] = field(default=(), repr=False)


def calibrate(
    trial: DecodeTrial,
    drafter: TrainedDrafter,
    temperatures: Sequence[float] = (0.0, 0.7, 1.0),
    sizes: Sequence[int] = SIZES,
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[HeadsPlan, list[CalibrationResult]]:
    """Measure a drafter that is not attached yet: the plan to save beside it, and the results by temperature.

    sizes: drafts of the static trees.
    on_progress: called after each answer.
    Raises ValueError where there is nothing to measure, and for temperatures or sizes that cannot be.
    """
    ascending = sorted({*map(float, temperatures)})
    if not ascending or not trial.prompts or trial.max_tokens < 3:
        raise ValueError("calibration needs a temperature, a prompt, and answers of at least 3 tokens; give it more")
    clone = clone_for(drafter, trial.target)
    results = [_measure(trial, drafter, clone, temperature, sizes, on_progress) for temperature in ascending]
    calibration = Calibration(
        tuple(ascending), tuple(result.calibration_temperature for result in results), tuple(result.table for result in results)
    )
    return HeadsPlan(calibration, {result.temperature: result.trees for result in results}), results


def observe_answers(
    trial: DecodeTrial, drafter: TrainedDrafter, clone: TrainedDrafter, temperature: float, on_progress: Callable[[], None]
) -> tuple[list[Observation], float]:
    """The ranks and scores of every answer's decided tokens, and tau by decoding with a chain of the drafter's depth.

    clone: the drafter again, not attached to an engine, on the target's device and in its dtype, to observe with.
    on_progress: called after each answer.
    """
    recorder = Recorder(drafter)
    max_scores = max(1, MAX_SCORES // trial.target.vocab // len(trial.prompts))
    observations: list[Observation] = []

    def on_answer(_: int, request: Request) -> None:
        batch = recorder.batch((*request.prompt, *request.output), len(request.prompt))
        observations.append(observe(clone, batch, temperature, request.seed, max_scores))
        on_progress()

    return observations, trial.decode(recorder, Chain(drafter.depth), temperature, on_answer).tau


def clone_for(drafter: TrainedDrafter, target: Target) -> TrainedDrafter:
    """The drafter again, on the target's device and in its dtype, bound to its embedding and LM head."""
    return drafter.clone().eval().bind(target.embed_head).to(target.device, target.dtype)


def _measure(
    trial: DecodeTrial,
    drafter: TrainedDrafter,
    clone: TrainedDrafter,
    temperature: float,
    sizes: Sequence[int],
    on_progress: Callable[[], None],
) -> CalibrationResult:
    """The result at one temperature. clone: as for `observe_answers`."""
    observations, tau = observe_answers(trial, drafter, clone, temperature, on_progress)
    ranks = [one.ranks for one in observations]
    scores = [torch.cat(parts) for parts in zip(*(one.scores for one in observations), strict=True)]
    decided = [torch.cat(parts) for parts in zip(*(one.decided for one in observations), strict=True)]
    table = acceptance(torch.cat(ranks), WIDTH)
    if not any(table[0]):
        raise ValueError(
            f"none of the drafter's first {WIDTH} candidates was ever accepted at temperature {temperature:g}; "
            "give more prompts, or train it first"
        )
    fitted = _fit_temperatures(scores, decided)
    unfitted = UNFITTED.calibration_temperature[0] * len(scores)
    chain = [(0,) * depth for depth in range(1, drafter.depth + 1)]
    return CalibrationResult(
        temperature=temperature,
        positions=sum(map(len, ranks)),
        table=table,
        calibration_temperature=fitted,
        errors=(calibration_error(scores, decided, unfitted), calibration_error(scores, decided, fitted)),
        chain=walk(ranks, chain),
        chain_measured=tau,
        trees={size: _tree(table, size, ranks) for size in sizes},
        texts=tuple(ranks),
    )


def _fit_temperatures(scores: Sequence[Tensor], decided: Sequence[Tensor]) -> tuple[float, ...]:
    """Calibration temperatures by depth; where no parent was ever kept, that of the depth before."""
    fitted: list[float] = []
    for scores_at_depth, tokens in zip(scores, decided, strict=True):
        fitted.append(fit_calibration_temperature(scores_at_depth, tokens) if (tokens != NONE).any() else fitted[-1])
    return tuple(fitted)


def _tree(table: Sequence[Sequence[float]], size: int, ranks: Sequence[Tensor]) -> Tree:
    paths = sparse_tree(table, size)
    return Tree(paths, walk(ranks, paths))
