"""Packed linears and fused modules give the output of the plain ones, and are not used where they cannot."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from headstart.target.kernels.fuse import GatedMLP, RMSNorm, fuse
from headstart.target.kernels.linear import PackedLinear, SharedLinear, pack_for, packed_bytes, prepack

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if pack_for(dtype)]
pytestmark = [
    pytest.mark.skipif(not DTYPES, reason="this torch or processor cannot pack linears"),
    pytest.mark.usefixtures("kernels"),
]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 48), nn.Linear(32, 16, bias=False), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def tiny_llama(dtype: torch.dtype, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 2, **changes})).to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_gives_the_same_logits(dtype):
    model, ids = tiny_llama(dtype), torch.arange(20)[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        assert fuse(model) == 2 + 5  # MLPs and norms
        assert prepack(model) == 2 * 4 + 1  # attention and LM head; the MLPs pack their own linears
        actual = model(ids, use_cache=False).logits
    assert (expected - actual).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * expected.abs().max()


def test_siblings_that_read_one_tensor_share_one_product():
    module, x = Attention().eval(), torch.randn(1, 5, 32)
    expected = module(x)
    assert prepack(module) == 3
    assert isinstance(module.k_proj, SharedLinear)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_siblings_called_with_different_tensors_or_twice_stay_correct():
    module, x, y = Attention().eval(), torch.randn(4, 32), torch.randn(4, 32)
    weights = [(part.weight.clone(), None if part.bias is None else part.bias.clone()) for part in module.children()]
    prepack(module)
    calls = [(0, x), (1, y), (2, x), (2, x), (0, y), (0, y), (1, x), (2, y)]
    for member, inputs in calls:
        torch.testing.assert_close(list(module.children())[member](inputs), F.linear(inputs, *weights[member]))


def test_a_packed_linear_gives_its_weight_back():
    linear = nn.Linear(37, 21)
    parent = nn.Sequential(linear)
    prepack(parent)
    assert isinstance(parent[0], PackedLinear)
    assert torch.equal(parent[0].weight, linear.weight)
    assert torch.equal(parent[0].bias, linear.bias)
    assert packed_bytes(parent) >= linear.weight.nbytes


def test_gradients_flow_through_a_packed_linear():
    linear, x = nn.Linear(16, 8), torch.randn(3, 16, requires_grad=True)
    parent = nn.Sequential(linear)
    prepack(parent)
    parent(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, -1))


def test_the_transposed_linear_of_gpt2_is_packed():
    parent, x = nn.Sequential(Conv1D(24, 16)).eval(), torch.randn(2, 3, 16)
    expected = parent(x)
    assert prepack(parent) == 1
    with torch.inference_mode():
        torch.testing.assert_close(parent(x), expected)


def test_a_subclassed_or_hooked_linear_is_not_packed():
    class Adapted(nn.Linear):
        pass

    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    assert prepack(nn.Sequential(Adapted(8, 8), hooked, nn.Linear(8, 8, dtype=torch.float64))) == 0


def test_a_tied_embedding_is_not_packed():
    model = tiny_llama(torch.float32, tie_word_embeddings=True)
    prepack(model)
    assert isinstance(model.lm_head, PackedLinear)
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")])
def test_a_gated_mlp_is_fused_for_each_known_activation(activation):
    model, x = tiny_llama(torch.float32), torch.randn(1, 3, 64)
    model.model.layers[0].mlp.act_fn = activation
    expected = model.model.layers[0].mlp(x)
    fuse(model)
    assert isinstance(model.model.layers[0].mlp, GatedMLP)
    with torch.inference_mode():
        torch.testing.assert_close(model.model.layers[0].mlp(x), expected, rtol=1e-4, atol=1e-6)


def test_a_gated_mlp_with_an_unknown_activation_is_not_fused():
    model = tiny_llama(torch.float32)
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    fuse(model)
    assert not isinstance(model.model.layers[0].mlp, GatedMLP)
    assert isinstance(model.model.layers[1].mlp, GatedMLP)


def test_a_norm_that_adds_one_to_its_weight_is_fused():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    parent, x = nn.Sequential(GemmaRMSNorm(32)), torch.randn(1, 4, 32)
    nn.init.normal_(parent[0].weight)
    expected = parent(x)
    assert fuse(parent) == 1
    assert isinstance(parent[0], RMSNorm)
    torch.testing.assert_close(parent(x), expected)


def test_a_norm_of_another_kind_is_not_fused():
    assert fuse(nn.Sequential(nn.LayerNorm(16), nn.Identity())) == 0
