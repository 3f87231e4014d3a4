"""All rows in one attention call equal each row alone: through the one door, `attend`, with row by row as the reference."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention_module
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.speculation.tree import ROOT, Drafts, merge
from headstart.target.attention import AttentionMetadata, AttentionParams, attend, torch_attention
from headstart.target.cache import KVCache, LayerShape, Seating
from headstart.target.flat_rows import ForestRows, LevelRows, level_rows, text_rows
from headstart.target.flex import BLOCK, _attend, compiled_flex, flex_kernel, read_blocks
from headstart.target.graphs import _Captured
from headstart.target.padded_rows import padded_attention
from headstart.target.row_mask import Window, row_masks

SHAPE = LayerShape(2, 4, 3)
HEADS = 4
WINDOWS = [Window(), Window(sliding=3), Window(sliding=40), Window(chunk=4), Window(sliding=5, chunk=7)]
KERNELS = {"padded": padded_attention, "flex": flex_kernel}


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """FlexAttention's definition runs operation by operation: to trace it anew for every shape takes seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
        yield


@st.composite
def occupied_seats(draw, most_nodes=8):
    """A KV cache with random content, and seats of which some are free, in any order; each has room for `most_nodes` more."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    seating = Seating(2 * len(lengths), 40 * len(lengths))
    cache = KVCache([SHAPE], seating, "cpu", torch.float64, has_sink=True)
    for store in cache._stores.values():
        store.normal_(generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    seats = []
    for length in lengths:
        unused = seating.take(draw(st.integers(1, 5)))
        seat = seating.take(length + most_nodes)
        cache.lengths[seat] = length
        seats.append(seat)
        if draw(st.booleans()):
            seating.give_back(unused)
    return cache, draw(st.permutations(seats))


@st.composite
def forests(draw):
    """A cache, seats, and a forest of ragged stems and trees, some rows without drafts; dead nodes at the end."""
    cache, seats = draw(occupied_seats())
    stems = [[1] * draw(st.integers(1, 3)) for _ in seats]
    parents, rows, depths = [], [], []
    for row in range(len(seats)):
        first = len(parents)
        for node in range(draw(st.integers(0, 5))):
            parent = draw(st.integers(ROOT, node - 1))
            parents.append(parent if parent == ROOT else first + parent)
            depths.append(1 if parent == ROOT else depths[first + parent] + 1)
            rows.append(row)
    drafts = Drafts.of(range(len(parents)), parents, rows, depths, [0.5] * len(parents))
    size = sum(map(len, stems)) + len(parents) + draw(st.integers(0, 3))
    starts = [cache.lengths[seat] for seat in seats]
    return cache, seats, merge(stems, starts, [True] * len(seats), drafts, size)


def copied(cache):
    """A KV cache with the same seats and content."""
    copy = KVCache([SHAPE], cache.seating, "cpu", torch.float64, has_sink=True)
    for dim, store in copy._stores.items():
        store.copy_(cache._stores[dim])
    return copy


def attended(cache, num_nodes, window, extra, num_added=0, **how):
    """[nodes, heads, value_dim] of one attention layer with random queries, keys and values, through the door.

    num_added: nodes behind those of the forward, which a bucket adds.
    """
    sizes = (HEADS, SHAPE.key_dim), (SHAPE.kv_heads, SHAPE.key_dim), (SHAPE.kv_heads, SHAPE.value_dim)
    query, key, value = (
        torch.cat([drawn(num_nodes, *size), drawn(num_added, *size, seed=1)]).transpose(0, 1)[None] for size in sizes
    )
    metadata = AttentionMetadata(how.pop("masks", ()), cache, torch_attention, [window], **how)
    more = {"softcap": 0.8 if extra == "softcap" else None}
    more["s_aux"] = torch.linspace(-1, 2, HEADS).double() if extra == "sinks" else None
    return attend(SimpleNamespace(layer_idx=0), query, key, value, None, 0.7, metadata, **more)[0][0]


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_buffers(rows, context=64):
    """The rows as a graph sees them: copied into the static buffers of their bucket."""
    static = rows.bucketed(context)
    buffers = _Captured(None, static.buffers, rows.tensors())
    buffers.load(rows.tensors())
    return static.rows.with_tensors(buffers.inputs)


def assert_equal_to_row_by_row(cache, masks, rows, num_nodes, window, extra, kernel):
    """Live nodes attend to the same, and the same keys and values end up in the same slots of the cache."""
    expected_cache, actual_cache = copied(cache), copied(cache)
    num_live = sum(mask.nodes for mask in masks)
    expected = attended(expected_cache, num_nodes, window, extra, masks=masks)
    flat = rows.flat_mask()
    num_added = len(flat.rows) - num_nodes
    actual = attended(actual_cache, num_nodes, window, extra, num_added, flat=flat, flat_kernel=KERNELS[kernel])
    torch.testing.assert_close(actual[:num_live], expected[:num_live], atol=1e-12, rtol=0)
    assert actual.isfinite().all()  # a nan in the sink slot would spread to every node
    for dim, store in expected_cache._stores.items():
        assert torch.equal(actual_cache._stores[dim][:, : cache.sink], store[:, : cache.sink])


BUCKETS = pytest.mark.parametrize("is_bucketed", [False, True], ids=["exact", "in a bucket"])
LAYERS = st.sampled_from(WINDOWS), st.sampled_from(["", "softcap", "sinks"])


@BUCKETS
@given(forests(), *LAYERS)
@settings(max_examples=60, deadline=None)
def test_a_padded_forest_attends_as_its_rows_alone(is_bucketed, case, window, extra):
    cache, seats, forest = case
    rows = ForestRows.of_forest(forest, cache, seats)
    rows = in_buffers(rows) if is_bucketed else rows
    assert_equal_to_row_by_row(cache, row_masks(forest, cache, seats), rows, len(forest), window, extra, "padded")


@BUCKETS
@given(forests(), *LAYERS)
@settings(max_examples=10, deadline=None)
def test_flex_attention_attends_as_the_rows_alone(is_bucketed, case, window, extra):
    cache, seats, forest = case
    rows = ForestRows.of_forest(forest, cache, seats)
    rows = in_buffers(rows) if is_bucketed else rows
    assert_equal_to_row_by_row(cache, row_masks(forest, cache, seats), rows, len(forest), window, extra, "flex")


@st.composite
def levels(draw):
    """A cache, seats, and the tree mask and positions of a level: chains behind the scratch of earlier levels."""
    width, depth = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    cache, seats = draw(occupied_seats(most_nodes=width * depth + 1))
    for seat in seats:
        cache.lengths[seat] = max(1, cache.lengths[seat] - 1)
    masks = torch.zeros(len(seats), width, width * depth, dtype=torch.bool)
    for row in range(len(seats)):
        for node in range(width):
            masks[row, node, (depth - 1) * width + node] = True
            for level in range(depth - 1):
                masks[row, node, level * width + draw(st.integers(0, width - 1))] = True
    depths = torch.arange(1, depth + 1).repeat_interleave(width)
    return cache, seats, masks, torch.tensor([[cache.lengths[seat] - 1] for seat in seats]) + depths


@BUCKETS
@pytest.mark.parametrize("kernel", KERNELS)
@given(case=levels(), window=LAYERS[0], extra=LAYERS[1])
@settings(max_examples=15, deadline=None)
def test_a_level_attends_as_its_rows_alone(is_bucketed, kernel, case, window, extra):
    cache, seats, tree_mask, positions = case
    masks, rows = (level_rows(cache, seats, tree_mask, positions, is_flat) for is_flat in (False, True))
    assert isinstance(rows, LevelRows)
    rows = in_buffers(rows) if is_bucketed else rows
    assert_equal_to_row_by_row(cache, masks, rows, tree_mask.shape[0] * tree_mask.shape[1], window, extra, kernel)


@BUCKETS
@given(case=occupied_seats(), window=LAYERS[0], data=st.data())
@settings(max_examples=30, deadline=None)
def test_known_texts_attend_as_each_alone(is_bucketed, case, window, data):
    cache, seats = case
    lengths = [data.draw(st.integers(1, 8)) for _ in seats]
    positions = torch.cat([torch.arange(n) + cache.lengths[seat] for seat, n in zip(seats, lengths, strict=True)])
    masks, rows = (text_rows(cache, seats, lengths, positions, is_flat) for is_flat in (False, True))
    rows = in_buffers(rows) if is_bucketed else rows
    assert_equal_to_row_by_row(cache, masks, rows, sum(lengths), window, "", "padded")


# -- blocks -----------------------------------------------------------------------------------------------------------------


@BUCKETS
@given(forests(), st.sampled_from(WINDOWS))
@settings(max_examples=60, deadline=None)
def test_the_blocks_that_are_read_hold_every_visible_slot(is_bucketed, case, window):
    """With blocks of 3 instead of 128, so that a small cache has many of them."""
    cache, seats, forest = case
    rows = ForestRows.of_forest(forest, cache, seats)
    flat = (in_buffers(rows) if is_bucketed else rows).flat_mask()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headstart.target.flex.BLOCK", 3)
        read = read_blocks(flat, window, cache.sink + 1)
    nodes, slots = torch.arange(len(flat.rows)), torch.arange(cache.sink + 1)
    visible = flat.sees(nodes[:, None], slots, window)
    assert read.repeat_interleave(3, 0).repeat_interleave(3, 1)[: len(nodes), : len(slots)][visible].all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the compiler itself
@pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="torch cannot compile here")
def test_compiled_flex_attention_reads_the_named_blocks_only_and_equals_the_rows_alone(monkeypatch):
    """torch's compiled kernel skips blocks, which its uncompiled definition does not."""
    monkeypatch.setattr(flex_attention_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False, raising=False)
    cache = KVCache([LayerShape(2, 32, 32)], Seating(2, 5 * BLOCK), "cpu", torch.float32, has_sink=True)
    for store in cache._stores.values():
        store.normal_(generator=torch.Generator().manual_seed(0))
    seats = [cache.seating.take(250), cache.seating.take(300)]
    cache.lengths[:2] = [130, 200]
    drafts = Drafts.of([1, 2, 3, 4], [ROOT, 0, ROOT, 2], [0, 0, 1, 1], [1, 2, 1, 2], [0.5] * 4)
    forest = merge([[5], [6, 7]], [130, 200], [True, True], drafts, 8)
    query = torch.randn(4, len(forest), 32, generator=torch.Generator().manual_seed(1))
    keys, values = cache.layer(0)
    for window in (Window(), Window(sliding=50)):
        params = AttentionParams(0.2, window)
        with torch.inference_mode():
            flat, next_flat = (ForestRows.of_forest(forest, cache, seats).flat_mask() for _ in range(2))
            assert read_blocks(flat, window, cache.sink + 1)[:, -1].sum() == 1  # only the block of the sink
            actual = _attend(compiled_flex(), query, keys, values, flat, params)
            with torch._dynamo.config.patch(error_on_recompile=True):  # the mask of a next forward has the same shapes
                assert torch.equal(_attend(compiled_flex(), query, keys, values, next_flat, params), actual)
        for mask in row_masks(forest, cache, seats):
            nodes, seat = slice(mask.first, mask.last), slice(mask.start, mask.start + mask.context)
            expected = torch_attention(query[:, nodes], keys[:, seat], values[:, seat], mask, params)
            torch.testing.assert_close(actual[:, nodes], expected, atol=1e-5, rtol=1e-4)
