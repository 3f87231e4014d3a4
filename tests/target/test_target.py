"""A target gives a forest the logits of the sequential texts, and refuses a model for which that does not hold."""

import math
from types import SimpleNamespace

import pytest
import torch
from small_trees import PATHS, STEMS, TREE, forest_of, fresh_cache, score
from tiny import ARCHITECTURES, VOCAB, WINDOW, random_model, tiny

from headstart.target import attention, hidden_states
from headstart.target import row_mask as row_mask_module
from headstart.target import target as target_module
from headstart.target.attention import AttentionParams, reference_attention, torch_attention
from headstart.target.cache import KVCache, Seating
from headstart.target.row_mask import RowMask, Window
from headstart.target.target import Target


def alone(target, text, layers=False):
    """The reference: the model with its own attention. Logits [text, vocab] and, if asked, the output of every layer."""
    with torch.inference_mode(), target.original() as model:
        out = model(torch.tensor([text]), use_cache=False, output_hidden_states=layers)
    return out.logits[0], [state[0] for state in out.hidden_states[1:]] if layers else None


# -- equal to the sequential text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "llama4", "gpt2"])
@pytest.mark.parametrize("pad_rows", [False, True], ids=["row by row", "padded"])
def test_a_forest_of_two_rows_gives_the_logits_of_each_path_alone(name, pad_rows, monkeypatch):
    target = tiny(name)
    monkeypatch.setattr(target, "pad_rows", pad_rows)
    rows = score(target, STEMS).logits.split(len(PATHS))
    for stem, row in zip(STEMS, rows, strict=True):
        for path, logits in zip(PATHS, row, strict=True):
            torch.testing.assert_close(logits, alone(target, stem + path)[0][-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad_rows", [False, True], ids=["row by row", "padded"])
def test_two_rows_of_different_length_in_one_forward_equal_each_alone(pad_rows, monkeypatch):
    target = tiny()
    monkeypatch.setattr(target, "pad_rows", pad_rows)
    both = score(target, STEMS).logits.split(len(PATHS))
    for stem, logits in zip(STEMS, both, strict=True):
        torch.testing.assert_close(logits, score(target, [stem]).logits, atol=1e-12, rtol=0)


def test_dead_nodes_change_no_logits():
    target = tiny()
    size = len(forest_of(STEMS))
    scored, filled = score(target, STEMS), score(target, STEMS, num_nodes=size + 5)
    torch.testing.assert_close(filled.logits[: len(scored.logits)], scored.logits, atol=1e-12, rtol=0)


def test_only_the_asked_nodes_get_logits():
    target, forest = tiny(), forest_of(STEMS)
    cache, seats = fresh_cache(target, STEMS)
    logits = target.score(forest, cache, seats).logits
    assert logits.shape == (2 * len(PATHS), VOCAB)
    everything = torch.arange(len(forest))
    in_full = target.forward(
        forest.tokens, forest.positions, row_mask_module.row_masks(forest, cache, seats), cache, everything
    ).logits
    torch.testing.assert_close(logits, in_full[forest.asked], atol=1e-12, rtol=0)


TAPPED = [("llama", taps) for taps in [(0,), (1, 0), (2,), (0, 1, 2)]] + [(name, (-1, 0)) for name in ARCHITECTURES]


@pytest.mark.parametrize(("name", "taps"), TAPPED, ids=str)
def test_features_are_the_hidden_states_after_the_tapped_layers(name, taps):
    """Of all nodes, inner stem nodes too; layers in the order of the taps; the last layer's with the final norm."""
    target = tiny(name)
    features = score(target, STEMS[:1], taps).features
    (stem,) = STEMS[:1]
    assert features.shape == (len(stem) + len(TREE), len(taps) * target.hidden)
    _, layers = alone(target, stem + PATHS[-1], layers=True)
    expected = torch.cat([layers[tap] for tap in taps], -1)
    on_path = [*range(len(stem)), *(len(stem) + node for node in (0, 2, 5))]
    torch.testing.assert_close(features[on_path], expected, atol=1e-5, rtol=1e-5)


def test_without_taps_there_are_no_features():
    assert score(tiny(), STEMS).features is None


# -- kernels ----------------------------------------------------------------------------------------------------------------


def by_hand(query, keys, values, row_mask, params):
    """The reference: attention for one head and one node at a time."""
    out = query.new_zeros(query.shape[0], query.shape[1], values.shape[-1])
    visible, group = row_mask.visible(params.window), query.shape[0] // keys.shape[0]
    for head in range(query.shape[0]):
        for node in range(query.shape[1]):
            slots = visible[node].nonzero()[:, 0]
            scores = keys[head // group, slots] @ query[head, node] * params.scaling
            if params.softcap is not None:
                scores = params.softcap * torch.tanh(scores / params.softcap)
            weights = scores.exp()
            sink = 0 if params.sinks is None else params.sinks[head].exp()
            out[head, node] = weights @ values[head // group, slots] / (weights.sum() + sink)
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [Window(), Window(sliding=6), Window(chunk=6)], ids=str)
@pytest.mark.parametrize("extra", ["", "softcap", "sinks"])
def test_kernels_equal_attention_computed_by_hand(kv_heads, window, extra):
    generator = torch.Generator().manual_seed(0)
    forest = forest_of([[1, 2]])
    nodes, committed = len(forest), 9
    positions = forest.positions + committed
    tree_mask = row_mask_module.tree_mask(forest.lineage, 2)
    row_mask = RowMask(0, nodes, 0, committed, tree_mask, positions)
    query = torch.randn(4, nodes, 5, generator=generator).double()
    keys, values = (torch.randn(kv_heads, row_mask.context, size, generator=generator).double() for size in (5, 3))
    sinks = torch.randn(4, generator=generator).double() if extra == "sinks" else None
    params = AttentionParams(0.7, window, 1.5 if extra == "softcap" else None, sinks)
    expected = by_hand(query, keys, values, row_mask, params)
    for kernel in (reference_attention, torch_attention):
        torch.testing.assert_close(kernel(query, keys, values, row_mask, params), expected, atol=1e-12, rtol=0)


def test_a_window_is_measured_in_positions_not_in_slots():
    """Two siblings at position 3 behind three committed slots: with a window of 3 both see slots 1 and 2, and themselves."""
    siblings = torch.eye(2, dtype=torch.bool)
    row_mask = RowMask(0, 2, 0, 3, siblings, torch.tensor([3, 3]))
    assert row_mask.visible(Window(sliding=3)).int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]
    assert row_mask.visible(Window(chunk=2)).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 1]]
    assert row_mask.visible(Window(chunk=3)).int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


