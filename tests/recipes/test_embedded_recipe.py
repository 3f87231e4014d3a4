"""The recipe of the embedded model, on made-up text: what it may read, how it packs, that it survives a kill."""

import gzip
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.embedded.measure import agreement, held_out_losses
from recipes.embedded.mixture import LONG_EVERY, Mixture
from recipes.embedded.prepare import encode, train_tokenizer
from recipes.embedded.pretrain import Plan, Run, export, loss_of, new_model, new_optimizers, train
from recipes.embedded.sources import SOURCES, Document, documents, is_allowed

TINY = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}
TALK = ({"role": "user", "content": "Who came?"}, {"role": "assistant", "content": "The goat came home."})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The goat came home. The goat ate 1234 apples."] * 4, vocab=280)


def new_run(tokenizer, seed=0):
    model = new_model(TINY, tokenizer, seed)
    streams = {"odd": np.arange(1, 200, 2, dtype=np.uint16), "even": np.arange(0, 90, 2, dtype=np.uint16)}
    return Run(model, new_optimizers(model), Mixture(streams, {"odd": 0.5, "even": 0.5}))


def source(name):
    return next(s for s in SOURCES if s.name == name)


def write_rows(data, file, rows):
    (data / "train").mkdir(exist_ok=True)
    with gzip.open(data / "train" / file, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_story_without_a_free_licence_is_not_read(tmp_path):
    row = {"source": "african_storybook", "title": "T", "text": "Once."}
    licences = ["CC-BY", "CC-BY-NC", "CC BY-NC-SA", "CC-BY-ND", "unknown"]
    write_rows(tmp_path, "stories_simple.jsonl.gz", [{**row, "text": name, "license": name} for name in licences])
    assert [d.text for d in documents(source("african_storybook"), tmp_path)] == ["T\n\nCC-BY"]
    assert [d.messages[1]["content"] for d in documents(source("story_requests"), tmp_path)] == ["CC-BY"]


def test_the_mark_that_closes_a_story_is_not_read(tmp_path):
    row = {"source": "pratham_storyweaver", "license": "CC-BY", "title": "T", "text": "He slept.\r\nThe end. ##"}
    write_rows(tmp_path, "stories_simple.jsonl.gz", [row])
    assert [d.text for d in documents(source("pratham_storyweaver"), tmp_path)] == ["T\n\nHe slept.\nThe end."]
    assert [d.messages[1]["content"] for d in documents(source("story_requests"), tmp_path)] == ["He slept.\nThe end."]


def test_a_source_that_is_not_listed_is_not_read(tmp_path):
    rows = [{"source": name, "messages": TALK} for name in ("alpaca_subset", "dolly_3k", "lima")]
    write_rows(tmp_path, "instruct_sft.jsonl.gz", rows)
    listed = [s for s in SOURCES if s.file == "instruct_sft.jsonl.gz"]
    assert sum(len(list(documents(s, tmp_path))) for s in listed) == 1


def test_books_are_chosen_by_author():
    assert is_allowed({"source": "classic_books", "path": "Lewis Carroll/Through the Looking-Glass.md"})
    assert not is_allowed({"source": "classic_books", "path": "D.H. Lawrence/Sons and Lovers.md"})


def test_no_licence_forbids_commerce_and_the_shares_sum_to_one():
    assert not [s for s in SOURCES if "NC" in s.licence or "ND" in s.licence]
    assert sum(s.share for s in SOURCES) == pytest.approx(1)


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"dialogues\.jsonl\.gz is missing; --data must name"):
        list(documents(source("sgd"), tmp_path))


def test_a_story_and_its_request_are_held_out_together():
    sides = [Document(key=f"story {n}").is_held_out for n in range(500)]
    assert sides == [Document(key=f" Story {n} ", messages=TALK).is_held_out for n in range(500)]
    assert 5 < sum(sides) < 40


def test_documents_are_chained_with_an_end_after_each(tokenizer):
    stream = encode([Document(key="a", text="goat"), Document(key="b", messages=TALK)], tokenizer)
    text = tokenizer.decode(stream)
    talk = "<|user|>\nWho came?<|end|>\n<|assistant|>\nThe goat came home.<|end|>"
    assert stream.dtype == np.uint16
    assert text == f"goat<|endoftext|>{talk}<|endoftext|>"


def test_a_digit_is_a_token(tokenizer):
    assert len(tokenizer("1234")["input_ids"]) == 4


