"""Exact attention gives the same bits wherever a node's ancestors are stored; `reference_attention` is the reference for values."""

import random

import pytest
import torch

from headstart.target.attention import AttentionParams, reference_attention
from headstart.target.kernels import attention
from headstart.target.kernels.attention import is_order_proof, ordered, wide
from headstart.target.row_mask import RowMask, Window

SHAPES = [
    (4, 4, 64),
    (8, 2, 32),
    (4, 2, 128),
    (4, 1, 64),
    (3, 1, 80),
]  # heads, kv_heads, width; the last two have one key-value head


def random_tree(rng: random.Random, size: int) -> tuple[list[int], list[int]]:
    """Parents (-1: none) and depths."""
    parents = [-1] + [rng.randint(max(0, node - 4), node - 1) for node in range(1, size)]
    depths = [0] * size
    for node in range(1, size):
        depths[node] = depths[parents[node]] + 1
    return parents, depths


def tree_mask(parents: list[int]) -> torch.Tensor:
    """[nodes, nodes] bool: each node sees itself and its ancestors."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node in range(1, len(parents)):
        mask[node] |= mask[parents[node]]
    return mask


def outputs_of_last_node(kernel, shape, dtype, params, committed, parents, depths, seed):
    """The output of a tree's last node: in the tree, alone behind its committed ancestors, and at the end of a long stem."""
    heads, kv_heads, width = shape
    size, generator = len(parents), torch.Generator().manual_seed(seed)
    query, keys, values = (
        torch.randn(count, committed + size, width, generator=generator).to(dtype) for count in (heads, kv_heads, kv_heads)
    )
    mask, positions = tree_mask(parents), torch.tensor(depths) + committed
    node = size - 1
    path = [*range(committed), *(committed + mask[node].nonzero()[:, 0]).tolist()]
    last = len(path) - 1
    tree = RowMask(0, size, 0, committed, mask, positions)
    alone = RowMask(0, 1, 0, last, None, positions[-1:])
    stem = RowMask(0, last + 1, 0, 0, None, torch.arange(last + 1))
    return (
        kernel(query[:, committed:], keys, values, tree, params)[:, node],
        kernel(query[:, path[-1:]], keys[:, path], values[:, path], alone, params)[:, 0],
        kernel(query[:, path], keys[:, path], values[:, path], stem, params)[:, -1],
    )


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_node_has_the_same_bits_in_a_tree_alone_and_in_a_prompt(shape, dtype):
    if not is_order_proof(*shape, shape[2], dtype):
        pytest.skip("this machine's matrix library adds in another order")
    rng = random.Random(1)
    for seed in range(12):
        parents, depths = random_tree(rng, rng.randint(1, 20))
        params = AttentionParams(shape[2] ** -0.5, Window(sliding=rng.choice([None, 50])), rng.choice([None, 20.0]))
        drafted, alone, in_stem = outputs_of_last_node(ordered, shape, dtype, params, rng.randint(0, 280), parents, depths, seed)
        assert torch.equal(drafted, alone)
        assert torch.equal(alone, in_stem)


@torch.inference_mode()
def test_a_tree_too_large_for_one_product_keeps_its_bits():
    if not is_order_proof(4, 2, 64, 64, torch.float32):
        pytest.skip("this machine's matrix library adds in another order")
    parents, depths = random_tree(random.Random(2), 300)
    drafted, alone, in_stem = outputs_of_last_node(
        ordered, (4, 2, 64), torch.float32, AttentionParams(0.1, Window()), 100, parents, depths, 0
    )
    assert torch.equal(drafted, alone)
    assert torch.equal(alone, in_stem)


@torch.inference_mode()
@pytest.mark.parametrize("kernel", [ordered, wide])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [Window(), Window(sliding=7), Window(chunk=16)])
def test_exact_kernels_equal_the_reference(kernel, softcap, sinks, window):
    parents, depths = random_tree(random.Random(3), 12)
    query, keys, values = torch.randn(6, 12, 32), torch.randn(2, 142, 32), torch.randn(2, 142, 48)
    row_mask = RowMask(0, 12, 0, 130, tree_mask(parents), torch.tensor(depths) + 130)
    params = AttentionParams(0.2, window, softcap, torch.randn(6) if sinks else None)
    expected = reference_attention(query, keys, values, row_mask, params)
    torch.testing.assert_close(kernel(query, keys, values, row_mask, params), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_measurement_sees_differences_that_rounding_to_bf16_would_hide(monkeypatch):
    """A difference in fp32 shows somewhere in a model; an output in bf16 hides most of it."""
    weighted_sum = attention._weighted_sum

    def noisy(weights, values, row_mask):
        return weighted_sum(weights, values, row_mask) * (1 + 2**-20 * (row_mask.nodes > 1))

    monkeypatch.setattr(attention, "_weighted_sum", noisy)
    assert not is_order_proof(4, 4, 64, 64, torch.bfloat16)


@torch.inference_mode()
def test_the_measurement_notices_another_order_of_addition(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 10**6)  # one product over everything, which the library may split
    monkeypatch.setattr(attention, "MAX_SLOTS", 10**6)
    monkeypatch.setattr(attention, "MIN_ROWS", 1)
    monkeypatch.setattr(attention, "MIN_WORK", 1)
    assert not is_order_proof(4, 4, 64, 64, torch.float32)