# -- the self-check ---------------------------------------------------------------------------------------------------------


def refused():
    return pytest.raises(ValueError, match=r"cannot be a target.*scored at once differs from the sequential text")


@pytest.fixture
def target():
    """A target for one test, because the self-check releases a target that fails."""
    return Target(random_model(ARCHITECTURES["llama"]()))


def test_a_correct_model_passes_the_self_check(target):
    target.check()


def test_a_released_target_cannot_score(target):
    target.release()
    with pytest.raises(ValueError, match="was released"):
        score(target, STEMS)


def test_the_self_check_notices_siblings_that_see_each_other(target, monkeypatch):
    monkeypatch.setattr(
        row_mask_module, "tree_mask", lambda lineage, stem: torch.ones(stem + len(lineage), stem + len(lineage)).tril() > 0
    )
    with refused():
        target.check()


def test_the_self_check_notices_nodes_that_miss_a_slot(target, monkeypatch):
    original = RowMask.visible

    def incomplete(row_mask, window):
        visible = original(row_mask, window)
        return visible.index_fill(1, torch.tensor([2]), False) if row_mask.committed else visible

    monkeypatch.setattr(RowMask, "visible", incomplete)
    with refused():
        target.check()


def test_the_self_check_notices_positions_counted_in_nodes(target, monkeypatch):
    forward = Target.forward

    def in_order(self, tokens, positions, *rest):
        return forward(self, tokens, torch.arange(len(positions)) + positions.min(), *rest)

    monkeypatch.setattr(Target, "forward", in_order)
    with refused():
        target.check()


def test_the_self_check_notices_rows_that_read_each_others_slots(target, monkeypatch):
    monkeypatch.setattr(RowMask, "start", property(lambda row_mask: 0, lambda row_mask, value: None), raising=False)
    with refused():
        target.check()


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss", "cohere2", "llama4"])
def test_the_self_check_notices_a_missing_window_or_chunk(name, monkeypatch):
    model = random_model(ARCHITECTURES[name]())
    monkeypatch.setattr(target_module, "window_of_layer", lambda config, layer, window: Window())
    with refused():
        Target(model)


