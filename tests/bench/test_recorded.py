"""Playing recorded rounds gives the rounds that an engine runs."""

import pytest
import torch
from tiny import random_model, tiny

from headstart.bench.played import play
from headstart.bench.recorded import record
from headstart.drafters.draft_model import ModelDrafter
from headstart.drafters.lookup import Lookup
from headstart.engine.engine import Engine
from headstart.speculation.adaptive import Adaptive
from headstart.speculation.cost import CostModel, DraftCost
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain, Plan, StaticTree
from headstart.speculation.shape import Limits
from headstart.target.target import Target

COST = CostModel((1, 8, 64), (1.0, 1.2, 4.0), draft=DraftCost(0.1, (1, 8), (0.1, 0.12)))
PROMPTS = [[5, 17, 3, 44, 90, 12], [8, 61, 7, 30]]
GROWN = Plan(4, 4, 16, 2**20)


def drafter_of(target):
    """A draft model that is right now and then: the target with other last layer norms."""
    model = random_model(target.model.config, torch.float64)
    model.load_state_dict(target.model.state_dict())
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.5, 1.5, len(model.model.norm.weight)))
    return ModelDrafter(Target(model))


@pytest.fixture(scope="module", params=[0.0, 0.8])
def recorded(request):
    target = tiny("llama")
    params = SamplingParams(max_tokens=40, temperature=request.param, seed=3, ignore_eos=True)
    return target, params, record(target, drafter_of(target), PROMPTS, params, GROWN)


@pytest.mark.parametrize(
    "planner", [Chain(1), Chain(4), Best(8, 4, 4, 4), Best(3, 3, 2, 1), Best(20, 4, 4, 2, min_gain=0.4), StaticTree.full(3, 2, 1)]
)
def test_playing_a_recording_gives_the_rounds_of_the_engine(recorded, planner):
    target, params, recordings = recorded
    played = play(recordings, planner, COST)
    engine = Engine(target, drafter_of(target), planner, max_rows=1)
    for index, prompt in enumerate(PROMPTS):
        engine.add(prompt, SamplingParams(max_tokens=40, temperature=params.temperature, seed=mix(3, index), ignore_eos=True))
        for _ in engine.run():
            pass
    prefills = len(PROMPTS)
    assert played.tokens == engine.stats.tokens - prefills
    assert played.rounds == engine.stats.rounds - prefills
    assert played.nodes == engine.stats.nodes - sum(map(len, PROMPTS))


def test_rows_are_played_together_and_the_adaptive_planner_beats_plain_decoding(recorded):
    _, _, recordings = recorded
    played = play(recordings * 3, Adaptive(COST, Limits(4, 4, 8, 32)), COST, num_rows=2)
    assert played.tokens > 60
    assert played.rate > 2 / COST.plain(2)


def test_a_drafter_that_proposes_nothing_can_be_recorded():
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    recordings = record(tiny("llama"), Lookup(), [[1, 2, 3]], params, Plan(4, 2, 1, 16))
    assert len(recordings[0].trees) == 5
    assert play(recordings, Best(), COST).tokens >= 4
