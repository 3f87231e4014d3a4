"""The loss of pretraining: its gradients are those of a single graph, its memory is that of one head."""

import pytest
import torch
from tiny import ARCHITECTURES, random_model
from torch import nn

from headstart.drafters.mtp import Mtp, MtpConfig
from headstart.drafters.mtp_parallel import ParallelConfig, ParallelMtp
from headstart.drafters.parts.decoder import block_of
from headstart.drafters.parts.drafter_loss import backward_by_part
from headstart.drafters.parts.losses import Batch, Metrics
from headstart.target.embed_head import EmbedHead
from headstart.training.dataset import TextBatch
from headstart.training.pretrain_loss import PretrainLoss

TOKENS = torch.tensor([[5, 9, 3, 77, 12, 40, 8, 21, 33, 60], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
TEXTS = TextBatch(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), (0, 1))
KINDS = {"mtp": (Mtp, MtpConfig(num_modules=2, depth=3)), "mtp-parallel": (ParallelMtp, ParallelConfig(num_heads=3))}


def pretrain_loss(*names, weight=0.5, decay=0.8, architecture="llama"):
    """A tiny trunk and its heads, in float64."""
    trunk = random_model(ARCHITECTURES[architecture](), torch.float64).train()
    torch.manual_seed(3)
    embed_head, heads = EmbedHead(trunk), {}
    for name in names:
        kind, config = KINDS[name]
        heads[name] = kind(kind.resolve_config(config, trunk.config), embed_head.hidden, embed_head.vocab).double().bind(embed_head)
    return PretrainLoss(trunk, heads, lambda progress: weight, decay)


def single_graph(loss_module):
    """The same loss as a single graph, with the model's own logits and without chunks."""
    out = loss_module.trunk(TOKENS, output_hidden_states=True, use_cache=False)
    cross_entropy = nn.functional.cross_entropy
    total = cross_entropy(out.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    for heads in loss_module.heads.values():
        features = out.hidden_states[-1 if heads.taps == (-1,) else -2]
        batch = Batch(TOKENS, TEXTS.loss_mask, features, features)
        losses = []
        for depth, output in enumerate(heads.states(batch), 1):
            logits = loss_module.trunk.lm_head(output.states[:, : -depth - 1])
            loss = cross_entropy(logits.flatten(0, 1), TOKENS[:, depth + 1 :].flatten(), reduction="sum")
            losses.append(loss * 0.8 ** (depth - 1))
        total = total + 0.5 * sum(losses) / sum(0.8**depth for depth in range(len(losses)))
    return total


@pytest.mark.parametrize("names", [("mtp",), ("mtp-parallel",), ("mtp", "mtp-parallel"), ()], ids=str)
def test_the_chunked_loss_has_the_value_and_the_gradients_of_a_single_graph(names):
    loss_module = pretrain_loss(*names)
    loss, _ = loss_module(TEXTS)
    weights = list(loss_module.parameters())
    actual = torch.autograd.grad(loss, weights)
    expected = torch.autograd.grad(single_graph(loss_module), weights)
    torch.testing.assert_close(loss, single_graph(loss_module).float(), rtol=1e-6, atol=1e-5)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # cross-entropies are float32


def test_every_weight_has_a_gradient_under_autocast():
    loss_module = pretrain_loss("mtp", "mtp-parallel").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = loss_module(TEXTS)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in loss_module.parameters())


def test_parts_are_differentiated_one_after_another():
    """Only one part's graph is alive at a time."""
    alive, most = 0, 0
    linear = nn.Linear(3, 3)

    def count(change):
        nonlocal alive, most
        alive += change
        most = max(most, alive)

    def parts(features):
        for _ in range(4):
            count(1)
            part = linear(features).square().sum()
            part.register_hook(lambda grad: count(-1))
            yield part, torch.ones(4, 1)

    loss, metrics = backward_by_part(parts, torch.randn(5, 3, requires_grad=True), linear.parameters())
    assert most == 1
    assert isinstance(metrics, Metrics)
    assert metrics.counts.shape == (4,)
    assert loss.requires_grad


def test_without_gradients_no_graph_is_kept():
    loss_module = pretrain_loss("mtp").eval()
    with torch.no_grad():
        loss, metrics = loss_module(TEXTS)
    assert not loss.requires_grad
    assert metrics.counts.tolist() == [18, 16, 14, 12]  # next tokens, then drafts of depth 1, 2 and 3


def test_the_heads_gradient_in_the_trunk_is_proportional_to_their_weight():
    """The trunk's gradient is that of its own loss plus the weight times that of the heads'."""
    grads = []
    for weight in (0.0, 0.5, 1.0):
        loss_module = pretrain_loss("mtp-parallel", weight=weight)
        loss_module(TEXTS)[0].backward()
        grads.append(loss_module.trunk.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(grads[1] - grads[0], (grads[2] - grads[0]) / 2, rtol=1e-4, atol=1e-5)
    assert (grads[1] - grads[0]).abs().max() > 0


def test_the_summary_has_the_next_token_and_every_methods_depths():
    loss_module = pretrain_loss("mtp", "mtp-parallel")
    loss, metrics = loss_module(TEXTS)
    values = loss_module.summarize_metrics(metrics, float(loss.detach()), "held_out_")
    assert len(values["held_out_mtp_top1"]) == len(values["held_out_mtp-parallel_top1"]) == 3
    assert values["held_out_loss"] == pytest.approx(float(metrics.losses[0] / 18), rel=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "mistral", "gpt_neox"])
def test_a_block_is_a_layer_of_the_targets_architecture(architecture):
    trunk = random_model(ARCHITECTURES[architecture](), torch.float32)
    heads = ParallelMtp(ParallelConfig(num_heads=1, block=block_of(trunk.config)), 64, 97)
    own, last = heads.head(0), trunk.base_model.layers[-1]
    assert type(own.layers[0]) is type(last)
    assert {name: w.shape for name, w in own.layers[0].named_parameters()} == {n: w.shape for n, w in last.named_parameters()}
