"""The target scores a forest as it scores texts one after the other, and refuses a model with which it would not."""

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
    """The model's own word on a text, by its own attention: logits [text, vocab] and, if asked, what every layer puts out."""
    with torch.inference_mode(), target.original() as model:
        out = model(torch.tensor([text]), use_cache=False, output_hidden_states=layers)
    return out.logits[0], [state[0] for state in out.hidden_states[1:]] if layers else None


# -- what it is held to -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "llama4", "gpt2"])
@pytest.mark.parametrize("pad_rows", [False, True], ids=["row by row", "padded"])
def test_a_forest_of_two_rows_says_what_each_path_says_alone(name, pad_rows, monkeypatch):
    target = tiny(name)
    monkeypatch.setattr(target, "pad_rows", pad_rows)
    found = score(target, STEMS).logits.split(len(PATHS))
    for stem, logits in zip(STEMS, found, strict=True):
        for path, line in zip(PATHS, logits, strict=True):
            torch.testing.assert_close(line, alone(target, stem + path)[0][-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad_rows", [False, True], ids=["row by row", "padded"])
def test_two_rows_of_different_length_in_one_forward_equal_each_alone(pad_rows, monkeypatch):
    target = tiny()
    monkeypatch.setattr(target, "pad_rows", pad_rows)
    both = score(target, STEMS).logits.split(len(PATHS))
    for stem, logits in zip(STEMS, both, strict=True):
        torch.testing.assert_close(logits, score(target, [stem]).logits, atol=1e-12, rtol=0)


def test_dead_nodes_change_nothing():
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
def test_features_are_what_the_tapped_layers_put_out(name, taps):
    """The features of all nodes, inner stem nodes too; layers in the order asked for; the last one's with the final norm."""
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
    """One head and one node at a time."""
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
def test_kernels_attend_as_by_hand(kv_heads, window, extra):
    generator = torch.Generator().manual_seed(0)
    forest = forest_of([[1, 2]])
    nodes, committed = len(forest), 9
    positions = forest.positions + committed
    seen = row_mask_module.tree_mask(forest.lineage, 2)
    row_mask = RowMask(0, nodes, 0, committed, seen, positions)
    query = torch.randn(4, nodes, 5, generator=generator).double()
    keys, values = (torch.randn(kv_heads, row_mask.context, size, generator=generator).double() for size in (5, 3))
    sinks = torch.randn(4, generator=generator).double() if extra == "sinks" else None
    params = AttentionParams(0.7, window, 1.5 if extra == "softcap" else None, sinks)
    expected = by_hand(query, keys, values, row_mask, params)
    for kernel in (reference_attention, torch_attention):
        torch.testing.assert_close(kernel(query, keys, values, row_mask, params), expected, atol=1e-12, rtol=0)


def test_a_window_is_measured_in_positions_not_in_slots():
    """Two siblings at position 3 behind three committed slots: with a window of 3 both see slots 1 and 2, and themselves."""
    seen = torch.eye(2, dtype=torch.bool)
    row_mask = RowMask(0, 2, 0, 3, seen, torch.tensor([3, 3]))
    assert row_mask.visible(Window(sliding=3)).int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]
    assert row_mask.visible(Window(chunk=2)).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 1]]
    assert row_mask.visible(Window(chunk=3)).int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


# -- the self-check notices -------------------------------------------------------------------------------------------------


def refused():
    return pytest.raises(ValueError, match=r"cannot be a target.*scored at once differs from the sequential text")


@pytest.fixture
def sound():
    """A target of its own: one that fails is released."""
    return Target(random_model(ARCHITECTURES["llama"]()))


def test_a_sound_model_passes_the_self_check(sound):
    sound.check()


def test_a_released_target_scores_no_more(sound):
    sound.release()
    with pytest.raises(ValueError, match="was released"):
        score(sound, STEMS)


def test_the_self_check_notices_siblings_that_see_each_other(sound, monkeypatch):
    monkeypatch.setattr(
        row_mask_module, "tree_mask", lambda lineage, stem: torch.ones(stem + len(lineage), stem + len(lineage)).tril() > 0
    )
    with refused():
        sound.check()


def test_the_self_check_notices_nodes_that_see_too_little(sound, monkeypatch):
    by_the_book = RowMask.visible

    def forgetful(row_mask, window):
        visible = by_the_book(row_mask, window)
        return visible.index_fill(1, torch.tensor([2]), False) if row_mask.committed else visible

    monkeypatch.setattr(RowMask, "visible", forgetful)
    with refused():
        sound.check()


def test_the_self_check_notices_positions_counted_in_nodes(sound, monkeypatch):
    forward = Target.forward

    def in_order(self, tokens, positions, *rest):
        return forward(self, tokens, torch.arange(len(positions)) + positions.min(), *rest)

    monkeypatch.setattr(Target, "forward", in_order)
    with refused():
        sound.check()


def test_the_self_check_notices_rows_that_read_each_others_slots(sound, monkeypatch):
    monkeypatch.setattr(RowMask, "start", property(lambda row_mask: 0, lambda row_mask, value: None), raising=False)
    with refused():
        sound.check()


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss", "cohere2", "llama4"])
def test_the_self_check_notices_a_forgotten_window_or_chunk(name, monkeypatch):
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


def test_the_self_check_notices_a_forgotten_soft_cap_or_sink(monkeypatch):
    by_the_book = attention.reference_attention

    def forgetful(query, keys, values, row_mask, params):
        return by_the_book(query, keys, values, row_mask, AttentionParams(params.scaling, params.window))

    for name in ("gemma2", "gpt_oss"):
        model = random_model(ARCHITECTURES[name]())
        with refused():
            Target(model, kernel=forgetful)


def test_a_refused_model_is_handed_back_as_it_came(monkeypatch):
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


def test_releasing_a_model_that_another_target_holds_leaves_that_one_sound():
    first = Target(random_model(ARCHITECTURES["llama"]()))
    expected = score(first, STEMS).logits
    second = Target(first.model)
    second.release()
    assert torch.equal(score(first, STEMS).logits, expected)
    first.release()
    assert first.model.config._attn_implementation == "sdpa"


def test_a_target_says_what_it_holds():
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


def test_a_layer_that_mixes_its_rows_ends_the_promise_of_equal_bits():
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
def test_a_list_of_states_is_asked_for_where_transformers_takes_one(release, takes):
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
