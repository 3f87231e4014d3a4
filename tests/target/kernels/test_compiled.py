"""The compiled kernels: what they compute, and that a row's bits depend on that row only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from headstart.target.kernels.compiled import CompiledPack, compiled_mlp, compiled_norm
from headstart.target.kernels.library import library

LIBRARY = library()
pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason="there are no compiled kernels for this processor, or no compiler"),
    pytest.mark.usefixtures("level"),
]
DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = [("swish", F.silu), ("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def close(actual, expected, dtype):
    return float((actual.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    num_in=st.integers(1, 300),
    rows=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_a_product_is_that_of_fp64(sizes, num_in, rows, dtype, seed):
    torch.manual_seed(seed)
    weights, x = [torch.randn(size, num_in).to(dtype) for size in sizes], torch.randn(rows, num_in).to(dtype)
    biases = [torch.randn(size).to(dtype) if i % 2 == 0 else None for i, size in enumerate(sizes)]
    pack = CompiledPack(weights, biases)
    expected = x.double() @ torch.cat(weights).double().T + pack.bias.double()
    assert close(pack(x), expected, dtype)
    assert all(torch.equal(pack.dense(member), weight) for member, weight in enumerate(weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), [(1000, 48), (288, 768), (2048, 64)])
def test_a_row_has_the_same_bits_among_any_number_of_rows_and_threads(dtype, num_in, num_out):
    """Sums that cancel to their rounding errors, so that another order of addition shows."""
    half = torch.randn(num_out, num_in // 2)
    pack = CompiledPack([torch.cat([half, -half], 1).to(dtype)], [None])
    rows = torch.randn(300, num_in // 2).repeat(1, 2).to(dtype)
    alone = torch.cat([pack(row[None]) for row in rows])
    for threads in (1, 2, 5):
        LIBRARY._set_threads(threads)
        for count in (2, 5, 16, 17, 31, 64, 257, 300):
            assert torch.equal(pack(rows[:count]), alone[:count]), (threads, count)
    assert torch.equal(pack(rows.flip(0)).flip(0), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "function"), ACTIVATIONS)
def test_a_gated_mlp_is_that_of_fp64(dtype, name, function):
    gate, up, down, x = (torch.randn(*size).to(dtype) for size in [(112, 64), (112, 64), (64, 112), (5, 64)])
    gate_bias, up_bias = torch.randn(112).to(dtype), torch.randn(112).to(dtype)
    both = CompiledPack([gate, up], [gate_bias, up_bias], name)
    between = function(x.double() @ gate.double().T + gate_bias.double()) * (x.double() @ up.double().T + up_bias.double())
    assert close(both(x), between, dtype)
    assert close(compiled_mlp(both, CompiledPack([down], [None]), x), between.to(dtype).double() @ down.double().T, dtype)
    assert torch.equal(both.dense(0), gate)
    assert torch.equal(both.dense(1), up)


@pytest.mark.parametrize(("name", "function"), ACTIVATIONS)
def test_activations_are_right_far_from_zero(name, function):
    """The gate is x itself, and the value is 1."""
    values = torch.tensor([-1e4, -100.0, -20.0, -3.0, -1e-3, -0.0, 1e-6, 1e-3, 0.5, 3.0, 20.0, 100.0, 1e4])
    pack = CompiledPack([torch.eye(1), torch.zeros(1, 1)], [None, torch.ones(1)], name)
    torch.testing.assert_close(pack(values[:, None])[:, 0], function(values.double()).float(), rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 64, 288, 2048])
def test_a_norm_is_that_of_fp64_in_any_number_of_rows(dtype, width):
    x, weight = torch.randn(70, width).to(dtype), torch.rand(width) + 0.5
    expected = F.rms_norm(x.double(), [width], weight.double(), 1e-6)
    assert close(compiled_norm(x, weight, 1e-6), expected, dtype)
    assert torch.equal(torch.cat([compiled_norm(row[None], weight, 1e-6) for row in x]), compiled_norm(x, weight, 1e-6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_comes_out_where_torch_has_it(dtype, bad):
    """One bad value in one of the rows; each output of that row, and no other, reads it."""
    weight, x = torch.randn(70, 40).to(dtype), torch.randn(20, 40).to(dtype)
    x[7, 33] = bad
    y, expected = CompiledPack([weight], [None])(x), F.linear(x, weight)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isnan(), expected.isnan())
    norm, expected = compiled_norm(x, torch.ones(40), 1e-6), F.rms_norm(x, [40], torch.ones(40).to(dtype), 1e-6)
    assert torch.equal(norm.isfinite(), expected.isfinite())


@pytest.mark.parametrize(("name", "function"), ACTIVATIONS)
def test_activations_are_right_where_floats_end(name, function):
    values, zeros = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, -3e38, 88.5, -88.5, 1e-40]), torch.zeros(8, 1)
    pack = CompiledPack([zeros, zeros], [values, torch.ones(8)], name)
    torch.testing.assert_close(pack(torch.ones(1)), function(values.double()).float(), rtol=1e-6, atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(dtype):
    pack, gated = (
        CompiledPack([torch.randn(8, 16).to(dtype)], [None]),
        CompiledPack([torch.randn(8, 8).to(dtype)] * 2, [None] * 2, "gelu"),
    )
    x = torch.empty(0, 16, dtype=dtype)
    assert compiled_mlp(gated, CompiledPack([torch.randn(8, 8).to(dtype)], [None]), pack(x)).shape == (0, 8)
    assert compiled_norm(x, torch.ones(16), 1e-6).shape == (0, 16)


def test_wrong_inputs_are_refused():
    pack = CompiledPack([torch.randn(8, 16)], [None])
    with pytest.raises(ValueError, match=r"of 16 inputs in torch.float32 on the CPU got 15"):
        pack(torch.randn(2, 15))
    with pytest.raises(ValueError, match=r"got 16 in torch.bfloat16"):
        pack(torch.randn(2, 16).bfloat16())
    with pytest.raises(ValueError, match="no gradients"):
        pack(torch.randn(2, 16, requires_grad=True))
    with pytest.raises(ValueError, match="an RMS norm of 16 values on the CPU got 15 on cpu"):
        compiled_norm(torch.randn(2, 15), torch.ones(16), 1e-6)


def test_rows_that_are_not_contiguous_are_read_right():
    pack, x = CompiledPack([torch.randn(8, 16)], [None]), torch.randn(16, 6).T
    torch.testing.assert_close(pack(x), F.linear(x, pack.dense(0)))
