"""A model that targets hold generates as before for its owner, and is given back with every bit as it was."""

import gc
import weakref

import pytest
import torch
import transformers as hf
from small_trees import STEMS, score
from tiny import ARCHITECTURES, random_model

import headstart
from headstart.target.kernels.linear import PackedLinear, pack_for
from headstart.target.kernels.restore import StandIn
from headstart.target.target import Target

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if pack_for(dtype)]
needs_packing = pytest.mark.skipif(not DTYPES, reason="this torch or processor cannot pack linears")
KINDS = [
    "llama",
    "qwen2",
    "gpt2",
    "gemma2",
    "opt",
]  # together: biases, transposed and tied weights, norms that add one to the weight

PROMPTS = torch.tensor([[0, 0, 5, 17, 3], [44, 90, 12, 8, 61]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def model_of(name="llama", dtype=torch.float32, **changes):
    config = ARCHITECTURES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return random_model(config, dtype)


def own_answer(model):
    return model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=12, do_sample=False)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        assert torch.equal(actual[name].view(torch.uint8), value.view(torch.uint8)), name


@needs_packing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_released_model_has_every_weight_as_before(name, dtype):
    model = model_of(name, dtype)
    before, kinds = bits(model), [type(module) for module in model.modules()]
    parameters = [(name, weight.shape, weight.stride(), weight.requires_grad) for name, weight in model.named_parameters()]
    target = Target(model)
    target.choose_kernels(False)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert target.release() is model
    assert_same_bits(model.state_dict(), before)
    assert [type(module) for module in model.modules()] == kinds
    restored = [(name, weight.shape, weight.stride(), weight.requires_grad) for name, weight in model.named_parameters()]
    assert restored == parameters
    target.release()
    assert_same_bits(model.state_dict(), before)


@pytest.mark.parametrize(("name", "implementation"), [("llama", "eager"), ("mistral", "sdpa"), ("gpt2", "sdpa")])
def test_a_models_own_generate_gives_the_same_before_while_and_after_it_is_held(name, implementation):
    model = model_of(name, torch.float64)
    if implementation == "eager":
        model.set_attn_implementation("eager")
    own = model.config._attn_implementation
    before = own_answer(model)
    target = Target(model)
    assert torch.equal(own_answer(model), before)
    score(target, STEMS)
    assert torch.equal(own_answer(model), before)
    assert model.config._attn_implementation == own
    target.release()
    assert torch.equal(own_answer(model), before)


@needs_packing
def test_a_model_generates_with_packed_weights_too():
    model = model_of()
    before = own_answer(model)
    target = Target(model)
    target.choose_kernels(False)
    assert torch.equal(own_answer(model), before)
    target.release()
    assert torch.equal(own_answer(model), before)


def test_the_owner_may_choose_another_attention_while_the_model_is_held():
    model = model_of(dtype=torch.float64)
    target = Target(model)
    expected = score(target, STEMS).logits
    model.set_attn_implementation("eager")
    assert torch.equal(score(target, STEMS).logits, expected)
    target.release()
    assert model.config._attn_implementation == "eager"


@needs_packing
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_weights_are_freed_while_packed_and_tied_again_afterwards(tied):
    model = model_of(tie_word_embeddings=tied)
    layer = weakref.ref(model.model.layers[0].self_attn.o_proj.weight)
    head = weakref.ref(model.lm_head.weight)
    target = Target(model)
    target.choose_kernels(False)
    gc.collect()
    assert layer() is None
    assert (head() is None) is not tied
    target.release()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert len({weight.untyped_storage().data_ptr() for weight in model.parameters()}) == len(list(model.parameters()))


@needs_packing
def test_tied_linears_are_tied_again_after_release():
    model = model_of()
    first, second = (layer.self_attn.o_proj for layer in model.model.layers[:2])
    second.weight = first.weight
    expected = first.weight.detach().clone()
    del first, second
    target = Target(model)
    target.choose_kernels(False)
    target.release()
    first, second = (layer.self_attn.o_proj for layer in model.model.layers[:2])
    assert first.weight is second.weight
    assert torch.equal(first.weight, expected)


@needs_packing
def test_an_optimizer_made_before_keeps_the_same_weights():
    model = model_of().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = list(model.parameters())
    target = Target(model)
    target.choose_kernels(False)
    assert not model.training
    with torch.inference_mode():
        target.release()
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(now is before for now, before in zip(model.parameters(), weights, strict=True))
    before = bits(model)
    model(PROMPTS, labels=PROMPTS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


@needs_packing
def test_a_model_whose_weights_were_freed_is_trainable_after_release():
    model = model_of()
    model.model.embed_tokens.weight.requires_grad_(False)
    target = Target(model)
    target.choose_kernels(False)
    with torch.inference_mode():
        target.release()
    model(PROMPTS, labels=PROMPTS).loss.backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without == {"model.embed_tokens.weight"}


@needs_packing
def test_a_released_model_can_be_saved_and_loaded(tmp_path):
    model = model_of("qwen2", torch.bfloat16 if torch.bfloat16 in DTYPES else torch.float32)
    before = bits(model)
    target = Target(model)
    target.choose_kernels(False)
    target.release()
    model.save_pretrained(tmp_path)
    assert_same_bits(hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype).state_dict(), before)


@needs_packing
def test_the_last_of_several_targets_restores_the_weights():
    model = model_of()
    before = bits(model)
    first = Target(model)
    first.choose_kernels(False)
    second = Target(model)
    expected = score(first, STEMS).logits
    model.generate(PROMPTS[1:], custom_generate=headstart.custom_generate, max_new_tokens=3)
    second.release()
    assert torch.equal(score(first, STEMS).logits, expected)
    with pytest.raises(ValueError, match="was released"):
        score(second, STEMS)
    first.release()
    assert_same_bits(model.state_dict(), before)


def test_a_garbage_collected_target_no_longer_holds_its_model():
    model = model_of()
    Target(model).choose_kernels(False)
    gc.collect()
    Target(model).release()
    assert not any(isinstance(module, StandIn) for module in model.modules())


@needs_packing
def test_a_model_can_be_packed_again_after_its_weights_changed():
    model = model_of()
    target = Target(model)
    target.choose_kernels(False)
    target.release()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    before = bits(model)
    again = Target(model)
    again.choose_kernels(False)
    again.release()
    assert_same_bits(model.state_dict(), before)
