"""Published heads in use: from the file through drafting, for every kind of layer that can be imported."""

import published_eagle as eagle
import published_eagle3 as eagle3
import published_hydra as hydra
import published_medusa as medusa
import pytest
import torch
from folders import write_model
from literal import assert_same
from published import HIDDEN, ImportTrial, random, write

from headstart import formats
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain
from headstart.target.loading import load_model
from headstart.target.target import Target

KINDS = ("llama", "llama with biases", "mistral", "qwen2", "qwen3", "qwen3 with biases")
SIZE = 12  # width of an attention head


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return ImportTrial(write_model(tmp_path_factory.mktemp("target") / "talker", layers=eagle3.LAYERS), torch.float64)


def extra_tensors(kind, prefix):
    """Tensors of a layer of this kind besides those of a plain Llama layer: biases of queries, keys and values, one of the output
    except for Qwen2, and norms of queries and keys."""
    counts = {"q": 4 * SIZE, "k": 2 * SIZE, "v": 2 * SIZE} | ({"o": HIDDEN} if "biases" in kind else {})
    has_biases, has_norms = kind == "qwen2" or "biases" in kind, kind.startswith("qwen3")
    biases = {f"{prefix}self_attn.{name}_proj.bias": random(count) for name, count in counts.items()} if has_biases else {}
    return biases | ({f"{prefix}self_attn.{name}_norm.weight": 1 + random(SIZE) for name in "qk"} if has_norms else {})


def sizes_of(kind):
    return {"model_type": kind.split()[0], "head_dim": SIZE, "num_key_value_heads": 2}


# -- logits while drafting --


