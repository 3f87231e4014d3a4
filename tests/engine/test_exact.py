"""On a CPU bit-exactness is the default wherever it is possible, and the target names what prevents it."""

import time
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny import ARCHITECTURES, random_model

import headstart
from headstart.engine.drafter_loading import heads_in, make
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.target import target as target_module
from headstart.target.kernels import choice
from headstart.target.kernels.attention import ordered, wide
from headstart.target.kernels.library import library
from headstart.target.loading import load_model
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.tokenizer import encode_prompt

ROOT = Path(headstart.__file__).parent / "embedded"
MODELS = Path(__file__).parents[3] / "shared" / "models"  # beside the checkout of those who have it
# The folders of heads that come with it.
HEADS = sorted(folder.name for folder in ROOT.iterdir() if (folder / "plan.json").is_file()) if ROOT.is_dir() else []
HAS_ALL = len(HEADS) >= 5 or not ROOT.is_dir()
PROMPTS = ["Once upon a time, there was a little girl named Lily.", "Tom had a big red ball. One day, he", "The cat"]
TEMPERATURES = (0.0, 0.7, 1.0)
DTYPES = [torch.float32, torch.bfloat16]


def answers(target, drafter, prompts, temperature, max_rows=1, chunk=256, tokens=8):
    """Tokens and log-probabilities of every request."""
    engine = Engine(target, drafter, max_rows=max_rows, chunk=chunk)
    params = SamplingParams(max_tokens=tokens, temperature=temperature, logprobs=0, ignore_eos=True)
    requests = [engine.add(prompt, params, seed=7 + index) for index, prompt in enumerate(prompts)]
    for _ in engine.run():
        pass
    return [(request.output, request.logprobs) for request in requests]


@pytest.fixture(scope="module", params=[torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def embedded(request):
    """The default target, prompts, and the answers of plain decoding at each temperature."""
    if not (ROOT / "target" / "config.json").is_file():
        pytest.skip("this checkout has no embedded model")
    llm = headstart.load(dtype=request.param, device="cpu", drafter=None)
    target, prompts = llm.engine.target, [encode_prompt(llm.tokenizer, prompt) for prompt in PROMPTS]
    return target, prompts, {temperature: answers(target, None, prompts, temperature) for temperature in TEMPERATURES}


def test_with_compiled_kernels_the_number_of_threads_may_change_while_an_answer_is_made(embedded):
    """Nothing that is chosen again changes a bit: the same seed repeats an answer on any number of threads."""
    target, prompts, plain = embedded
    if not target.kernel_choice.is_compiled:
        pytest.skip("torch's kernels are exact for one number of threads")
    before = torch.get_num_threads()
    engine = Engine(target, make("mtp", target), max_rows=3)
    params = SamplingParams(max_tokens=8, temperature=0.7, logprobs=0, ignore_eos=True)
    requests = [engine.add(prompt, params, seed=7 + index) for index, prompt in enumerate(prompts)]
    try:
        for threads in (1, 2, 3, 1, 2, 4, *[2] * 20):
            torch.set_num_threads(threads)
            engine.step()
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert engine.is_idle
    assert [(request.output, request.logprobs) for request in requests] == plain[0.7]


@pytest.mark.parametrize("name", ["lookup", "model", *HEADS])
def test_by_default_every_drafter_of_the_embedded_model_keeps_every_bit(embedded, name):
    """Tokens and log-probabilities, of one row and of several at once, with prompts cut at other positions."""
    target, prompts, plain = embedded
    assert HAS_ALL, HEADS
    assert target.is_exact, target
    spec = f"model:{ROOT / 'draft'}" if name == "model" else name
    for temperature, max_rows, chunk in ((0.0, 3, 16), (0.7, 3, 16), (1.0, 3, 16), (0.7, 1, 256)):
        drafter = heads_in(ROOT / name, target) if name in HEADS else make(spec, target)
        actual = answers(target, drafter, prompts, temperature, max_rows, chunk)
        assert actual == plain[temperature], (temperature, max_rows)


def test_load_is_exact_by_default(model_folder):
    llm = headstart.load(model_folder, device="cpu")
    assert llm.engine.target.is_exact, llm.engine.target
    plain = headstart.load(model_folder, device="cpu", drafter=None)
    for temperature in TEMPERATURES:
        settings = {"max_tokens": 24, "temperature": temperature, "seed": 3, "logprobs": 0, "ignore_eos": True}
        actual, expected = (one.generate(["the cat", "one two"], **settings) for one in (llm, plain))
        assert [(a.token_ids, a.logprobs) for a in actual] == [(a.token_ids, a.logprobs) for a in expected]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["stories260K", "babyllama105", "talk13M"])
def test_by_default_a_trained_model_keeps_every_bit(name, dtype):
    if not (MODELS / name / "config.json").is_file():
        pytest.skip(f"{name} is not beside this checkout")
    target, tokenizer = Target.load(MODELS / name, dtype=dtype, device="cpu"), load_tokenizer(MODELS / name)
    assert target.is_exact, target
    prompts = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    draft = f"model:{MODELS / 'talk13M-draft'}" if name == "talk13M" else f"model:{MODELS / name}"
    for temperature in TEMPERATURES:
        plain = answers(target, None, prompts, temperature, tokens=20)
        for drafter in ("lookup", draft):
            for max_rows, chunk in ((1, 256), (3, 9)):
                actual = answers(target, make(drafter, target), prompts, temperature, max_rows, chunk, tokens=20)
                assert actual == plain, (temperature, drafter, max_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_prompt_is_cut_changes_no_bit(dtype):
    """Requests share the prompt tokens of a round, so the load decides where one is cut: here nowhere, and into several sizes."""
    target = Target(random_model(hf.LlamaConfig(**SHAPE), dtype), check=False)
    target.choose_kernels(True)
    prompts = [torch.randint(0, 97, (size,), generator=torch.Generator().manual_seed(size)).tolist() for size in (300, 131)]
    expected = answers(target, None, prompts, 0.7, tokens=3)
    for max_rows, chunk in ((1, 512), (2, 512), (2, 200), (2, 37)):
        assert answers(target, None, prompts, 0.7, max_rows, chunk, tokens=3) == expected, (max_rows, chunk)


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 192,
    "intermediate_size": 896,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
}


def test_the_choice_reads_no_clock(model_folder, monkeypatch):
    """Whether a model is exact does not depend on time measurements."""
    model = load_model(model_folder, torch.float32, "cpu")

    def forbidden(*_):
        raise AssertionError("the choice of kernels must not depend on time")

    for clock in ("time", "perf_counter", "process_time", "thread_time", "monotonic", "perf_counter_ns", "thread_time_ns"):
        monkeypatch.setattr(time, clock, forbidden)
    target = Target(model)
    target.choose_kernels()
    first = target.kernel_choice
    target.choose_kernels()
    assert first == target.kernel_choice
    assert target.is_exact


def test_attention_is_ordered_where_the_order_is_proven_else_in_fp64(monkeypatch, torch_kernels):
    model = random_model(ARCHITECTURES["llama"](), torch.float32)
    for is_proof, kernel in ((True, ordered), (False, wide)):
        choice._is_order_proof.cache_clear()
        monkeypatch.setattr(choice, "is_order_proof", lambda *_, answer=is_proof: answer)
        target = Target(model, check=False)
        target.choose_kernels()
        assert target.kernel is kernel
        assert target.is_exact
    choice._is_order_proof.cache_clear()


def test_a_model_that_fails_with_ordered_attention_runs_in_fp64(monkeypatch, torch_kernels):
    """The order of addition was proven for the shapes, but the model as a whole is not exact: the other kernel is tried."""
    monkeypatch.setattr(target_module, "holds_to_the_bit", lambda target: target.kernel is wide)
    target = Target(random_model(ARCHITECTURES["llama"](), torch.float32), check=False)
    target.choose_kernels()
    assert target.kernel is wide
    assert target.kernel_choice.kernel is wide
    assert target.is_exact


@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [("mixtral", torch.float32, "experts of this model"), ("llama", torch.float64, "float64 on cpu")],
)
def test_the_target_names_what_prevents_exactness(name, dtype, why):
    target = Target(random_model(ARCHITECTURES[name](), dtype))
    target.choose_kernels()
    assert not target.is_exact
    assert why in target.kernel_choice.why_not
    assert why in repr(target)
    with pytest.raises(ValueError, match=rf"exact=True is not available: .*{why}"):
        target.choose_kernels(True)
    target.choose_kernels(False)
    assert "exact=False was asked for" in repr(target)


