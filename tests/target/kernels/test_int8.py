"""Weights rounded to int8: the products are those of the rounded weights, a row's bits depend on that row only, and who may ask."""

import pytest
import torch
from command_line import run
from tiny import ARCHITECTURES, random_model
from torch.nn import functional as F

import headstart
from headstart.engine.drafter_loading import make
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.target.kernels.compiled import CompiledPack, compiled_mlp
from headstart.target.kernels.library import library
from headstart.target.kernels.linear import PackedLinear, prepack, quantise
from headstart.target.target import Target

LIBRARY = library()
HAS_INT8 = LIBRARY is not None and LIBRARY.level != "avx512"
pytestmark = pytest.mark.skipif(not HAS_INT8, reason="this processor has no int8 products, or there is no compiler")


@pytest.fixture
def int8_level(level):
    """Each set of instructions that has int8 products."""
    if level == "avx512":
        pytest.skip("avx512 alone has no int8 products")


def rounded(weight):
    """The weight after rounding, in fp64: multiples of a 127th of the largest value of each output."""
    factor = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / factor).round().double() * factor.double()


def int8_pack(weights, biases, activation=""):
    pack = CompiledPack(weights, biases, activation)
    pack.quantise()
    return pack


def assert_close(actual, expected):
    """Within 1e-4 of the largest value of the row, and the rounding of the output to bf16."""
    limit = 1e-4 * expected.abs().amax(1, keepdim=True) + 2**-8 * expected.abs()
    assert bool(((actual.double() - expected).abs() <= limit).all())


def spread(rows, width):
    """Rows of very different sizes."""
    x = torch.randn(rows, width) * torch.logspace(-6, 6, rows)[:, None]
    return x.bfloat16()


@pytest.mark.usefixtures("int8_level")
@pytest.mark.parametrize(
    ("rows", "num_in", "sizes"), [(1, 64, [64]), (3, 65, [1]), (17, 300, [50, 30]), (40, 1000, [96, 16]), (260, 63, [70])]
)
def test_a_product_is_that_of_the_rounded_weights(rows, num_in, sizes):
    torch.manual_seed(rows)
    weights, x = [torch.randn(size, num_in).bfloat16() for size in sizes], spread(rows, num_in)
    pack = int8_pack(weights, [None] * len(sizes))
    assert_close(pack(x), x.double() @ rounded(torch.cat(weights)).T)
    for member, weight in enumerate(weights):
        assert torch.equal(pack.dense(member), rounded(weight).bfloat16())


@pytest.mark.usefixtures("int8_level")
def test_the_bias_is_added_and_rounding_twice_changes_nothing():
    weight, bias, x = torch.randn(70, 96).bfloat16(), torch.randn(70).bfloat16(), torch.randn(5, 96).bfloat16()
    pack = int8_pack([weight], [bias])
    y = pack(x)
    assert_close(y, x.double() @ rounded(weight).T + bias.double())
    pack.quantise()
    assert torch.equal(pack(x), y)


@pytest.mark.usefixtures("int8_level")
def test_a_row_has_the_same_bits_alone_and_in_a_crowd():
    pack, rows = int8_pack([torch.randn(200, 500).bfloat16()], [None]), spread(300, 500)
    alone = torch.cat([pack(row[None]) for row in rows])
    for threads in (1, 2, 5):
        LIBRARY._set_threads(threads)
        for count in (2, 3, 8, 16, 33, 257, 300):
            assert torch.equal(pack(rows[:count]), alone[:count]), (threads, count)
    assert torch.equal(pack(rows.flip(0)).flip(0), alone)


@pytest.mark.usefixtures("int8_level")
def test_a_gated_mlp_is_that_of_the_rounded_weights():
    gate, up, down, x = (torch.randn(*size).bfloat16() for size in [(112, 64), (112, 64), (64, 112), (9, 64)])
    both, last = int8_pack([gate, up], [None, None], "swish"), int8_pack([down], [None])
    between = F.silu(x.double() @ rounded(gate).T) * (x.double() @ rounded(up).T)
    largest = between.abs().amax(1, keepdim=True)
    assert bool(((both(x).double() - between).abs() <= 1e-3 * largest + 2**-8 * between.abs()).all())
    assert_close(compiled_mlp(both, last, x), both(x).double() @ rounded(down).T)


