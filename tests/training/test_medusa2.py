"""Medusa-2: the trunk is trained with its heads, starts as the original model, and is saved as an ordinary model folder."""

import math

import pytest
import torch
from heads import heads_for
from safetensors.torch import load_file
from tiny import ARCHITECTURES, random_model

import headstart
from headstart.drafters.parts.losses import Objective
from headstart.target.loading import load_model
from headstart.target.target import Target
from headstart.training.dataset import TextBatch
from headstart.training.features import as_batch
from headstart.training.medusa2 import Medusa2, Medusa2Config
from headstart.training.train import resolve, train

TOKENS = torch.tensor([[5, 9, 3, 77, 12, 40, 8, 21, 33, 60]])
TEXTS = TextBatch(TOKENS, torch.tensor([[False] * 3 + [True] * 7]), (0,))


def joint_loss(kind="medusa", **settings):
    """A Medusa-2 loss module with a new tiny model, in float32."""
    model = random_model(ARCHITECTURES["llama"](), torch.float32)
    target = Target(model)
    heads = heads_for(target, kind)
    target.release()
    return Medusa2(heads, model, Objective(hard=1.0), Medusa2Config(dropout=0.0, **settings))


def entropy_along_the_text(loss_module):
    logits = loss_module.trunk.logits_before(loss_module.trunk.last_hidden_before(TOKENS))[0, 2:-1]
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_soft_loss_of_an_unchanged_trunk_is_the_entropy_of_its_own_distribution(mode):
    loss_module = joint_loss(mode=mode, base="kl").eval()
    batch_loss, metrics = loss_module(TEXTS)
    heads_loss = batch_loss - loss_module.config.weight * metrics.losses.sum()
    torch.testing.assert_close(heads_loss, entropy_along_the_text(loss_module), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_kl_divergence_from_the_original_model_grows_when_the_trunk_changes(mode):
    """The base loss has no gradient at the original model, and grows away from it."""
    loss_module = joint_loss(mode=mode, base="kl", weight=1e-9).eval()
    loss, _ = loss_module(TEXTS)
    loss.backward()
    weights = [weight for weight in loss_module.trunk.parameters() if weight.requires_grad]
    assert max(float(weight.grad.abs().max()) for weight in weights if weight.grad is not None) < 1e-3
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.05 * torch.randn_like(weight))
    moved, _ = loss_module(TEXTS)
    assert moved > loss + 0.01


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_heads_loss_has_gradients_in_the_trunk(mode):
    loss_module = joint_loss(mode=mode, base="kl", weight=1.0)
    loss, _ = loss_module(TEXTS)
    loss.backward()
    moved = [weight for weight in loss_module.trunk.parameters() if weight.grad is not None and weight.grad.abs().max() > 1e-3]
    assert moved


def test_the_original_model_stays_available_while_the_trunk_is_trained():
    for mode in ("lora", "full"):
        loss_module = joint_loss(mode=mode)
        before = loss_module.trunk.last_hidden_before(TOKENS).clone()
        with torch.no_grad():
            for weight in loss_module.trunk.parameters():
                if weight.requires_grad:
                    weight.add_(0.1)
        assert torch.equal(loss_module.trunk.last_hidden_before(TOKENS), before)
        assert not torch.allclose(loss_module.trunk.states(TOKENS, [2])[2], before)


def test_the_gradient_of_the_base_loss_is_that_of_the_model_alone():
    """Its head, too: the gradients of the base term are those of the model's own cross-entropy."""
    loss_module = joint_loss(mode="full", base="ce")
    batch = as_batch(TEXTS, loss_module.trunk.states(TOKENS, [2]), [2])
    loss_module.base(batch).backward()
    weights = list(loss_module.trunk.model.parameters())
    logits = loss_module.trunk.model(TOKENS).logits[0, 2:-1]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, TOKENS[0, 3:], reduction="sum"), weights)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-4)


def test_heads_that_share_the_lm_head_train_it_in_full_mode():
    loss_module = joint_loss("medusa, shared", mode="full", weight=1.0)
    loss, _ = loss_module.drafter.loss(as_batch(TEXTS, loss_module.trunk.states(TOKENS, [2]), [2]), Objective(hard=1.0))
    loss.backward()
    assert loss_module.trunk.model.lm_head.weight.grad.abs().sum() > 0


def test_the_sine_ramp_rises_from_0_to_the_full_weight():
    constant, sine = Medusa2Config(weight=0.2), Medusa2Config(weight=0.2, ramp="sine", ramp_share=0.5)
    assert [constant.lambda0(done) for done in (0.0, 0.3, 1.0)] == [0.2, 0.2, 0.2]
    assert [sine.lambda0(done) for done in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 0.2 * math.sin(math.pi / 4), 0.2, 0.2])


def test_heads_have_a_higher_learning_rate_than_the_trunk():
    groups = joint_loss(head_rate=4.0).groups(1e-3, 0.1)
    rates = {group["peak"] for group in groups}
    assert rates == {1e-3, 4e-3}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_joint_run_saves_an_ordinary_model_and_heads_for_it(asked, tmp_path, model_folder, mode):
    out = tmp_path / "joint"
    keys = asked(out=str(out), joint={"mode": mode, "weight": 1.0, "base": "ce"}, steps=4, held_out=0.2, learning_rate=1e-2)
    record = train(resolve(None, keys))
    assert record["trunk_perplexity_before"] > 1
    before, after = load_model(model_folder).state_dict(), load_model(out / "model").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    llm = headstart.load(out / "model", drafter=str(out), device="cpu")  # warns if the heads were another model's
    answer = llm.generate("the cat", max_tokens=12)[0]
    plain = headstart.load(out / "model", drafter=None, device="cpu").generate("the cat", max_tokens=12)[0]
    assert answer.token_ids == plain.token_ids


def test_a_joint_run_starts_from_the_heads_of_its_warm_start(asked, tmp_path):
    first, out = tmp_path / "first", tmp_path / "second"
    train(resolve(None, asked(out=str(first), steps=3)))
    train(resolve(None, asked(out=str(out), steps=1, learning_rate=1e-12, start=str(first), joint={})))
    one, other = load_file(first / "model.safetensors"), load_file(out / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"joint": {"mood": "lora"}}, "joint has no key mood"),
        ({"joint": {"mode": "half"}}, "mode is 'half'"),
        ({"joint": {}, "features": "store"}, "leave one of them out"),
    ],
)
def test_a_wrong_joint_configuration_is_one_sentence(asked, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(resolve(None, asked(**changes)))


def test_the_cross_entropy_of_the_trunk_is_that_of_its_logits():
    loss_module = joint_loss()
    loss, count = loss_module.cross_entropy(TEXTS)
    with loss_module.trunk.model.disable_adapter(), torch.no_grad():
        logits = loss_module.trunk.model(TOKENS).logits[0, 2:-1]
    expected = torch.nn.functional.cross_entropy(logits, TOKENS[0, 3:], reduction="sum")
    assert count == 7
    assert loss == pytest.approx(float(expected), rel=1e-4)
