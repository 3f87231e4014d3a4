"""Training EAGLE heads: reduced vocabularies, what an unrolled step sees, their losses by hand, and runs that go on."""

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from heads import heads_for
from safetensors.torch import load_file
from teacher_forcing import TEXTS, batch_of
from tiny import tiny
from training_runs import assert_same_bits, dataset_of, killed, log

import headstart
from headstart import formats as checkpoint
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
def test_they_learn_what_follows_and_draft_the_same_text(asked, tmp_path, data, model_folder, keys):
    told = train(resolve(None, asked(**keys, steps=60, learning_rate=0.01, held_out=data, loss={"hard": 1})))
    losses = log(tmp_path / "heads")
    assert losses[-1] < 0.7 * losses[0]
    assert told["held_out_tau"] > 1.1
    answers = [
        headstart.load(model_folder, drafter=drafter, device="cpu").generate("the cat", max_tokens=24, temperature=0.7, seed=3)[0]
        for drafter in (str(tmp_path / "heads"), None)
    ]
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize("at", ["step:4", "written:6"])
@pytest.mark.parametrize("keys", [EAGLE, EAGLE3], ids=["eagle, with its noise", "eagle3, with its own vocabulary"])
def test_a_killed_run_goes_on_to_the_same_bits(asked, tmp_path, keys, at):
    train(resolve(None, asked(**keys, out=tmp_path / "whole")))
    config = resolve(None, asked(**keys))
    killed(config, at)
    train(config, resume=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "heads")
    assert log(tmp_path / "heads") == log(tmp_path / "whole")


def test_noise_is_drawn_anew_at_every_step_and_never_when_nothing_is_learned(asked, tmp_path, data):
    """A rate so small that nothing changes: the same texts again and again, in one batch."""
    common = {"steps": 3, "rows": 16, "learning_rate": 1e-20, "held_out": data, "eval_every": 1, "save_every": 9}
    train(resolve(None, asked(method="eagle", settings={"noise": 1.0}, **common)))
    assert len(set(log(tmp_path / "heads"))) == 3
    assert len(set(log(tmp_path / "heads", "held_out_loss"))) == 1


def test_all_depths_are_measured_and_only_the_steps_are_learned(asked, tmp_path, data):
    told = train(resolve(None, asked(**EAGLE3, steps=2, held_out=data)))
    assert [len(shares) for shares in log(tmp_path / "heads", "top1")] == [2, 2]
    assert len(told["held_out_top1"]) == 4


def test_states_of_several_layers_can_come_from_a_store(asked, tmp_path):
    for name in ("computed", "stored", "again"):
        store = None if name == "computed" else tmp_path / "store"
        train(resolve(None, asked(**EAGLE3, out=tmp_path / name, features=store)))
    assert_same_bits(tmp_path / "stored", tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("computed", "stored"))
    for key, tensor in one.items():  # a text alone is rounded otherwise than in a batch
        torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keys", [EAGLE, EAGLE3], ids=["eagle", "eagle3"])
def test_a_target_may_learn_with_them(asked, tmp_path, keys):
    out = tmp_path / "joint"
    train(resolve(None, asked(**keys, out=str(out), joint={"mode": "full", "base": "ce"}, steps=4, learning_rate=1e-2)))
    heads = headstart.load(out / "model", drafter=str(out), device="cpu").generate("the cat", max_tokens=12)[0]
    plain = headstart.load(out / "model", drafter=None, device="cpu").generate("the cat", max_tokens=12)[0]
    assert heads.token_ids == plain.token_ids


# -- a reduced vocabulary --


def ids_of(folder):
    return load_file(folder / "model.safetensors")["ids"].tolist()


def test_it_holds_the_special_tokens_and_what_answers_say_most(asked, tmp_path, model_folder, data):
    train(resolve(None, asked(**EAGLE3, steps=1)))
    dataset, special = dataset_of(model_folder, data), special_ids(load_tokenizer(model_folder))
    said = Counter(token for text in dataset.texts for token, is_said in zip(text.tokens, text.mask, strict=True) if is_said)
    ids = ids_of(tmp_path / "heads")
    assert ids == sorted(set(ids))
    assert len(ids) == 60
    assert special <= set(ids)
    assert min(said[token] for token in set(ids) - special) >= max(said[token] for token in set(said) - set(ids))


