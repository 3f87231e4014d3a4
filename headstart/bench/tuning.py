"""What `headstart tune` does: calibrate heads, measure the cost of rounds, choose trees, and decode with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headstart.bench.achieved import Speed, measure_speeds, num_turns, split
from headstart.bench.calibrate import CalibrationResult, DecodeTrial, calibrate
from headstart.bench.expected import Expected, Observed
from headstart.bench.hardware import Hardware, forecast
from headstart.bench.model_shape import DraftShape, ModelShape
from headstart.drafters import Drafter
from headstart.drafters.parts.heads import Heads
from headstart.engine.cost_measure import measure_cost
from headstart.engine.drafter_loading import heads_in
from headstart.engine.machine import machine_key
from headstart.engine.planning import adaptive
from headstart.speculation.cost import CostModel
from headstart.speculation.heads_plan import MachineCost, load_plan, save_plan
from headstart.speculation.planner import Planner, StaticTree
from headstart.target.target import Target

SECONDS = 12.0  # that measuring the cost of rounds takes
PLAIN, TREE, AUTO = "plain", "tree", "auto"  # settings that decode held-out prompts


@dataclass(frozen=True)
class Choice:
    """What is chosen from one cost of rounds.

    cost: measured here, or the forecast of another machine.
    fastest: [temperature][number of rows] the fastest tree.
    chains: [temperature] the best length of a chain for 1, 2, ... rows.
    """

    cost: CostModel
    fastest: Mapping[float, Mapping[int, Expected]]
    chains: Mapping[float, tuple[int, ...]]

    @classmethod
    def of(cls, cost: CostModel, observed: Sequence[Observed], rows: Sequence[int]) -> Choice:
        """The choice for heads observed at some temperatures. rows: numbers of rows."""
        return cls(
            cost,
            {one.temperature: {number: one.fastest(cost, number) for number in rows} for one in observed},
            {one.temperature: one.chain_lengths(cost, max(rows)) for one in observed},
        )


@dataclass(frozen=True)
class Tuning:
    """All that was measured and chosen.

    method: of the heads.
    trial: the prompts that were measured with.
    results: of the calibration.
    measured: the machine and its cost.
    choice: for this machine.
    achieved: [number of rows][setting] speeds on held-out prompts, at `temperature`; empty where none were decoded.
    hardware, forecast: another machine, and the choice for it; None where none was asked for.
    """

    method: str
    trial: DecodeTrial
    results: Sequence[CalibrationResult]
    measured: MachineCost
    choice: Choice
    temperature: float
    achieved: Mapping[int, Mapping[str, Speed]]
    hardware: Hardware | None
    forecast: Choice | None


def num_steps(num_prompts: int, num_temperatures: int, rows: Sequence[int], is_decoded: bool) -> int:
    """How often `tune` calls `on_progress`. num_prompts: all of them."""
    measuring, held_out = split([()] * num_prompts) if is_decoded else ([()] * num_prompts, ())
    turns = sum(num_turns(len(held_out), number) for number in rows) if is_decoded else 0
    return len(measuring) * num_temperatures + turns


def tune(
    trial: DecodeTrial,
    folder: Path,
    temperatures: Sequence[float],
    rows: Sequence[int],
    is_decoded: bool = True,
    hardware: Hardware | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Tuning:
    """Measure heads and machine, and write `plan.json` beside the heads.

    trial: the prompts; some of them are held out where they are decoded.
    folder: of the heads.
    temperatures: ascending. rows: numbers of requests at once, ascending.
    is_decoded: whether held-out prompts are decoded, at the middle one of the temperatures.
    hardware: a machine to forecast for; None: no forecast.
    on_progress: called `num_steps` times.
    Raises ValueError for heads that do not fit the target, and for what `calibrate` and `forecast` refuse.
    """
    target, held_out = trial.target, trial
    if is_decoded:
        measuring, held_out_prompts = split(trial.prompts)
        trial, held_out = replace(trial, prompts=measuring), replace(trial, prompts=held_out_prompts, seed=trial.seed + 1)
    drafter = heads_in(folder, target)
    machine, shapes = machine_key(target, drafter), _shapes(target, drafter) if hardware else None
    if hardware and shapes:
        forecast(hardware, *shapes)  # refused before anything is measured
    before = load_plan(folder)
    plan, results = calibrate(trial, drafter, temperatures, on_progress=on_progress)
    drafter.calibration = plan.calibration
    measured = MachineCost(machine, measure_cost(target, drafter, SECONDS))
    plan = replace(plan, costs=before.costs if before else ()).with_cost(measured)
    save_plan(folder, plan)
    observed = [_observed(trial, result) for result in results]
    choice = Choice.of(measured.cost, observed, rows)
    temperature = temperatures[len(temperatures) // 2]
    achieved = _achieved(held_out, drafter, choice, temperature, on_progress) if is_decoded else {}
    other = Choice.of(forecast(hardware, *shapes), observed, rows) if hardware and shapes else None
    return Tuning(drafter.name, trial, results, measured, choice, temperature, achieved, hardware, other)


def _shapes(target: Target, drafter: Heads) -> tuple[ModelShape, DraftShape]:
    """What a forward and a level of drafting read and compute. drafter: not attached yet."""
    shape = ModelShape.of_target(target)
    return shape, DraftShape.of_heads(drafter.clone().bind(target.embed_head), shape.dtype)


def _observed(trial: DecodeTrial, result: CalibrationResult) -> Observed:
    prompts, answers = sum(map(len, trial.prompts)), sum(len(ranks) + 1 for ranks in result.texts)
    return Observed(result.temperature, result.table, result.texts, (prompts + answers / 2) / len(trial.prompts))


def _achieved(
    trial: DecodeTrial, drafter: Drafter, choice: Choice, temperature: float, on_progress: Callable[[], None]
) -> dict[int, dict[str, Speed]]:
    """The speeds of plain decoding, of the fastest tree where one pays, and of the planner that decides by itself."""
    achieved = {}
    for rows, fastest in choice.fastest[temperature].items():
        settings: dict[str, tuple[Drafter | None, Planner | None]] = {PLAIN: (None, None)}
        if fastest.paths:
            settings[TREE] = (drafter, StaticTree(fastest.paths))
        settings[AUTO] = (drafter, adaptive(trial.target, drafter, choice.cost))
        achieved[rows] = measure_speeds(trial, settings, temperature, rows, on_progress)
    return achieved
