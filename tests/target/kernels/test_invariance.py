"""The numbers of rows for which a linear gives each row the same bits."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from headstart.target.kernels import invariance
from headstart.target.kernels.choice import _group
from headstart.target.kernels.invariance import Kind, RowRange, distinct, multiplies_by_itself, row_range, row_ranges, varying_sizes
from headstart.target.kernels.linear import pack_for, prepack
from headstart.target.kernels.onednn import OneDnnPack, joined, row_groups

pytestmark = pytest.mark.usefixtures("torch_kernels")


@pytest.fixture(autouse=True)
def measured_anew():
    """Drop measurements before and after each test."""
    invariance._measured.cache_clear()
    yield
    invariance._measured.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linears_have_a_range_of_rows(dtype):
    if not pack_for(dtype):
        pytest.skip("this torch or processor cannot pack linears")
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 2304), nn.Linear(2304, 64)).to(dtype)
    prepack(model)
    for rows in row_ranges(model.modules()).values():
        assert rows.least <= 2
        assert rows.most >= 16


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("make", [nn.Linear, lambda width, out: Conv1D(out, width)], ids=["linear", "transposed"])
def test_a_row_has_the_same_bits_among_any_number_of_rows_once_products_are_grouped(dtype, is_packed, make):
    """With numbers of rows that the measurement does not test, and sums that cancel."""
    linear = make(1000, 48).to(dtype)
    half = torch.randn(48, 500)
    weight = torch.cat([half, -half], 1).to(dtype)
    linear.weight.data = weight.T.contiguous() if isinstance(linear, Conv1D) else weight
    model = nn.Sequential(linear)
    if is_packed and not prepack(model):
        pytest.skip("this torch or processor cannot pack linears")
    _group(model, row_ranges(model.modules()))
    rows = torch.randn(700, 500).repeat(1, 2).to(dtype)
    expected = torch.cat([model(row[None, None])[0] for row in rows])
    for count in (2, 18, 29, 37, 77, 131, 250, 300, 700):
        assert torch.equal(model(rows[None, :count])[0], expected[:count]), count


def test_rows_are_grouped_within_the_range_and_joined_again():
    x = torch.randn(1, 37, 3)
    for least, most in [(1, 8), (5, 9), (8, 8), (16, 16), (40, 64)]:
        groups = row_groups(x, least, most)
        assert all(least <= len(group) <= most for group in groups)
        assert torch.equal(joined(groups, x), x)


def test_a_shape_is_tested_once():
    assert len(distinct([nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8), nn.ReLU()])) == 2


def plain_linear(width, dtype=torch.float32, num_out=8):
    return Kind(num_out, width, dtype, False)


def test_rows_that_depend_on_each_other_are_noticed(monkeypatch):
    monkeypatch.setattr(invariance.F, "linear", lambda x, weight, bias: x @ weight.T + (x.shape[1] in (1, 2, 7, 40)))
    assert varying_sizes(plain_linear(64), (1, 2, 7, 8, 16, 32, 40, 64)) == [1, 2, 7, 40]
    assert row_range([1, 2, 7, 40], (1, 2, 7, 8, 16, 32, 40, 64)) == RowRange(8, 32)


def test_rows_whose_bits_depend_on_their_index_have_no_range(monkeypatch):
    monkeypatch.setattr(invariance.F, "linear", lambda x, weight, bias: x @ weight.T + torch.arange(x.shape[1])[:, None] % 16)
    assert 16 in varying_sizes(plain_linear(64), (8, 16, 32))
    assert row_range([16], (8, 16, 32)) is None
    assert row_ranges([nn.Linear(64, 64)]) is None


def test_a_split_sum_is_noticed_in_bf16(monkeypatch):
    def split_if_alone(x, weight, bias):
        half = x.shape[-1] // 4 if x.shape[1] == 1 else x.shape[-1]
        product = x[..., :half].float() @ weight[:, :half].float().T
        return (product + x[..., half:].float() @ weight[:, half:].float().T).to(x.dtype)

    monkeypatch.setattr(invariance.F, "linear", split_if_alone)
    assert 1 in varying_sizes(plain_linear(1024, torch.bfloat16, 256), (1, 16, 64))


def test_a_shape_is_measured_once_in_a_process(monkeypatch):
    calls = []
    monkeypatch.setattr(invariance, "varying_sizes", lambda kind: calls.append(kind) or [])
    for _ in range(3):
        row_ranges([nn.Linear(64, 8), nn.Linear(64, 8)])
    assert calls == [Kind(8, 64, torch.float32, False, has_bias=True)]


def test_a_pack_keeps_its_products_within_the_range():
    model = nn.Sequential(nn.Linear(64, 32))
    if not prepack(model):
        pytest.skip("this torch or processor cannot pack linears")
    pack = model[0].pack
    assert isinstance(pack, OneDnnPack)
    _group(model, {Kind(32, 64, torch.float32, True, has_bias=True): RowRange(2, 5)})
    assert (pack.least_rows, pack.most_rows) == (2, 5)


def test_a_model_with_experts_is_never_called_invariant():
    config = MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_local_experts=4
    )
    model = MixtralForCausalLM(config)
    assert not any(map(multiplies_by_itself, model.model.layers[0].self_attn.modules()))
    assert row_ranges(model.modules()) is None
