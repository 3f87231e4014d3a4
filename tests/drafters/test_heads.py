"""Trainable drafters of every method: drafting equals training, the text is the target's, losses follow their formulas, loading."""

import re

import pytest
import torch
import torch.nn.functional as F
from folders import write_model
from heads import KINDS, Forced, heads_for
from scripted import Ask, decode
from teacher_forcing import TEXTS, batch_of, read_texts, states_of
from tiny import tiny

import headstart
from headstart import formats as checkpoint
from headstart.drafters.medusa import Medusa, MedusaConfig
from headstart.drafters.parts.drafter_loss import chunked_loss
from headstart.drafters.parts.heads import Heads
from headstart.drafters.parts.losses import CHUNK, Batch, Metrics, Objective, OutputHead
from headstart.drafters.registry import METHODS
from headstart.engine.drafter_loading import make
from headstart.formats import describe_target, detect
from headstart.speculation.calibration import UNFITTED
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain, StaticTree
from headstart.target.cache import Seating
from headstart.target.loading import embedded, load_model
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_drafting_logits_are_the_teacher_forced_ones(kind):
    target, root_positions, depths = tiny(), (4, 7), (3, 4)
    heads = heads_for(target, kind)
    seating = Seating(2, 64)
    for text in TEXTS:
        seating.take(len(text))
    trained = []
    for text, position in zip(TEXTS, root_positions, strict=True):
        outputs = heads.eval().states(batch_of(torch.tensor([text]), taps=heads.taps))
        trained.append([output.output_head(output.states[:, position - 1])[0].detach() for output in outputs])
    heads.attach(target, seating)
    read_texts(heads, TEXTS, root_positions)
    rows = Forced(TEXTS, root_positions, depths)
    drafts = heads.propose(rows)
    assert len(drafts) == sum(depths)
    for (row, level), line in rows.logits.items():
        torch.testing.assert_close(line, trained[row][level - 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("planner", [Chain(4), Best(nodes=9, depth=4, width=3, beam=4), StaticTree.full(3, 2, 1)], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_decoding_without_a_drafter(kind, planner):
    target = tiny()
    temperatures = [(0.0, None), (0.7, None), (1.0, 0.9), (1.0, None), (0.0, None)]
    params = [
        SamplingParams(max_tokens=15 + 2 * i, temperature=temperature, top_p=top_p, presence_penalty=0.1 * i, seed=i)
        for i, (temperature, top_p) in enumerate(temperatures)
    ]
    asks = [Ask(tuple(range(3 + i, 9 + 3 * i)), row_params) for i, row_params in enumerate(params)]
    expected, _ = decode(target, asks)
    actual, engine = decode(target, asks, heads_for(target, kind), planner, max_rows=3, chunk=4)
    assert actual == expected
    assert engine.stats.drafts > 0


@pytest.mark.parametrize("kind", KINDS)
def test_several_answers_to_one_prompt_fork_the_state_of_the_heads(kind):
    target = tiny()
    params = SamplingParams(max_tokens=12, temperature=1.0, n=1)
    asks = [Ask((4, 8, 15, 16, 23, 42), SamplingParams(**{**vars(params), "seed": seed})) for seed in (1, 2, 3)]
    expected, _ = decode(target, asks)
    heads = heads_for(target, kind)
    from headstart.engine.engine import Engine

    engine = Engine(target, heads, Chain(3), max_rows=3)
    leader = engine.add(asks[0].prompt, asks[0].params)
    followers = [engine.add(ask.prompt, ask.params, leader=leader) for ask in asks[1:]]
    for _ in engine.run():
        pass
    assert [list(r.output) for r in (leader, *followers)] == [list(text) for text in expected]


def test_initial_medusa_heads_have_the_logits_of_the_targets_lm_head():
    target = tiny()
    heads = heads_for(target, "medusa", noise=0.0)
    batch = batch_of(torch.tensor(TEXTS[:1]))
    for output in heads.states(batch):
        torch.testing.assert_close(output.output_head(output.states), target.embed_head.logits(batch.last_hidden))


def test_initial_hydra_heads_pass_the_state_on():
    target = tiny()
    batch = batch_of(torch.tensor(TEXTS[:1]))
    for output in heads_for(target, "hydra", noise=0.0).states(batch):
        torch.testing.assert_close(output.states, batch.features)


def test_hydra_heads_depend_on_their_path_and_medusa_heads_do_not():
    one, other = torch.tensor(TEXTS[:1]), torch.tensor(TEXTS[:1])
    other[0, 6] = 90
    last_hidden = states_of(one)
    loss_mask = torch.ones_like(one, dtype=torch.bool)
    for kind, depends in (("medusa", False), ("hydra", True)):
        heads = heads_for(tiny(), kind)
        states = [
            [output.states[0, 4] for output in heads.states(Batch(text, loss_mask, last_hidden, last_hidden))]
            for text in (one, other)
        ]
        assert torch.equal(states[0][0], states[1][0])  # depth 1 knows tokens up to 5
        assert torch.equal(states[0][1], states[1][1]) != depends


def test_a_position_counts_where_root_and_guesses_are_the_assistants():
    loss_mask = torch.tensor([[False, False, True, True, True, False, True]])
    batch = Batch(torch.zeros_like(loss_mask, dtype=torch.int64), loss_mask, torch.zeros(1, 7, 1), torch.zeros(1, 7, 1))
    assert batch.counted(1)[0].nonzero().squeeze(-1).tolist() == [1, 2]  # t: root t + 1, guess t + 2
    assert batch.counted(2)[0].nonzero().squeeze(-1).tolist() == [1]
    assert not batch.counted(6).any()
    assert not batch.counted(9).any()


def random_logits():
    """Logits of a drafter and its teacher, [3, 5] each, and tokens, [3]."""
    torch.manual_seed(0)
    return torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 4, 2])


def test_losses_are_those_of_their_formulas():
    logits, teacher_logits, tokens = random_logits()
    q, p = logits.float().softmax(-1), teacher_logits.float().softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    mix = torch.exp(-3 * overlap)
    expected = {
        "hard": F.cross_entropy(logits.float(), tokens, reduction="none"),
        "soft": -(p * q.log()).sum(-1),
        "tv": 0.5 * (p - q).abs().sum(-1),
        "alpha": -overlap.log(),
        "lk": mix * kl + (1 - mix) * 0.5 * (p - q).abs().sum(-1),
    }
    for name, loss in expected.items():
        objective = Objective(**{name: 2.0})
        torch.testing.assert_close(objective(logits, tokens, teacher_logits), 2 * loss, rtol=1e-5, atol=1e-6)


def test_losses_of_acceptance_are_zero_where_the_distributions_are_equal():
    logits, _, tokens = random_logits()
    for name in ("tv", "alpha", "lk"):
        loss = Objective(**{name: 1.0})(logits, tokens, logits)
        torch.testing.assert_close(loss, torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "objective", [Objective(hard=1.0), Objective(hard=0.3, soft=0.2, tv=0.4, alpha=0.5, lk=0.6, temperature=0.7)]
)
def test_a_loss_in_chunks_has_the_value_and_the_gradients_of_the_whole(objective):
    torch.manual_seed(0)
    count = 2 * CHUNK + 7
    linear, teacher = torch.nn.Linear(6, 11).double(), torch.nn.Linear(6, 11).double()
    states = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
    last_hidden, tokens = torch.randn(count, 6, dtype=torch.float64), torch.randint(11, (count,))
    output_head = OutputHead(linear, tuple(linear.parameters()))
    loss, hits = chunked_loss(output_head, states, tokens, last_hidden, objective, teacher)
    actual = torch.autograd.grad(3 * loss, [states, *linear.parameters()])
    whole = objective(linear(states), tokens, teacher(last_hidden).detach()).sum()
    expected = torch.autograd.grad(3 * whole, [states, *linear.parameters()])
    torch.testing.assert_close(loss, whole)
    assert torch.equal(hits, linear(states).argmax(-1) == tokens)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_two_batches_add_up_to_that_of_both(kind):
    heads = heads_for(tiny(), kind).eval()
    tokens = torch.tensor([TEXTS[0], TEXTS[1][:10]])
    both, parts = batch_of(tokens, 3, heads.taps), [batch_of(tokens[i : i + 1], 3, heads.taps) for i in range(2)]
    objective = Objective(soft=1.0, decay=0.8)
    total, metrics = heads.loss(both, objective)
    losses, measured = zip(*(heads.loss(part, objective) for part in parts), strict=True)
    torch.testing.assert_close(sum(losses), total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((measured[0] + measured[1]).stacked(), metrics.stacked(), rtol=1e-5, atol=1e-5)


def test_tau_of_a_chain_counts_unbroken_runs_of_hits():
    # three positions; depth 1 right at two of them, depth 2 right at two, but only one of these after a right depth 1
    metrics = Metrics(torch.zeros(2), torch.tensor([3.0, 3.0]), torch.tensor([2.0, 2.0]), torch.tensor([2.0, 1.0]))
    assert metrics.tau.item() == pytest.approx(1 + 2 / 3 + 1 / 3)
    assert metrics.top1.tolist() == pytest.approx([2 / 3, 2 / 3])


def test_every_weight_has_a_gradient():
    for kind in KINDS:
        heads: Heads = heads_for(tiny(), kind)
        loss, _ = heads.loss(batch_of(torch.tensor(TEXTS[1:]), taps=heads.taps), Objective())
        loss.backward()
        assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in heads.parameters())


def test_heads_of_another_size_are_refused():
    with pytest.raises(ValueError, match="hidden size of 32 and a vocabulary of 97, the target has 64 and 97"):
        type(heads_for(tiny(), "medusa"))(heads_for(tiny(), "medusa").config, 32, 97).bind(tiny().embed_head)


def test_the_objective_is_the_teachers_distribution_unless_a_loss_is_given():
    assert Objective() == Objective(soft=1.0)
    assert Objective(decay=0.8).soft == 1.0
    assert Objective(lk=1.0).soft == Objective(hard=1.0).soft == 0.0


def test_an_objective_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="every loss has weight 0"):
        Objective(hard=0.0)


