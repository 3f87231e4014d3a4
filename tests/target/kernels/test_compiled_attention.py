"""The compiled attention equals the definition, and a node has the same bits wherever its ancestors are stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from headstart.target.attention import AttentionMetadata, AttentionParams, reference_attention
from headstart.target.cache import KVCache, LayerShape, Seating
from headstart.target.kernels.compiled_attention import CompiledAttention
from headstart.target.kernels.fuse import fuse
from headstart.target.kernels.fused_attention import FusedAttention, fuse_attention
from headstart.target.kernels.library import library
from headstart.target.kernels.linear import prepack
from headstart.target.kernels.restore import restore
from headstart.target.row_mask import RowMask, Window

pytestmark = pytest.mark.skipif(library() is None, reason="there are no compiled kernels for this processor, or no compiler")
SLOTS = 400


def cache_of(shape, seats, dtype):
    seating = Seating(len(seats), sum(seats))
    for slots in seats:
        seating.take(slots)
    cache = KVCache([shape], seating, "cpu", dtype)
    for part in cache.layer(0):
        part.normal_()
    return cache


def random_tree(parents):
    """[nodes, nodes] mask of a tree, and the depth of each node. parents: -1 for the root."""
    mask, depths = torch.eye(len(parents), dtype=torch.bool), [0] * len(parents)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
            depths[node] = depths[parent] + 1
    return mask, torch.tensor(depths)


@st.composite
def rows_of_a_forward(draw):
    """For each row: committed slots, earlier levels, and the parents of its nodes, or their number where it is causal."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        committed, nodes = draw(st.integers(1, 200)), draw(st.integers(1, 20))
        if draw(st.booleans()):
            rows.append((committed, 0, nodes))
        else:
            parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, nodes)]
            rows.append((committed, draw(st.integers(0, nodes - 1)), parents))
    return rows


def masks_of(rows, cache):
    masks, first = [], 0
    for seat, (committed, scratch, nodes) in enumerate(rows):
        start = cache.seating[seat].start
        if isinstance(nodes, int):
            masks.append(RowMask(first, first + nodes, start, committed, None, committed + torch.arange(nodes)))
            first += nodes
        else:
            tree, depths = random_tree(nodes)
            count = len(nodes) - scratch
            masks.append(RowMask(first, first + count, start, committed, tree[scratch:], committed + depths, scratch))
            first += count
    return masks, first


