"""The arithmetic of docs/scaling.md: sizes are those of real modules, operations those that torch counts."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.drafters.parts.losses import Objective
from headstart.drafters.registry import method
from headstart.target.embed_head import EmbedHead
from headstart.training.dataset import Dataset, Text
from headstart.training.features import Online
from headstart.training.frozen_target import FrozenTarget
from headstart.training.scaling import Sizes, disk, memory, operations

ROOT = Path(__file__).parents[2]
CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=128, num_hidden_layers=3, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2
)
CASES = [
    ("medusa", {"num_heads": 2}),
    ("medusa", {"num_heads": 3, "projection": "shared"}),
    ("hydra++", {"num_heads": 2, "projection": "shared"}),
    ("eagle", {}),
    ("eagle3", {"draft_vocab": 64, "steps": 3}),
    ("mtp", {"depth": 2}),
]


class Counter(TorchDispatchMode):
    """Counts operations of matrix products as torch's own counter does, which cannot follow `autograd.grad`."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            self.total += count(*arguments, **(options or {}), out_val=result)
        return result


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def heads_for(model, name, settings):
    drafter = method(name)
    return drafter(drafter.resolve_config(drafter.config_type(**settings), CONFIG), 128, 512).bind(EmbedHead(model))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_weights_are_counted_as_in_the_real_modules(model, name, settings):
    sizes = Sizes.of(CONFIG, name, settings)
    assert sizes.in_layers + sizes.outside == model.num_parameters()
    assert sizes.in_layers == 3 * sizes.layer == sum(weight.numel() for weight in model.model.layers.parameters())
    assert sizes.heads == sum(weight.numel() for weight in heads_for(model, name, settings).parameters())


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_operations_are_those_that_torch_counts(model, name, settings):
    """To a quarter: attention is left out, and the last positions of a text have fewer guesses."""
    length, rows = 64, 2
    heads = heads_for(model, name, settings)
    heads.choose_vocab(torch.ones(512), [])
    text = Text(tuple(range(length)), (True,) * length)
    batch = Dataset((text,) * rows, (0, 1), ()).pad([0, 1])
    online = Online(model, heads.taps)
    with Counter() as of_target:
        online(batch)
    with Counter() as of_all:
        FrozenTarget(heads, Objective(), online)(batch)[0].backward()
    target, rest = operations(Sizes.of(CONFIG, name, settings))
    assert of_target.total == pytest.approx(target * length * rows, rel=0.25)
    counted = of_all.total - of_target.total
    assert counted == pytest.approx(rest * length * rows, rel=0.25)


def test_memory_is_divided_where_the_weights_are():
    sizes = Sizes.of(CONFIG, "eagle3", {})
    one, eight, many = (memory(sizes, 64, processes=count, here=min(8, count)) for count in (1, 8, 64))
    assert one.target == 2 * (sizes.in_layers + sizes.outside)
    assert eight.target == many.target == 2 * (sizes.in_layers / 8 + 2 * sizes.layer + sizes.outside)
    assert one.heads == 16 * sizes.heads
    assert eight.heads == 2 * sizes.heads + 8 * sizes.heads > many.heads
    stored = memory(sizes, 64, is_stored=True)
    assert stored.target == 2 * sizes.outside
    assert stored.total < one.total


def test_a_token_on_the_disk_has_the_tapped_layers_and_the_last():
    assert disk(Sizes.of(CONFIG, "medusa", {})) == 128 * 2
    assert disk(Sizes.of(CONFIG, "eagle3", {"taps": (0, 1)})) == 3 * 128 * 2


def test_the_page_shows_the_tables_of_the_script():
    script = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
    page = (ROOT / "docs" / "scaling.md").read_text()
    for table in script["tables"](script["targets"](), script["TOKENS"]):
        assert table in page, "docs/scaling.md is out of date: put in what `python benchmarks/scaling.py` prints"