def test_how_much_of_the_answers_it_covers_is_told_and_kept(asked, tmp_path, model_folder, data, capsys):
    train(resolve(None, asked(**EAGLE3, steps=1)))
    ids, dataset = set(ids_of(tmp_path / "heads")), dataset_of(model_folder, data)
    said = [token for text in dataset.texts for token, is_said in zip(text.tokens, text.mask, strict=True) if is_said]
    share = sum(token in ids for token in said) / len(said)
    assert 0 < share < 1
    assert checkpoint.describe(tmp_path / "heads").training["coverage"] == pytest.approx(share, abs=1e-5)
    assert f"they can draft {share:.2%} of the answers' tokens" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (2, "draft_vocab is 2; it must be at least 4, the number of special tokens, and at most 320, the number of all"),
        (321, "draft_vocab is 321; it must be at least 4"),
        (0, "draft_vocab is 0"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_one_sentence(asked, wanted, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(resolve(None, asked(method="eagle3", settings={"draft_vocab": wanted})))


def test_heads_that_go_on_keep_the_vocabulary_they_have(asked, tmp_path):
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


def test_heads_of_fewer_words_than_there_are_special_tokens_go_on_too(asked, tmp_path, model_folder):
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    target_info, config = (
        checkpoint.describe_target(model, tokenizer),
        Eagle3.resolve_config(Eagle3Config(draft_vocab=2), model.config),
    )
    assert len(special_ids(tokenizer)) > 2
    checkpoint.save(tmp_path / "few", Eagle3(config, target_info.hidden, target_info.vocab), target_info, {})
    train(resolve(None, asked(method="eagle3", settings={}, start=str(tmp_path / "few"), steps=1, out=tmp_path / "more")))
    assert ids_of(tmp_path / "more") == [0, 1]


def test_losses_over_kept_tokens_are_sums_over_these_with_the_teachers_own_masses():
    """Five tokens, of which 0, 2 and 3 can be said; the text's tokens are 2 and 4."""
    torch.manual_seed(0)
    ids, logits, taught, tokens = torch.tensor([0, 2, 3]), torch.randn(2, 3), torch.randn(2, 5), torch.tensor([2, 4])
    q, p = logits.softmax(-1), taught.softmax(-1)[:, [0, 2, 3]]
    overlap, kl = torch.minimum(p, q).sum(-1), (p * (p / q).log()).sum(-1)
    mix = torch.exp(-3 * overlap)
    wanted = {
        "hard": torch.stack([-q[0, 1].log(), torch.tensor(0.0)]),
        "soft": -(p * q.log()).sum(-1),
        "tv": 1 - overlap,
        "alpha": -overlap.log(),
        "lk": mix * kl + (1 - mix) * (1 - overlap),
    }
    for name, loss in wanted.items():
        torch.testing.assert_close(Objective(**{name: 2.0})(logits, tokens, taught, ids), 2 * loss, rtol=1e-5, atol=1e-6)


def test_a_token_that_cannot_be_said_is_never_a_hit_and_teaches_hard_loss_nothing():
    heads = heads_for(tiny(), "eagle3.1, 40 tokens")
    ids = heads.ids.tolist()
    missing = next(token for token in range(97) if token not in ids)
    tokens, states = torch.tensor([missing, ids[5]]), torch.randn(2, heads.width, dtype=torch.float64, requires_grad=True)
    loss, hits = chunked_loss(heads.output_head(0), states, tokens, None, Objective(hard=1.0), heads.embed_head.logits)
    (gradient,) = torch.autograd.grad(loss, states)
    assert not hits[0]
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()


# -- what a step sees --


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "eagle3.1, 40 tokens"])
def test_an_unrolled_step_sees_what_was_there_and_its_own_chain(kind):
    """Behind each place t, the chain literally: the pairs up to t, then one pair after another of what it made itself."""
    heads = heads_for(tiny(), kind).eval()
    batch = batch_of(torch.tensor(TEXTS[:1]), taps=heads.taps)
    guesses, embedded, received = list(heads.states(batch)), heads.embed(batch.tokens), heads.project_taps(batch.features)
    for place in range(5):
        states = received[:, : place + 1]
        for step, guess in enumerate(guesses):
            pairs = heads.layer_input(states, embedded[:, 1 : place + step + 2])
            made = heads.next_state(heads.block(inputs_embeds=pairs, use_cache=False).last_hidden_state)
            torch.testing.assert_close(made[:, -1], guess.states[:, place], rtol=0, atol=1e-12)
            states = torch.cat([states, made[:, -1:]], 1)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_second_step_teaches_through_the_first(kind):
    """The loss of the second guess alone has a gradient in what the first one read and made."""
    heads = heads_for(tiny(), kind).eval()
    batch = batch_of(torch.tensor(TEXTS[:1]), taps=heads.taps)
    states = [guess.states for guess in heads.states(batch)]
    through = torch.autograd.grad(states[1][0, 4].square().sum(), [heads.fc.weight, states[0]], retain_graph=True)
    alone = torch.autograd.grad(states[0][0, 4].square().sum(), heads.fc.weight)[0]
    assert not torch.allclose(through[0], alone)
    assert through[1][0].abs().sum(-1).nonzero().flatten().tolist() == [4]  # its own chain, nobody else's


