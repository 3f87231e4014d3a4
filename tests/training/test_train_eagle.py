"""Training of EAGLE heads: draft vocabularies, unrolled steps, losses computed by hand, and resumed runs."""

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from heads import heads_for
from safetensors.torch import load_file
from teacher_forcing import TEXTS, batch_of
from tiny import tiny
from training_runs import assert_same_bits, check_resumed, dataset_of, log

import headstart
from headstart import formats
from headstart.drafters.eagle3 import Eagle3, Eagle3Config
from headstart.drafters.parts.drafter_loss import chunked_loss
from headstart.drafters.parts.llama_layer import llama_block
from headstart.drafters.parts.losses import Objective
from headstart.target.cache import Seating
from headstart.target.loading import load_model
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.tokenizer import special_ids
from headstart.training.train import resolve, train

EAGLE = {"method": "eagle", "settings": {"depth": 3}}
EAGLE3 = {"method": "eagle3", "settings": {"depth": 4, "steps": 2, "taps": (0, 1), "draft_vocab": 60}}


# -- runs --


@pytest.mark.parametrize("keys", [EAGLE, EAGLE3], ids=["eagle", "eagle3"])
def test_training_lowers_the_loss_and_the_heads_do_not_change_the_text(asked, tmp_path, data, model_folder, keys):
    record = train(resolve(None, asked(**keys, steps=60, learning_rate=0.01, held_out=data, loss={"hard": 1})))
    losses = log(tmp_path / "heads")
    assert losses[-1] < 0.7 * losses[0]
    assert record["held_out_tau"] > 1.1
    answers = [
        headstart.load(model_folder, drafter=drafter, device="cpu").generate("the cat", max_tokens=24, temperature=0.7, seed=3)[0]
        for drafter in (str(tmp_path / "heads"), None)
    ]
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize("at", ["step:4", "written:6"])
@pytest.mark.parametrize("keys", [EAGLE, EAGLE3], ids=["eagle, with its noise", "eagle3, with its own vocabulary"])
def test_a_killed_run_resumes_to_the_same_bits(asked, tmp_path, keys, at):
    check_resumed(asked, tmp_path, keys, at)


def test_noise_is_drawn_at_every_training_step_and_never_in_evaluation(asked, tmp_path, data):
    """The learning rate is so small that no weight changes; every step reads the same texts in one batch."""
    common = {"steps": 3, "rows": 16, "learning_rate": 1e-20, "held_out": data, "eval_every": 1, "save_every": 9}
    train(resolve(None, asked(method="eagle", settings={"noise": 1.0}, **common)))
    assert len(set(log(tmp_path / "heads"))) == 3
    assert len(set(log(tmp_path / "heads", "held_out_loss"))) == 1


def test_all_depths_are_evaluated_and_only_the_unrolled_steps_are_trained(asked, tmp_path, data):
    record = train(resolve(None, asked(**EAGLE3, steps=2, held_out=data)))
    assert [len(shares) for shares in log(tmp_path / "heads", "top1")] == [2, 2]
    assert len(record["held_out_top1"]) == 4


def test_features_of_several_layers_can_come_from_a_store(asked, tmp_path):
    for name in ("computed", "stored", "again"):
        store = None if name == "computed" else tmp_path / "store"
        train(resolve(None, asked(**EAGLE3, out=tmp_path / name, features=store)))
    assert_same_bits(tmp_path / "stored", tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("computed", "stored"))
    for key, tensor in one.items():  # a text alone and a text in a batch are rounded differently
        torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keys", [EAGLE, EAGLE3], ids=["eagle", "eagle3"])
def test_a_target_can_be_trained_with_its_heads(asked, tmp_path, keys):
    out = tmp_path / "joint"
    train(resolve(None, asked(**keys, out=str(out), joint={"mode": "full", "base": "ce"}, steps=4, learning_rate=1e-2)))
    heads = headstart.load(out / "model", drafter=str(out), device="cpu").generate("the cat", max_tokens=12)[0]
    plain = headstart.load(out / "model", drafter=None, device="cpu").generate("the cat", max_tokens=12)[0]
    assert heads.token_ids == plain.token_ids


