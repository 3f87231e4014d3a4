"""Which numbers of rows give each row the same bits."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from headstart.kernels import invariance
from headstart.kernels.invariance import distinct, multiplies_by_itself, smallest_invariant_size, varying_sizes
from headstart.kernels.linear import can_pack, prepack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_alike_from_two_on(dtype):
    if not can_pack(dtype):
        pytest.skip("this torch or processor cannot pack linears")
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 2304), nn.Linear(2304, 64)).to(dtype)
    prepack(model)
    assert smallest_invariant_size(model.modules()) in (1, 2)


def test_a_shape_is_tested_once():
    assert len(distinct([nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8), nn.ReLU()])) == 2


def test_rows_that_lean_on_each_other_are_noticed(monkeypatch):
    monkeypatch.setattr(invariance.F, "linear", lambda x, weight: x @ weight.T + (x.shape[1] in (1, 2, 7)))
    assert varying_sizes((8, 64, torch.float32, False), (1, 2, 7, 8, 16)) == [1, 2, 7]
    assert smallest_invariant_size([nn.Linear(64, 8)], (1, 2, 7, 8, 16)) == 8


def test_a_size_that_nothing_larger_confirms_is_not_called_invariant(monkeypatch):
    monkeypatch.setattr(invariance.F, "linear", lambda x, weight: x @ weight.T + x.shape[1])
    assert smallest_invariant_size([nn.Linear(64, 64)], (1, 2, 3)) is None


def test_a_sum_that_is_split_shows_although_every_number_in_it_is_rounded(monkeypatch):
    def split_if_alone(x, weight):
        half = x.shape[-1] // 4 if x.shape[1] == 1 else x.shape[-1]
        product = x[..., :half].float() @ weight[:, :half].float().T
        return (product + x[..., half:].float() @ weight[:, half:].float().T).to(x.dtype)

    monkeypatch.setattr(invariance.F, "linear", split_if_alone)
    assert 1 in varying_sizes((256, 1024, torch.bfloat16, False), (1, 16, 64))


def test_a_model_with_experts_is_never_called_invariant():
    config = MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_local_experts=4
    )
    model = MixtralForCausalLM(config)
    assert not any(map(multiplies_by_itself, model.model.layers[0].self_attn.modules()))
    assert smallest_invariant_size(model.modules()) is None