@pytest.mark.parametrize("keys", [EAGLE, EAGLE3], ids=["eagle", "eagle3"])
def test_more_steps_change_what_is_learned(asked, tmp_path, keys):
    for steps in (1, 2):
        own = keys | {"settings": keys["settings"] | {"steps": steps}}
        train(resolve(None, asked(**own, out=tmp_path / str(steps), steps=1)))
    one, two = (load_file(tmp_path / name / "model.safetensors")["fc.weight"] for name in "12")
    assert not torch.equal(one, two)


# -- EAGLE's distance --


def test_the_distance_is_smooth_l1_to_the_state_that_the_target_will_have():
    """Two steps, a text of which an answer begins at token 4, and the definition of smooth L1, place by place."""
    heads = heads_for(tiny(), "eagle", num_heads=2).eval()
    batch, objective = batch_of(torch.tensor(TEXTS[:1]), first_answer=4), Objective(hard=1.0, decay=0.5)
    apart = torch.zeros(())
    for depth, guess in enumerate(heads.states(batch), 1):
        for place in range(3, 10 - depth - 1):  # the root is token place + 1, the guess is token place + 1 + depth
            gap = (guess.states[0, place] - batch.last_hidden[0, place + depth]).float().abs()
            apart = apart + 0.5 ** (depth - 1) * torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()
    laws = F.cross_entropy(*_said(heads, batch, 1), reduction="sum") + 0.5 * F.cross_entropy(
        *_said(heads, batch, 2), reduction="sum"
    )
    loss, _ = heads.loss(batch, objective)
    torch.testing.assert_close(loss.float(), laws.float() + heads.config.regression * apart, rtol=1e-5, atol=1e-5)


def _said(heads, batch, depth):
    """Logits and tokens of a depth where both root and guesses are an answer's."""
    guess = list(heads.states(batch))[depth - 1]
    return guess.output_head(guess.states[0, 3 : 9 - depth]), batch.tokens[0, 4 + depth :]


def test_a_distance_of_weight_nothing_is_none():
    heads, batch = heads_for(tiny(), "eagle").eval(), batch_of(torch.tensor(TEXTS[:1]))
    without_norms = (
        type(heads)(heads.config.model_copy(update={"regression": 0.0}), heads.hidden, heads.vocab).double().bind(heads.embed_head)
    )
    without_norms.load_state_dict(heads.state_dict())
    loss, metrics = without_norms.eval().loss(batch, Objective())
    torch.testing.assert_close(loss, metrics.losses.sum())
    assert heads.loss(batch, Objective())[0] > loss


def test_the_distance_never_pulls_at_the_target():
    """The states to come are what is learned from, where the target learns as well."""
    heads, batch = heads_for(tiny(), "eagle").eval(), batch_of(torch.tensor(TEXTS[:1]))
    last_hidden = batch.last_hidden.clone().requires_grad_()
    loss, _ = heads.loss(type(batch)(batch.tokens, batch.loss_mask, batch.features, last_hidden), Objective(hard=1.0))
    pulled, learned = torch.autograd.grad(loss, [last_hidden, heads.fc.weight], allow_unused=True)
    assert pulled is None
    assert learned.abs().sum() > 0


def test_layers_of_another_width_than_what_they_read_are_refused():
    narrow = llama_block(32)
    with pytest.raises(ValueError, match="hidden size of 32, the target and its embedding, which it reads, one of 64"):
        Eagle3(Eagle3Config(block=narrow, taps=(0,)), 64, 97)
    heads = Eagle3(Eagle3Config(block=narrow, taps=(0,), embedding="own"), 64, 97).double().bind(tiny().embed_head)
    with pytest.raises(ValueError, match="an embedding 32 wide cannot begin as the target's of 64"):
        heads.init_from_target()


def test_a_target_without_the_layers_that_are_read_is_refused_before_it_drafts():
    heads = Eagle3(Eagle3Config(taps=(0, 3)), 64, 97)
    with pytest.raises(ValueError, match=r"these eagle3 heads read layer 3, counted from 0, and .* has 3; use them with the model"):
        heads.attach(tiny(), Seating(1, 64))


def test_a_layer_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match="layer 5 is named twice"):
        Eagle3Config(taps=(0, 5, 5))


def test_two_norms_of_the_same_taps_are_refused():
    with pytest.raises(ValueError, match="norm_before_fc and fc_norm are both true"):
        Eagle3Config(norm_before_fc=True)