# -- inside transformers ----------------------------------------------------------------------------------------------------

PROMPT = torch.tensor([[5, 9, 3, 5, 9, 3, 5]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_inside_generate_any_drafter_gives_the_same_tokens_without_packing_the_model(name, dtype):
    model = random_model(ARCHITECTURES[name](), dtype)
    kinds = [type(module) for module in model.modules()]
    before = model(PROMPT).logits
    outputs = []
    for drafter in (None, "lookup"):
        for ids in (PROMPT, PROMPT.repeat(3, 1)):
            torch.manual_seed(5)
            settings = {"max_new_tokens": 30, "do_sample": True, "custom_generate": headstart.custom_generate, "exact": True}
            outputs.append(model.generate(ids, drafter=drafter, **settings)[0])
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert [type(module) for module in model.modules()] == kinds
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(PROMPT).logits, before)


def test_inside_generate_impossible_exactness_is_an_error_only_where_it_was_demanded():
    model = random_model(ARCHITECTURES["mixtral"](), torch.float32)
    expected = model.generate(PROMPT, max_new_tokens=8)
    for exact in ("auto", False):
        ours = model.generate(PROMPT, max_new_tokens=8, custom_generate=headstart.custom_generate, exact=exact)
        assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match=r"exact=True is not available: .*experts"):
        model.generate(PROMPT, max_new_tokens=8, custom_generate=headstart.custom_generate, exact=True)
    with pytest.raises(ValueError, match="exact is 'always'"):
        model.generate(PROMPT, max_new_tokens=8, custom_generate=headstart.custom_generate, exact="always")
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8), expected)


@pytest.mark.skipif(library() is None, reason="there are no compiled kernels for this processor, or no compiler")
@pytest.mark.parametrize(("name", "exact"), [("llama", "auto"), ("llama", False), ("mixtral", "auto")])
def test_a_target_names_the_instructions_of_its_kernels_whether_exact_or_not(name, exact):
    target = Target(random_model(ARCHITECTURES[name](), torch.float32))
    assert target.instructions is None
    target.choose_kernels(exact)
    assert target.instructions == library().level
    assert f"on cpu, {library().level} kernels" in repr(target)