@settings(max_examples=60, deadline=None)
@given(
    rows=rows_of_a_forward(),
    groups=st.sampled_from([1, 3]),
    widths=st.sampled_from([(64, 64), (16, 48), (128, 128)]),
    window=st.sampled_from([Window(), Window(sliding=7), Window(sliding=150), Window(chunk=64)]),
    softcap=st.sampled_from([None, 3.0]),
    has_sinks=st.booleans(),
    num_dead=st.sampled_from([0, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_all_rows_equal_the_definition(rows, groups, widths, window, softcap, has_sinks, num_dead, dtype, seed):
    torch.manual_seed(seed)
    shape = LayerShape(2, *widths)
    cache = cache_of(shape, [SLOTS] * len(rows), dtype)
    masks, nodes = masks_of(rows, cache)
    query, key, value = (
        torch.randn(n, nodes + num_dead, w).to(dtype) for n, w in [(2 * groups, widths[0]), (2, widths[0]), (2, widths[1])]
    )
    params = AttentionParams(0.11, window, softcap, torch.randn(2 * groups) if has_sinks else None)
    keys, values = (part.clone() for part in cache.layer(0))
    actual = CompiledAttention()(AttentionMetadata(masks, cache, CompiledAttention(), [window]), 0, query, key, value, params)
    assert actual.shape == (nodes + num_dead, 2 * groups, widths[1])
    assert not actual[nodes:].any()
    for mask in masks:
        own, end = slice(mask.first, mask.last), mask.start + mask.context
        keys[:, end - mask.nodes : end], values[:, end - mask.nodes : end] = key[:, own], value[:, own]
        seat = slice(mask.start, end)
        expected = reference_attention(query[:, own].double(), keys[:, seat].double(), values[:, seat].double(), mask, params)
        error = (actual[own].transpose(0, 1).double() - expected).abs().max()
        assert float(error) <= (1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(keys, cache.layer(0)[0])
    assert torch.equal(values, cache.layer(0)[1])


@settings(max_examples=40, deadline=None)
@given(
    committed=st.integers(0, 150),
    depth=st.integers(1, 20),
    crowd=st.integers(0, 3),
    window=st.sampled_from([Window(), Window(sliding=9), Window(chunk=32)]),
    width=st.sampled_from([16, 64, 128]),
    seed=st.integers(0, 99),
)
def test_a_node_has_the_same_bits_as_a_draft_in_a_stem_and_alone(committed, depth, crowd, window, width, seed):
    torch.manual_seed(seed)
    shape, length = LayerShape(2, width, width), committed + depth
    key, value, query = torch.randn(2, length, width), torch.randn(2, length, width), torch.randn(6, length, width)
    params = AttentionParams(0.13, window)

    def attend(committed, nodes, mask, positions):
        """The attention of the tokens `nodes` behind committed ones; -1 is an unrelated draft."""
        cache = cache_of(shape, [SLOTS], torch.float32)
        for part, content in zip(cache.layer(0), (key, value), strict=True):
            part[:, :committed] = content[:, :committed]
        row = RowMask(0, len(nodes), 0, committed, mask, positions)
        metadata = AttentionMetadata([row], cache, CompiledAttention(), [window])
        return CompiledAttention()(metadata, 0, query[:, nodes], key[:, nodes], value[:, nodes], params)[-1]

    alone = attend(length - 1, [length - 1], None, torch.tensor([length - 1]))
    nodes = list(range(committed, length))
    assert torch.equal(attend(committed, nodes, None, torch.tensor(nodes)), alone)
    tree = [(node, is_own) for node in nodes for is_own in [False] * crowd + [True]]
    mask = torch.eye(len(tree), dtype=torch.bool)
    own = torch.tensor([is_own for _, is_own in tree])
    mask[own] |= own & torch.ones(len(tree), len(tree), dtype=torch.bool).tril()[own]
    drafted = attend(committed, [node for node, _ in tree], mask, torch.tensor([node for node, _ in tree]))
    assert torch.equal(drafted, alone)


SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def packed(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)  # norms that do something
    fuse(model)
    prepack(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True),
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
        Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32),
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=20),
    ],
    ids=["llama", "mistral", "qwen3", "gemma2"],
)
def test_attention_modules_are_fused_and_put_back(config, dtype):
    model = packed(config, dtype)
    before = model.model.layers[0].self_attn
    assert fuse_attention(model) == 2
    assert isinstance(model.model.layers[0].self_attn, FusedAttention)
    restore(model)
    assert model.model.layers[0].self_attn is before


def test_a_fused_module_passes_on_what_its_model_passes():
    model = packed(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=20, attn_logit_softcapping=7.0))
    fuse_attention(model)
    params = model.model.layers[1].self_attn.params
    assert (params.scaling, params.softcap) == (20**-0.5, 7.0)


def test_an_attention_with_another_rotary_embedding_is_not_fused():
    assert fuse_attention(packed(CohereConfig(**SIZES, num_key_value_heads=2))) == 0  # it rotates neighbours, not halves


def test_a_fused_module_serves_the_models_own_attention():
    model = packed(LlamaConfig(**SIZES))
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        fuse_attention(model)
        assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_angles_of_another_width_go_to_the_replaced_module(monkeypatch):
    """A partial rotary embedding rotates some values of a head only; reading as many angles as values would read too far."""
    model = packed(LlamaConfig(**SIZES))
    fuse_attention(model)
    fused, passed = model.model.layers[0].self_attn, []
    monkeypatch.setattr(fused.original(), "forward", lambda *_, **inputs: passed.append(inputs["position_embeddings"]))
    cache = cache_of(LayerShape(4, 16, 16), [SLOTS], torch.float32)
    metadata = AttentionMetadata([RowMask(0, 3, 0, 0, None, torch.arange(3))], cache, CompiledAttention(), [Window()])
    for angles in (torch.zeros(1, 3, 8), torch.zeros(1, 3, 16, dtype=torch.bfloat16)):
        fused(torch.zeros(1, 3, 64), position_embeddings=(angles, angles), headstart=metadata)
    assert len(passed) == 2