# -- the draft vocabulary --


def ids_of(folder):
    return load_file(folder / "model.safetensors")["ids"].tolist()


def test_the_draft_vocabulary_holds_the_special_tokens_and_the_most_frequent_tokens_of_answers(asked, tmp_path, model_folder, data):
    train(resolve(None, asked(**EAGLE3, steps=1)))
    dataset, special = dataset_of(model_folder, data), special_ids(load_tokenizer(model_folder))
    counts = Counter(token for text in dataset.texts for token, is_answer in zip(text.tokens, text.mask, strict=True) if is_answer)
    ids = ids_of(tmp_path / "heads")
    assert ids == sorted(set(ids))
    assert len(ids) == 60
    assert special <= set(ids)
    assert min(counts[token] for token in set(ids) - special) >= max(counts[token] for token in set(counts) - set(ids))


def test_the_coverage_of_the_draft_vocabulary_is_printed_and_recorded(asked, tmp_path, model_folder, data, capsys):
    train(resolve(None, asked(**EAGLE3, steps=1)))
    ids, dataset = set(ids_of(tmp_path / "heads")), dataset_of(model_folder, data)
    answers = [token for text in dataset.texts for token, is_answer in zip(text.tokens, text.mask, strict=True) if is_answer]
    share = sum(token in ids for token in answers) / len(answers)
    assert 0 < share < 1
    assert formats.describe(tmp_path / "heads").training["coverage"] == pytest.approx(share, abs=1e-5)
    assert f"they can draft {share:.2%} of the answers' tokens" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (2, "draft_vocab is 2; it must be at least 4, the number of special tokens, and at most 320, the number of all"),
        (321, "draft_vocab is 321; it must be at least 4"),
        (0, "draft_vocab is 0"),
    ],
)
def test_an_impossible_draft_vocabulary_is_one_sentence(asked, size, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(resolve(None, asked(method="eagle3", settings={"draft_vocab": size})))


def test_a_warm_start_keeps_the_draft_vocabulary(asked, tmp_path):
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other.jsonl"
    train(resolve(None, asked(**EAGLE3, out=first, steps=3)))
    turns = [{"role": "user", "content": "猫"}, {"role": "assistant", "content": "猫は魚が好きです。" * 9}]
    other.write_text(json.dumps({"messages": turns}))
    more = asked(method="eagle3", settings={}, start=str(first), data=[other], steps=1, learning_rate=1e-12)
    train(resolve(None, more | {"out": second}))
    assert ids_of(second) == ids_of(first)
    for name, tensor in load_file(first / "model.safetensors").items():
        torch.testing.assert_close(load_file(second / "model.safetensors")[name], tensor, rtol=0, atol=1e-9)
    train(resolve(None, more | {"out": tmp_path / "new", "start": None, "settings": EAGLE3["settings"]}))
    assert ids_of(tmp_path / "new") != ids_of(first)
    with pytest.raises(ValueError, match=r"cannot go on with other shapes .*draft_vocab 60 is now 61"):
        train(resolve(None, more | {"out": tmp_path / "third", "settings": {"draft_vocab": 61}}))


def test_a_warm_start_accepts_a_draft_vocabulary_smaller_than_the_special_tokens(asked, tmp_path, model_folder):
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    target_info, config = (
        formats.describe_target(model, tokenizer),
        Eagle3.resolve_config(Eagle3Config(draft_vocab=2), model.config),
    )
    assert len(special_ids(tokenizer)) > 2
    formats.save(tmp_path / "few", Eagle3(config, target_info.hidden, target_info.vocab), target_info, {})
    train(resolve(None, asked(method="eagle3", settings={}, start=str(tmp_path / "few"), steps=1, out=tmp_path / "more")))
    assert ids_of(tmp_path / "more") == [0, 1]


def test_losses_over_a_draft_vocabulary_are_sums_over_it_with_the_targets_probabilities():
    """Five tokens, of which 0, 2 and 3 are in the draft vocabulary; the text's tokens are 2 and 4."""
    torch.manual_seed(0)
    ids, logits, target_logits, tokens = torch.tensor([0, 2, 3]), torch.randn(2, 3), torch.randn(2, 5), torch.tensor([2, 4])
    q, p = logits.softmax(-1), target_logits.softmax(-1)[:, [0, 2, 3]]
    overlap, kl = torch.minimum(p, q).sum(-1), (p * (p / q).log()).sum(-1)
    mix = torch.exp(-3 * overlap)
    expected = {
        "hard": torch.stack([-q[0, 1].log(), torch.tensor(0.0)]),
        "soft": -(p * q.log()).sum(-1),
        "tv": 1 - overlap,
        "alpha": -overlap.log(),
        "lk": mix * kl + (1 - mix) * (1 - overlap),
    }
    for name, loss in expected.items():
        torch.testing.assert_close(Objective(**{name: 2.0})(logits, tokens, target_logits, ids), 2 * loss, rtol=1e-5, atol=1e-6)


def test_a_token_outside_the_draft_vocabulary_is_never_a_hit_and_has_no_hard_loss():
    heads = heads_for(tiny(), "eagle3.1, 40 tokens")
    ids = heads.ids.tolist()
    missing = next(token for token in range(97) if token not in ids)
    tokens, states = torch.tensor([missing, ids[5]]), torch.randn(2, heads.width, dtype=torch.float64, requires_grad=True)
    loss, hits = chunked_loss(heads.output_head(0), states, tokens, None, Objective(hard=1.0), heads.embed_head.logits)
    (gradient,) = torch.autograd.grad(loss, states)
    assert not hits[0]
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()


# -- unrolled steps --


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "eagle3.1, 40 tokens"])
def test_an_unrolled_step_attends_to_the_text_and_to_its_own_chain(kind):
    """At each root, the chain step by step: the pairs of the text up to the root, then the pairs that the heads made."""
    heads = heads_for(tiny(), kind).eval()
    batch = batch_of(torch.tensor(TEXTS[:1]), taps=heads.taps)
    outputs, embedded, projected = list(heads.states(batch)), heads.embed(batch.tokens), heads.project_taps(batch.features)
    for root in range(5):
        states = projected[:, : root + 1]
        for step, output in enumerate(outputs):
            pairs = heads.layer_input(states, embedded[:, 1 : root + step + 2])
            made = heads.next_state(heads.block(inputs_embeds=pairs, use_cache=False).last_hidden_state)
            torch.testing.assert_close(made[:, -1], output.states[:, root], rtol=0, atol=1e-12)
            states = torch.cat([states, made[:, -1:]], 1)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_the_loss_of_the_second_step_has_gradients_in_the_first(kind):
    """The second state alone has a gradient in the input and in the state of the first step."""
    heads = heads_for(tiny(), kind).eval()
    batch = batch_of(torch.tensor(TEXTS[:1]), taps=heads.taps)
    states = [output.states for output in heads.states(batch)]
    through = torch.autograd.grad(states[1][0, 4].square().sum(), [heads.fc.weight, states[0]], retain_graph=True)
    alone = torch.autograd.grad(states[0][0, 4].square().sum(), heads.fc.weight)[0]
    assert not torch.allclose(through[0], alone)
    assert through[1][0].abs().sum(-1).nonzero().flatten().tolist() == [4]  # its own chain only