@pytest.mark.parametrize(("kind", "layers"), [*((kind, 1) for kind in KINDS), ("llama", 2), ("qwen3", 2)])
def test_eagle3_heads_draft_with_the_formulas_logits_for_every_kind_of_layer(trial, tmp_path, kind, layers):
    tensors = eagle3.heads("layers.0.", size=SIZE, draft=eagle3.SOME, layers=layers)
    for index in range(layers):
        tensors |= extra_tensors(kind, f"layers.{index}.")
    write(tmp_path, "model.safetensors", tensors, **eagle3.of_speculators(layer=sizes_of(kind), norm_before_residual=True))
    expected = eagle3.by_formula(trial, tensors, SIZE, prefix="layers.0.", layers=layers, norm_before_residual=True)
    assert_same(trial.drafted(tmp_path, eagle3.STEPS), list(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_eagle3_heads_of_their_authors_draft_with_the_formulas_logits_for_every_kind_of_layer(trial, tmp_path, kind):
    tensors = eagle3.heads(size=SIZE, draft=eagle3.SOME) | extra_tensors(kind, "midlayer.")
    write(tmp_path, "pytorch_model.bin", tensors, **eagle3.SIZES | sizes_of(kind))
    assert_same(trial.drafted(tmp_path, eagle3.STEPS), list(eagle3.by_formula(trial, tensors, SIZE)))


@pytest.mark.parametrize("kind", KINDS)
def test_eagle_heads_draft_with_the_formulas_logits_for_every_kind_of_layer(trial, tmp_path, kind):
    tensors = eagle.heads(bias=True, size=SIZE) | extra_tensors(kind, "layers.0.")
    write(tmp_path, "pytorch_model.bin", tensors, **eagle.SIZES | sizes_of(kind))
    assert_same(trial.drafted(tmp_path, eagle.STEPS), list(eagle.by_formula(trial, tensors, 2, SIZE)))


def test_hydra_heads_draft_with_the_formulas_logits(trial, tmp_path):
    tensors = hydra.heads_of(4, 4, 1) | hydra.prefix_of()
    write(tmp_path, "hydra_lm_head.pt", tensors, hydra_head_arch="prefix-mlp")
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    states = torch.stack([hydra.llama_layer(h, lambda name: tensors[f"{hydra.WHERE}{name}.weight"]) for h in trial.states])
    for actual, expected in zip(trial.drafted(tmp_path, 4), hydra.by_formula(trial, tensors, 4, 4, 1, states), strict=True):
        torch.testing.assert_close(actual, expected[:, : actual.shape[1]], rtol=1e-5, atol=1e-5)


def test_medusa_heads_draft_with_the_formulas_logits(trial, tmp_path):
    parts = [([(w.double(), b.double()) for w, b in blocks], last.double()) for blocks, last in medusa.parts(4, 2)]
    write(tmp_path, "medusa_lm_head.pt", medusa.numbered(medusa.parts(4, 2)))
    for actual, expected in zip(trial.drafted(tmp_path, 4), medusa.by_formula(trial, parts), strict=True):
        torch.testing.assert_close(actual, expected[:, : actual.shape[1]], rtol=1e-10, atol=1e-10)


# -- positions that change with the length --

DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "rope", [DYNAMIC, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}], ids=["old", "new"]
)
def test_dynamic_positions_equal_plain_ones_up_to_their_limit(trial, tmp_path, rope):
    tensors = eagle3.heads(size=SIZE)
    write(tmp_path, "pytorch_model.bin", tensors, **eagle3.SIZES | {"head_dim": SIZE}, **rope, max_position_embeddings=8)
    assert_same(trial.drafted(tmp_path, eagle3.STEPS), list(eagle3.by_formula(trial, tensors, SIZE)))
    (note,) = formats.detect(tmp_path).notes
    assert "of the type 'dynamic', the same as plain ones in the first 8 tokens: beyond these nothing is drafted" in note


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_nothing_is_drafted_beyond_the_limit_of_dynamic_positions(trial, tmp_path, method):
    module = {"eagle": eagle, "eagle3": eagle3}[method]
    sizes = module.SIZES | {"head_dim": SIZE, "num_key_value_heads": 2}
    write(tmp_path, "model.safetensors", module.heads(size=SIZE), **sizes, **DYNAMIC, max_position_embeddings=14)
    heads = trial.read(tmp_path)
    read, deepest, original = [], [], heads.propose

    def record(rows):
        drafts = original(rows)
        read.append(max(heads.memories[0].length(seat) for seat in rows.seats))
        deepest.append(drafts.max_depth)
        return drafts

    heads.propose = record
    target = Target(load_model(trial.folder, torch.float64, "cpu"))
    plain, _ = decoded(target, None, None, trial, 0.0)
    assert decoded(target, heads, Chain(3), trial, 0.0)[0] == plain
    assert [min(3, max(0, 15 - length)) for length in read] == deepest
    assert {0, 3} <= {*deepest}


# -- in the engine --


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_the_engine_generates_the_text_of_plain_decoding_whatever_layer_drafts(trial, tmp_path, method, kind, temperature):
    if method == "eagle":
        tensors = eagle.heads(size=SIZE) | extra_tensors(kind, "layers.0.")
        write(tmp_path, "model.safetensors", tensors, **eagle.SIZES | sizes_of(kind))
    else:
        tensors = eagle3.heads("layers.0.", size=SIZE) | extra_tensors(kind, "layers.0.")
        write(tmp_path, "model.safetensors", tensors, **eagle3.of_speculators(layer=sizes_of(kind)))
    target = Target(load_model(trial.folder, torch.float64, "cpu"))
    heads = trial.read(tmp_path)
    plain, _ = decoded(target, None, None, trial, temperature)
    for planner in Chain(3), Best(nodes=9, depth=3, width=3, beam=3):
        text, drafts = decoded(target, heads, planner, trial, temperature)
        assert text == plain
        assert drafts > 0


def decoded(target, drafter, planner, trial, temperature):
    """Two answers decoded together, and the number of tokens drafted for them."""
    engine = Engine(target, drafter, planner)
    params = SamplingParams(max_tokens=12, temperature=temperature, ignore_eos=True)
    requests = [engine.add(tokens, params, seed=seed) for seed, tokens in enumerate(trial.tokens.tolist())]
    for _ in engine.run():
        pass
    return [list(request.output) for request in requests], engine.stats.drafts