def test_a_clone_has_equal_weights_of_its_own():
    heads = heads_for(tiny(), "hydra++")
    clone = heads.clone().bind(tiny().embed_head)
    assert all(torch.equal(one, other) for one, other in zip(heads.state_dict().values(), clone.state_dict().values(), strict=True))
    with torch.no_grad():
        next(heads.parameters()).add_(1)
    assert not torch.equal(next(heads.parameters()), next(clone.parameters()))


# -- by name ------------------------------------------------------------------------------------------------------------------


SHIPPED = ("medusa", "hydra", "eagle", "eagle3", "mtp", "mtp-parallel")


@pytest.mark.parametrize("name", SHIPPED)
def test_heads_of_the_embedded_model_are_named_by_their_method(name):
    llm = headstart.load(drafter=name, planner="chain:3", device="cpu", dtype="float32")
    without = headstart.load(drafter=None, device="cpu", dtype="float32")
    settings = {"max_tokens": 24, "temperature": 0.7, "seed": 4}
    assert (
        llm.generate("Once upon a time", **settings)[0].token_ids == without.generate("Once upon a time", **settings)[0].token_ids
    )
    assert llm.stats.tau > 1.2
    assert llm.engine.drafter.calibration is not UNFITTED


def test_heads_of_the_embedded_model_need_no_model_option():
    folder = embedded("hydra")
    assert detect(folder).command == f"headstart generate --drafter {folder}"
    assert "--model" not in (folder / "README.md").read_text()


def test_a_method_without_heads_of_the_embedded_model_says_how_to_train_some():
    (name,) = METHODS.keys() - {*SHIPPED}
    with pytest.raises(
        ValueError, match=rf"the embedded model comes with no {re.escape(name)} heads, .* `headstart train {re.escape(name)}`"
    ):
        headstart.load(drafter=name, device="cpu")


def test_a_method_names_heads_of_the_embedded_model_only():
    with pytest.raises(ValueError, match="headstart train medusa --target"):
        make("medusa", tiny())


def test_heads_of_another_models_size_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"hidden size of 192, but .* has 64"):
        make(str(embedded("medusa")), tiny())


def test_heads_of_another_tokenizer_are_refused_even_where_all_sizes_agree(tmp_path):
    model, other = write_model(tmp_path / "model"), write_model(tmp_path / "other")
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["<|new|>"])
    target_info = describe_target(load_model(other), tokenizer)
    checkpoint.save(tmp_path / "heads", Medusa(MedusaConfig(), target_info.hidden, target_info.vocab), target_info, {})
    with pytest.raises(ValueError, match=f"a tokenizer of {target_info.tokenizer}"):
        make(str(tmp_path / "heads"), Target.load(model, device="cpu"))