@pytest.mark.parametrize("keys", [EAGLE, EAGLE3], ids=["eagle", "eagle3"])
def test_the_number_of_unrolled_steps_changes_the_weights(asked, tmp_path, keys):
    for steps in (1, 2):
        own = keys | {"settings": keys["settings"] | {"steps": steps}}
        train(resolve(None, asked(**own, out=tmp_path / str(steps), steps=1)))
    one, two = (load_file(tmp_path / name / "model.safetensors")["fc.weight"] for name in "12")
    assert not torch.equal(one, two)


# -- the regression loss of EAGLE --


def test_the_regression_loss_is_smooth_l1_to_the_next_hidden_state_of_the_target():
    """Two steps, a text whose answer begins at token 4, and the definition of smooth L1 at each position."""
    heads = heads_for(tiny(), "eagle", num_heads=2).eval()
    batch, objective = batch_of(torch.tensor(TEXTS[:1]), first_answer=4), Objective(hard=1.0, decay=0.5)
    regression = torch.zeros(())
    for depth, output in enumerate(heads.states(batch), 1):
        for position in range(3, 10 - depth - 1):  # the root is token position + 1, the draft is token position + 1 + depth
            gap = (output.states[0, position] - batch.last_hidden[0, position + depth]).float().abs()
            regression = regression + 0.5 ** (depth - 1) * torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()
    cross_entropies = [F.cross_entropy(*_logits(heads, batch, depth), reduction="sum").float() for depth in (1, 2)]
    loss, _ = heads.loss(batch, objective)
    torch.testing.assert_close(
        loss.float(), cross_entropies[0] + 0.5 * cross_entropies[1] + heads.config.regression * regression, rtol=1e-5, atol=1e-5
    )


