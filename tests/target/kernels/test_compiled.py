"""The compiled kernels: what they compute, and that a row's bits depend on that row only."""

import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from headstart.target.kernels import compiled
from headstart.target.kernels.compiled import SWITCH, CompiledPack, compiled_mlp, compiled_norm, huge_pages, library
from headstart.target.kernels.cpp import build

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there are no compiled kernels for this processor, or no compiler")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=["amx", "avx512_bf16", "avx512"], autouse=True)
def level(request):
    """Each set of instructions that this processor has."""
    try:
        yield LIBRARY.use(request.param)
    except OSError:
        pytest.skip(f"this processor does not have {request.param}")
    finally:
        LIBRARY.use(None)


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
@pytest.mark.parametrize(
    ("name", "function"),
    [("swish", F.silu), ("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))],
)
def test_a_gated_mlp_is_that_of_fp64(dtype, name, function):
    gate, up, down, x = (torch.randn(*size).to(dtype) for size in [(112, 64), (112, 64), (64, 112), (5, 64)])
    gate_bias, up_bias = torch.randn(112).to(dtype), torch.randn(112).to(dtype)
    both = CompiledPack([gate, up], [gate_bias, up_bias], name)
    between = function(x.double() @ gate.double().T + gate_bias.double()) * (x.double() @ up.double().T + up_bias.double())
    assert close(both(x), between, dtype)
    assert close(compiled_mlp(both, CompiledPack([down], [None]), x), between.to(dtype).double() @ down.double().T, dtype)
    assert torch.equal(both.dense(0), gate)
    assert torch.equal(both.dense(1), up)


@pytest.mark.parametrize("name", ["swish", "gelu", "gelu_tanh"])
def test_activations_are_right_far_from_zero(name):
    """The gate is x itself, and the value is 1."""
    values = torch.tensor([-1e4, -100.0, -20.0, -3.0, -1e-3, -0.0, 1e-6, 1e-3, 0.5, 3.0, 20.0, 100.0, 1e4])
    function = {"swish": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[name]
    pack = CompiledPack([torch.eye(1), torch.zeros(1, 1)], [None, torch.ones(1)], name)
    torch.testing.assert_close(pack(values[:, None])[:, 0], function(values.double()).float(), rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 64, 288, 2048])
def test_a_norm_is_that_of_fp64_in_any_number_of_rows(dtype, width):
    x, weight = torch.randn(70, width).to(dtype), torch.rand(width) + 0.5
    expected = F.rms_norm(x.double(), [width], weight.double(), 1e-6)
    assert close(compiled_norm(x, weight, 1e-6), expected, dtype)
    assert torch.equal(torch.cat([compiled_norm(row[None], weight, 1e-6) for row in x]), compiled_norm(x, weight, 1e-6))


def test_wrong_inputs_are_refused():
    pack = CompiledPack([torch.randn(8, 16)], [None])
    with pytest.raises(ValueError, match=r"of 16 inputs in torch.float32 on the CPU got 15"):
        pack(torch.randn(2, 15))
    with pytest.raises(ValueError, match=r"got 16 in torch.bfloat16"):
        pack(torch.randn(2, 16).bfloat16())
    with pytest.raises(ValueError, match="no gradients"):
        pack(torch.randn(2, 16, requires_grad=True))


def test_rows_that_are_not_contiguous_are_read_right():
    pack, x = CompiledPack([torch.randn(8, 16)], [None]), torch.randn(16, 6).T
    torch.testing.assert_close(pack(x), F.linear(x, pack.dense(0)))


def test_threads_that_call_at_once_do_not_disturb_each_other():
    LIBRARY._set_threads(3)
    pack, inputs = CompiledPack([torch.randn(640, 320)], [None]), [torch.randn(n, 320) for n in (1, 3, 16, 40)]
    expected, wrong = [pack(x) for x in inputs], []

    def work(x, y):
        wrong.extend(1 for _ in range(200) if not torch.equal(pack(x), y))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_multiplies_too():
    LIBRARY._set_threads(2)
    pack, x = CompiledPack([torch.randn(640, 320)], [None]), torch.randn(4, 320)
    expected = pack(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(pack(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_torch_has_one_thread_while_the_library_works():
    before = torch.get_num_threads()
    with LIBRARY.working():
        assert torch.get_num_threads() == 1
        with LIBRARY.working():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), LIBRARY.working():
        raise KeyError
    assert torch.get_num_threads() == before


def test_memory_of_huge_pages_is_zero_and_not_shared():
    blocks = [huge_pages(count, torch.float32) for count in (5, 1000, 2**23, 7)]
    for number, block in enumerate(blocks):
        assert not block.any()
        block.fill_(number + 1)
    assert all(bool((block == number + 1).all()) for number, block in enumerate(blocks))


def test_the_library_belongs_to_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "level.cpp").write_text("one")
    name = build.file_name()
    (tmp_path / "level.cpp").write_text("other")
    assert build.file_name() != name


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with pytest.raises(OSError, match="no C\\+\\+ compiler; install one, or name it in the environment variable CXX"):
        build.build(tmp_path)


def test_a_level_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv(SWITCH, "mmx")
    library.cache_clear()
    with pytest.raises(ValueError, match="HEADSTART_KERNELS is 'mmx', but this processor does not have mmx"):
        library()
    monkeypatch.delenv(SWITCH)
    library.cache_clear()


def test_the_switch_leaves_the_library_out(monkeypatch):
    monkeypatch.setenv(SWITCH, "torch")
    library.cache_clear()
    assert library() is None
    assert isinstance(compiled.working().__enter__(), type(None))
    assert nn.Linear(2, 2)(torch.ones(2)).shape == (2,)
    monkeypatch.delenv(SWITCH)
    library.cache_clear()