def test_the_template_marks_what_the_assistant_says(tokenizer):
    said = tokenizer.apply_chat_template(list(TALK), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(said["input_ids"], said["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "The goat came home.<|end|>"


def test_every_token_is_a_target_once_before_any_is_twice():
    mixture = Mixture({"a": np.arange(40, dtype=np.uint16)}, {"a": 1.0})
    targets = torch.cat([mixture.batch(rows=2, length=5)[:, 1:].flatten() for _ in range(4)])
    assert sorted(targets.tolist()) == list(range(40))


def test_sources_are_dealt_by_their_shares():
    mixture = Mixture({n: np.arange(9, dtype=np.uint16) for n in "abc"}, {"a": 0.5, "b": 0.25, "c": 0.25})
    mixture.batch(rows=40, length=4)
    assert mixture.state() == {"a": 80, "b": 40, "c": 40}


def test_one_batch_in_four_has_long_rows():
    mixture = Mixture({"a": np.arange(9, dtype=np.uint16)}, {"a": 1.0})
    shapes = [tuple(mixture.batch_of_step(step, rows=4, length=6).shape) for step in range(LONG_EVERY)]
    assert shapes == [(4, 7), (4, 7), (4, 7), (2, 13)]


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="sources without tokens: b"):
        Mixture({"a": np.arange(9), "b": np.arange(0)}, {"a": 0.5, "b": 0.5})


def test_a_budget_is_either_time_or_steps():
    with pytest.raises(ValueError, match="either minutes or steps"):
        Plan()
    with pytest.raises(ValueError, match="either minutes or steps"):
        Plan(minutes=1, steps=1)


def test_the_rate_warms_up_peaks_and_falls():
    plan = Plan(steps=100, learning_rate=1.0)
    rates = [plan.rate(p) for p in (0.0, 0.03, 0.5, 1.0)]
    assert rates[0] < 0.05 < rates[2] < rates[1] < 1.0
    assert rates[3] == pytest.approx(0.02)


def test_a_killed_run_ends_like_one_that_was_left_alone(tokenizer, tmp_path):
    plan = Plan(steps=6, rows=2, length=8, save_every=0)
    whole, killed, resumed = (new_run(tokenizer, seed) for seed in (0, 0, 7))
    train(whole, plan, tmp_path / "whole.pt")

    def kill_after_four_steps(seconds, step):
        if step == 4:
            raise KeyboardInterrupt
        return step / 6

    interrupted = Plan(steps=6, rows=2, length=8, save_every=0)
    object.__setattr__(interrupted, "progress", kill_after_four_steps)
    with pytest.raises(KeyboardInterrupt):
        train(killed, interrupted, tmp_path / "killed.pt")
    train(resumed, plan, tmp_path / "killed.pt")

    assert (resumed.step, resumed.tokens) == (whole.step, whole.tokens)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_training_lowers_the_loss(tokenizer, tmp_path):
    run = new_run(tokenizer)
    batch = run.mixture.batch(rows=4, length=8)
    before = loss_of(run.model, None, batch).item()
    train(run, Plan(steps=15, rows=4, length=8), tmp_path / "run.pt")
    assert loss_of(run.model, None, batch).item() < before


def test_a_draft_is_taught_by_its_teacher_not_by_the_text(tokenizer):
    """Only the last token is no input: with a teacher, changing it changes nothing."""
    draft, teacher = new_model(TINY, tokenizer, 1), new_model(TINY, tokenizer, 2)
    batch = torch.tensor([[5, 6, 7, 8]])
    other = torch.tensor([[5, 6, 7, 9]])
    assert torch.equal(loss_of(draft, teacher, batch), loss_of(draft, teacher, other))
    assert not torch.equal(loss_of(draft, None, batch), loss_of(draft, None, other))


def test_a_model_agrees_with_itself_and_a_new_one_knows_nothing(tokenizer):
    model = new_model(TINY, tokenizer, 0).eval()
    streams = {"a": np.arange(100, dtype=np.uint16)}
    assert agreement(model, model, streams)["a"] == {"greedy": 1.0, "sampled": 1.0}
    assert held_out_losses(model, streams)["a"] == pytest.approx(np.log(280), abs=0.2)


def test_what_is_exported_loads_with_the_auto_classes(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokens").mkdir()
    np.save(tmp_path / "tokens" / "a.held_out.npy", np.arange(50, dtype=np.uint16))
    run = new_run(tokenizer)
    export(run, tmp_path, tmp_path / "target")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [0, 3]
    assert AutoTokenizer.from_pretrained(tmp_path / "target").get_vocab() == tokenizer.get_vocab()
    assert json.loads((tmp_path / "target.json").read_text())["held_out"].keys() == {"a"}