def _logits(heads, batch, depth):
    """Logits and tokens of a depth, where root and drafts are tokens of the answer."""
    output = list(heads.states(batch))[depth - 1]
    return output.output_head(output.states[0, 3 : 9 - depth]), batch.tokens[0, 4 + depth :]


def test_a_regression_weight_of_0_adds_no_loss():
    heads, batch = heads_for(tiny(), "eagle").eval(), batch_of(torch.tensor(TEXTS[:1]))
    without_norms = (
        type(heads)(heads.config.model_copy(update={"regression": 0.0}), heads.hidden, heads.vocab).double().bind(heads.embed_head)
    )
    without_norms.load_state_dict(heads.state_dict())
    loss, metrics = without_norms.eval().loss(batch, Objective())
    torch.testing.assert_close(loss, metrics.losses.sum())
    assert heads.loss(batch, Objective())[0] > loss


def test_the_regression_loss_has_no_gradient_in_the_target():
    """The hidden states of the target are labels, even where the target is trained as well."""
    heads, batch = heads_for(tiny(), "eagle").eval(), batch_of(torch.tensor(TEXTS[:1]))
    last_hidden = batch.last_hidden.clone().requires_grad_()
    loss, _ = heads.loss(type(batch)(batch.tokens, batch.loss_mask, batch.features, last_hidden), Objective(hard=1.0))
    in_target, in_heads = torch.autograd.grad(loss, [last_hidden, heads.fc.weight], allow_unused=True)
    assert in_target is None
    assert in_heads.abs().sum() > 0


def test_layers_of_another_width_than_their_input_are_refused():
    narrow = llama_block(32)
    with pytest.raises(ValueError, match="hidden size of 32, the target and its embedding, which it reads, one of 64"):
        Eagle3(Eagle3Config(block=narrow, taps=(0,)), 64, 97)
    heads = Eagle3(Eagle3Config(block=narrow, taps=(0,), embedding="own"), 64, 97).double().bind(tiny().embed_head)
    with pytest.raises(ValueError, match="an embedding 32 wide cannot begin as the target's of 64"):
        heads.init_from_target()


def test_a_target_without_the_tapped_layers_is_refused_before_drafting():
    heads = Eagle3(Eagle3Config(taps=(0, 3)), 64, 97)
    with pytest.raises(ValueError, match=r"these eagle3 heads read layer 3, counted from 0, and .* has 3; use them with the model"):
        heads.attach(tiny(), Seating(1, 64))


def test_a_layer_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match="layer 5 is named twice"):
        Eagle3Config(taps=(0, 5, 5))


def test_two_norms_of_the_same_taps_are_refused():
    with pytest.raises(ValueError, match="norm_before_fc and fc_norm are both true"):
        Eagle3Config(norm_before_fc=True)
