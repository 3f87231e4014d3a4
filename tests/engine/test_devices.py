"""On a GPU no operation mixes tensors of host and device, and the host waits as rarely as it can (see tests/fake_device.py)."""

import copy
from collections import Counter

import pytest
import torch
from fake_device import fake_device, send
from heads import KINDS, heads_for
from recorded_graph import RecordedGraph
from scripted import asks
from tiny import ARCHITECTURES, VOCAB, cut, random_model
from torch import nn
from transformers import GenerationConfig

from headstart.drafters.draft_model import ModelDrafter
from headstart.drafters.lookup import Lookup
from headstart.engine.engine import Engine
from headstart.engine.generate_hook import custom_generate
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain, StaticTree
from headstart.target.graphs import FlatRunner
from headstart.target.target import Target

MODEL = random_model(ARCHITECTURES["llama"](), torch.float64)
DISTRIBUTIONS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.7),
    "all": SamplingParams(
        temperature=1.0, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1, logit_bias={3: 1.0}, logprobs=2
    ),
}
DRAFTERS = {
    "none": lambda draft, heads: (None, None),
    "lookup": lambda draft, heads: (Lookup(floor=0.01, min_gain=0.01), Best(nodes=8, depth=3)),
    "chain": lambda draft, heads: (ModelDrafter(draft), Chain(3)),
    "best": lambda draft, heads: (ModelDrafter(draft), Best(nodes=5, depth=3, width=2, beam=2)),
    "shape": lambda draft, heads: (ModelDrafter(draft), StaticTree.full(2, 1)),
    "medusa": lambda draft, heads: (heads, Best(nodes=5, depth=3, width=2, beam=2)),
    "hydra++": lambda draft, heads: (heads, Best(nodes=5, depth=3, width=2, beam=2)),
    "eagle3.1, 40 tokens": lambda draft, heads: (heads, Best(nodes=5, depth=3, width=2, beam=2, min_gain=0.1)),
    "flat": lambda draft, heads: (ModelDrafter(draft), StaticTree.full(2)),
}
DRAFTERS |= {name: lambda draft, heads: (heads, Best(nodes=5, depth=3, width=2, beam=2)) for name in KINDS if name not in DRAFTERS}
CASES = [
    ("all", "coupled", 3, "best"),
    ("all", "coupled", 1, "chain"),
    ("all", "coupled", 3, "lookup"),
    ("greedy", "coupled", 3, "shape"),
    ("greedy", "coupled", 1, "none"),
    ("sampled", "coupled", 1, "chain"),
    ("sampled", "coupled", 3, "best"),
    ("sampled", "coupled", 3, "lookup"),
    ("all", "rejection", 3, "best"),
    ("all", "typical", 3, "best"),
    ("sampled", "typical", 1, "chain"),
    ("sampled", "coupled", 3, "medusa"),
    ("all", "coupled", 1, "medusa"),
    ("sampled", "coupled", 3, "hydra++"),
    ("all", "coupled", 3, "eagle3.1, 40 tokens"),
    ("all", "rejection", 3, "hydra++"),
    ("sampled", "coupled", 3, "flat"),
    *(("sampled", "coupled", 3, name) for name in KINDS if name not in ("medusa", "hydra++", "eagle3.1, 40 tokens")),
]
ON_GRAPHS = ["none", "chain", "best", "shape", "medusa", "hydra++", "mtp, 3 modules", "eagle3"]


def answers(target, draft, heads, distribution, accept, rows, name, device=None):
    """The outputs, and for each round the operations that made the host wait."""
    drafter, planner = DRAFTERS[name](draft, heads)
    engine = Engine(target, drafter, planner, max_rows=rows, accept=accept)
    requests = [engine.add(ask.prompt, ask.params) for ask in asks(VOCAB, [5, 1, 12], [7, 5, 6], DISTRIBUTIONS[distribution])]
    waits = []
    while not engine.scheduler.is_idle:
        before = len(device.waits) if device else 0
        engine.step()
        waits.append(Counter(device.waits[before:] if device else ()))
    return [request.output for request in requests], waits


@pytest.mark.parametrize(
    ("distribution", "accept", "rows", "name", "new_graph"),
    [*((*case, None) for case in CASES), *(("sampled", "coupled", 3, name, RecordedGraph) for name in ON_GRAPHS)],
)
def test_the_device_gives_the_tokens_of_the_host(distribution, accept, rows, name, new_graph):
    """The host waits once in a round, to read its verdict, with every drafter; forwards run directly or as graphs."""
    on_host = Target(copy.deepcopy(MODEL), check=False), Target(cut(MODEL, 2).release(), check=False)
    heads = heads_for(on_host[0], name) if name in KINDS else nn.Module()
    copies = copy.deepcopy(MODEL), cut(MODEL, 2).release(), heads.clone() if name in KINDS else heads
    expected, _ = answers(*on_host, heads, distribution, accept, rows, name)
    with fake_device() as device:
        target, draft = (Target(send(model), check=False) for model in copies[:2])
        assert target.pad_rows
        for on_device in (target, draft):
            on_device.flat_runner = FlatRunner(new_graph=new_graph)
        actual, waits = answers(target, draft, send(copies[2]), distribution, accept, rows, name, device)
        assert (target.flat_runner.num_replayed > 0) == (new_graph is not None)
    assert actual == expected
    if accept != "rejection" and DISTRIBUTIONS[distribution].logprobs is None:
        assert all(wait <= Counter({"down: aten._to_copy": 1}) for wait in waits[2:]), f"the host waits too often: {waits}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes_its_self_check_on_the_device(name):
    model = random_model(ARCHITECTURES[name]())
    with fake_device():
        Target(send(model))


def test_custom_generate_works_on_the_device():
    ids, mask = torch.tensor([[5, 6, 7, 5, 6, 7], [0, 0, 1, 2, 3, 1]]), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = custom_generate(copy.deepcopy(MODEL), ids, generation_config=config, attention_mask=mask)
    model = copy.deepcopy(MODEL)
    with fake_device():
        sent = [tensor.to("meta") for tensor in (ids, mask)]
        actual = custom_generate(send(model), sent[0], generation_config=config, attention_mask=sent[1])
        assert actual.device == sent[0].device
        assert actual.tolist() == expected.tolist()