@pytest.mark.parametrize("wrong", [Window(sliding=WINDOW - 1), Window(sliding=WINDOW + 1)], ids=str)
def test_the_self_check_notices_a_window_that_is_off_by_one(wrong, monkeypatch):
    model = random_model(ARCHITECTURES["mistral"]())
    monkeypatch.setattr(target_module, "window_of_layer", lambda config, layer, window: wrong)
    with refused():
        Target(model)


def test_the_self_check_notices_a_missing_soft_cap_or_sink(monkeypatch):
    original = attention.reference_attention

    def incomplete(query, keys, values, row_mask, params):
        return original(query, keys, values, row_mask, AttentionParams(params.scaling, params.window))

    for name in ("gemma2", "gpt_oss"):
        model = random_model(ARCHITECTURES[name]())
        with refused():
            Target(model, kernel=incomplete)


def test_a_refused_model_is_given_back_unchanged(monkeypatch):
    model = random_model(ARCHITECTURES["llama"]())
    text = torch.tensor([STEMS[0]])
    with torch.inference_mode():
        before = model(text).logits
        monkeypatch.setattr(
            row_mask_module, "tree_mask", lambda lineage, stem: torch.ones(stem + len(lineage), stem + len(lineage)).tril() > 0
        )
        with refused():
            Target(model)
        assert torch.equal(model(text).logits, before)


# -- one model, two holders -------------------------------------------------------------------------------------------------


def test_releasing_one_of_two_targets_leaves_the_other_working():
    first = Target(random_model(ARCHITECTURES["llama"]()))
    expected = score(first, STEMS).logits
    second = Target(first.model)
    second.release()
    assert torch.equal(score(first, STEMS).logits, expected)
    first.release()
    assert first.model.config._attn_implementation == "sdpa"


def test_a_target_knows_its_vocab_and_the_bytes_of_its_cache():
    target = tiny("deepseek_v3")
    shape = target.shapes[0]
    assert (shape.kv_heads, shape.key_dim, shape.value_dim) == (4, 24, 12)
    assert target.slot_bytes == 3 * 4 * (24 + 12) * 8
    assert target.vocab == VOCAB
    cache = target.new_cache(Seating(2, 50))
    assert cache.bytes == 50 * target.slot_bytes == sum(store.nbytes for store in cache._stores.values())
    assert isinstance(cache, KVCache)


def test_an_unsupported_keyword_of_the_attention_is_named():
    layer = tiny().model.model.layers[0].self_attn
    some = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match="LlamaAttention passes frobnicate to its attention, which is not supported"):
        attention.attend(layer, some, some, some, None, frobnicate=1)
    with pytest.raises(ValueError, match="LlamaAttention does not pass keyword arguments on"):
        attention.attend(layer, some, some, some, None, frobnicate=None)
    assert math.isfinite(layer.scaling)


def test_a_layer_that_mixes_its_rows_prevents_exactness():
    def mixing() -> Target:
        model = random_model(ARCHITECTURES["llama"](), torch.float32)
        model.model.layers[1].register_forward_hook(lambda _module, _inputs, out: out + 1e-7 * out.abs().amax(1, keepdim=True))
        return Target(model, check=False)

    with pytest.raises(ValueError, match=r"exact=True is not available: .* other bits"):
        mixing().choose_kernels(True)
    target = mixing()
    target.choose_kernels("auto")
    assert not target.is_exact


@pytest.mark.parametrize(("release", "takes"), [("5.17.0", False), ("5.22.1", False), ("5.23.0.dev0", True), ("6.0rc1", True)])
def test_transformers_takes_a_list_of_states_since_5_23(release, takes):
    assert hidden_states._takes_a_list(release) is takes


@pytest.mark.parametrize(("takes_a_list", "expected"), [(True, [2, 3]), (False, True)])
def test_older_transformers_are_asked_for_all_states(takes_a_list, expected, monkeypatch):
    def model(output_hidden_states):
        assert output_hidden_states == expected
        return SimpleNamespace(hidden_states=["embedding", "layer 0", "layer 1", "layer 2"])

    monkeypatch.setattr(hidden_states, "TAKES_A_LIST", takes_a_list)
    _, states = hidden_states.forward_with_hidden_states(model, [1, 2])
    assert states == {1: "layer 1", 2: "layer 2"}


def test_features_are_the_same_where_transformers_returns_all_states(monkeypatch):
    expected = score(tiny(), STEMS, (1, -1)).features
    monkeypatch.setattr(hidden_states, "TAKES_A_LIST", False)
    assert torch.equal(score(tiny(), STEMS, (1, -1)).features, expected)
