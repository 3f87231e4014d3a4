"""benchmarks/pad_heads.py: heads widened with zeros propose the same drafts as the small ones."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from heads import KINDS, heads_for
from transformers import AutoModelForCausalLM

from headstart.engine.drafter_loading import heads_in
from headstart.engine.engine import Engine
from headstart.formats import describe, describe_target, save
from headstart.speculation.calibration import Calibration
from headstart.speculation.heads_plan import PLAN, HeadsPlan, Tree, save_plan
from headstart.speculation.params import SamplingParams
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from pad_target import pad_target

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pad_heads.py"
WIDE, LAYERS = 64, 2


def padded(folder: Path, model_folder: Path, times: int) -> Path:
    """The tiny model, twice as wide, and `times` as deep."""
    pad_target(model_folder, folder, WIDE, 128, LAYERS * times)
    return folder


@pytest.fixture(scope="module")
def padded_folder(model_folder, tmp_path_factory):
    return padded(tmp_path_factory.mktemp("padded") / "target", model_folder, 1)


@pytest.fixture(scope="module")
def deep_folder(model_folder, tmp_path_factory):
    return padded(tmp_path_factory.mktemp("deep") / "target", model_folder, 3)


def saved(folder: Path, kind: str, model_folder: Path) -> Path:
    target = Target.load(model_folder)
    target_info = describe_target(target.model, load_tokenizer(model_folder))
    save(folder, heads_for(target, kind), target_info, {"steps": 3})
    ranks = ((0.5,), (0.5,), (0.5,), (0.5,))
    save_plan(folder, HeadsPlan(Calibration((0.0,), ((0.7,),), (ranks,)), {0.0: {1: Tree(((0,),), 1.5)}}))
    return folder


def pad_heads(monkeypatch, *arguments: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def decoded(model: Path, heads: Path) -> tuple[list[int], float]:
    """Tokens, and tau in float64, where no rounding changes a choice."""
    target = Target.load(model, dtype="float64")
    engine = Engine(target, heads_in(heads, target), max_rows=1)
    request = engine.add(tuple(range(10, 20)), SamplingParams(max_tokens=24, temperature=0.7, seed=1))
    list(engine.run())
    return request.output, engine.stats.tau


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", ["padded_folder", "deep_folder"])
def test_padded_heads_propose_the_drafts_of_the_small_ones(kind, padded, model_folder, tmp_path, monkeypatch, request):
    heads, target = saved(tmp_path / "heads", kind, model_folder), request.getfixturevalue(padded)
    pad_heads(monkeypatch, heads, target, tmp_path / "out")
    tokens, tau = decoded(target, tmp_path / "out")
    assert (tokens, tau) == decoded(model_folder, heads)
    assert tau > 1
    found = describe(tmp_path / "out")
    assert (found.target.hidden, found.training) == (WIDE, {"steps": 3, "padded": True})
    assert json.loads((tmp_path / "out" / PLAN).read_text()) == json.loads((heads / PLAN).read_text())


def test_a_deeper_target_is_read_at_the_last_layer_added_behind_a_tapped_one(model_folder, deep_folder, tmp_path, monkeypatch):
    for kind, taps in (("eagle3", [2, 5]), ("eagle3.1, 40 tokens", [2, 5, -1]), ("mtp-parallel", -4)):
        heads = saved(tmp_path / kind, kind, model_folder)
        pad_heads(monkeypatch, heads, deep_folder, tmp_path / f"{kind}, out")
        settings = json.loads((tmp_path / f"{kind}, out" / "config.json").read_text())["settings"]
        assert settings.get("taps", settings.get("tap")) == taps


def test_a_deeper_target_whose_layers_do_something_is_refused(model_folder, deep_folder, tmp_path, monkeypatch, capsys):
    heads = saved(tmp_path / "heads", "eagle3", model_folder)
    model = AutoModelForCausalLM.from_pretrained(deep_folder)
    torch.nn.init.normal_(model.model.layers[4].mlp.down_proj.weight)
    model.save_pretrained(tmp_path / "other")
    model.model.layers.pop(5)
    model.config.num_hidden_layers = 5
    model.save_pretrained(tmp_path / "five")
    for name, words in (("other", "layer 4 adds something"), ("five", "no multiple")):
        load_tokenizer(deep_folder).save_pretrained(tmp_path / name)
        with pytest.raises(SystemExit):
            pad_heads(monkeypatch, heads, tmp_path / name, tmp_path / "out")
        assert words in capsys.readouterr().err


def test_a_target_that_is_not_padded_is_refused(model_folder, padded_folder, tmp_path, monkeypatch, capsys):
    heads = saved(tmp_path / "heads", "medusa", model_folder)
    model = AutoModelForCausalLM.from_pretrained(padded_folder)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "wide")
    load_tokenizer(padded_folder).save_pretrained(tmp_path / "wide")
    for target, words in ((tmp_path / "wide", "not padded"), (model_folder, "nothing to widen")):
        with pytest.raises(SystemExit):
            pad_heads(monkeypatch, heads, target, tmp_path / "out")
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