@pytest.mark.usefixtures("int8_level")
def test_a_row_of_zeros_gives_zeros_and_what_is_not_finite_gives_nan():
    pack, x = int8_pack([torch.randn(70, 96).bfloat16()], [None]), torch.randn(6, 96).bfloat16()
    x[1], x[2, 5], x[3, 95], x[4, 0], x[5] = 0.0, float("nan"), float("inf"), -float("inf"), 1e-38
    y = pack(x)
    assert y[0].isfinite().all()
    assert not y[1].any()
    assert y[2:5].isnan().all()
    assert float(y[5].abs().max()) < 1e-36


def model_folder_in(dtype, folder, name="llama"):
    random_model(ARCHITECTURES[name](), dtype).save_pretrained(folder)
    return folder


def answers(target, drafter, temperature):
    """Tokens and log-probabilities of three prompts."""
    engine = Engine(target, drafter, max_rows=3)
    params = SamplingParams(max_tokens=24, temperature=temperature, logprobs=0, ignore_eos=True)
    requests = [engine.add(prompt, params, seed=index) for index, prompt in enumerate([[5, 9, 3] * 4, [7], list(range(2, 40))])]
    for _ in engine.run():
        pass
    return [(request.output, request.logprobs) for request in requests]


def test_drafted_text_equals_plain_text_to_the_bit(tmp_path):
    folder = model_folder_in(torch.bfloat16, tmp_path)
    target = Target.load(folder, device="cpu", weights="int8")
    stored = Target.load(folder, device="cpu")
    assert target.is_exact, target
    for temperature in (0.0, 0.8):
        plain = answers(target, None, temperature)
        assert answers(target, make("lookup", target), temperature) == plain
        assert plain != answers(stored, None, temperature)  # the weights are rounded


def test_the_weights_are_rounded_once_however_often_kernels_are_chosen(tmp_path):
    target = Target.load(model_folder_in(torch.bfloat16, tmp_path), device="cpu", weights="int8")
    expected = answers(target, None, 0.0)
    target.choose_kernels(weights="int8")
    assert answers(target, None, 0.0) == expected


@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [
        ("llama", torch.float32, "is for models in bfloat16; give dtype='bfloat16' too"),
        ("mixtral", torch.bfloat16, "such as experts"),
    ],
)
def test_a_model_that_cannot_have_them_is_refused(tmp_path, name, dtype, why):
    with pytest.raises(ValueError, match=rf"^weights='int8' .*{why}"):
        Target.load(model_folder_in(dtype, tmp_path, name), device="cpu", weights="int8")


def test_a_processor_that_cannot_have_them_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).bfloat16()
    prepack(model)
    assert isinstance(model[0], PackedLinear)
    try:
        library().use("avx512")
        with pytest.raises(ValueError, match=r"^weights='int8' needs the compiled kernels and a processor with AVX-512 and bf16$"):
            quantise(model)
    finally:
        library().use(None)


def test_a_processor_without_compiled_kernels_is_refused(tmp_path, torch_kernels):
    with pytest.raises(ValueError, match=r"^weights='int8' needs the compiled kernels"):
        Target.load(model_folder_in(torch.bfloat16, tmp_path), device="cpu", weights="int8")


def test_a_model_object_and_another_word_are_refused(model_folder):
    with pytest.raises(ValueError, match=r"^weights='int8' would change the model object .*; load it from its folder instead$"):
        headstart.load(random_model(ARCHITECTURES["llama"](), torch.bfloat16), weights="int8")
    with pytest.raises(ValueError, match=r"^weights is 'int4'; it must be 'stored' or 'int8'$"):
        headstart.load(model_folder, device="cpu", weights="int4")


def test_the_flag_of_the_command_line_reaches_the_target(model_folder):
    """int8 is for bf16, so the refusal of fp32 shows that the flag arrived; without it, the same command answers."""
    same = ("generate", "the cat", "--model", model_folder, "--device", "cpu", "--drafter", "none", "--max-tokens", 3)
    assert run(*same, "--dtype", "float32").exit_code == 0
    refused = run(*same, "--dtype", "float32", "--weights", "int8")
    assert "weights='int8' is for models in bfloat16; give dtype='bfloat16' too" in refused.stderr
    assert run(*same, "--dtype", "bfloat16", "--weights", "int8").exit_code == 0
