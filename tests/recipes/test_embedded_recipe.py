"""The recipe of the embedded model, on made-up text: allowed sources, their shares, and growing without a change of logits."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.embedded.grow import grow, layer_indices
from recipes.embedded.measure import agreement, held_out_losses
from recipes.embedded.mix import mix
from recipes.embedded.prepare import encode, train_tokenizer
from recipes.embedded.sources import SOURCES, Document, documents, is_allowed

TALK = ({"role": "user", "content": "Who came?"}, {"role": "assistant", "content": "The goat came home."})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The goat came home. The goat ate 1234 apples."] * 4, vocab=280)


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


def test_the_closing_mark_of_a_story_is_removed(tmp_path):
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


def test_documents_are_packed_with_an_end_token_after_each(tokenizer):
    stream = encode([Document(key="a", text="goat"), Document(key="b", messages=TALK)], tokenizer)
    text = tokenizer.decode(stream)
    talk = "<|user|>\nWho came?<|end|>\n<|assistant|>\nThe goat came home.<|end|>"
    assert stream.dtype == np.uint16
    assert text == f"goat<|endoftext|>{talk}<|endoftext|>"


def test_a_digit_is_a_token(tokenizer):
    assert len(tokenizer("1234")["input_ids"]) == 4


def test_the_loss_mask_of_the_template_is_the_assistants_answer(tokenizer):
    encoded = tokenizer.apply_chat_template(list(TALK), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(answer) == "The goat came home.<|end|>"


def test_each_source_is_read_as_often_as_its_share_requires():
    sources = {"a": {"share": 0.75, "train_tokens": 3000}, "b": {"share": 0.25, "train_tokens": 50}}
    keys = mix({"out": "x"}, sources, Path("tokens"), 1000)
    assert keys["times"] == {"tokens/a.train.npy": 0.25, "tokens/b.train.npy": 5.0}
    assert (keys["data"], keys["epochs"], keys["out"]) == (list(keys["times"]), 1, "x")


def new_model(vocab, seed=0, **shape):
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1} | shape
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, tie_word_embeddings=True, **sizes)).eval()


@pytest.mark.parametrize(
    "shape", [{"num_hidden_layers": 3}, {"intermediate_size": 48}, {"num_hidden_layers": 5, "intermediate_size": 40}]
)
def test_a_grown_model_has_the_logits_of_the_smaller_one(shape):
    small, large, text = new_model(50), new_model(50, 1, **shape), torch.randint(50, (2, 9))
    assert not torch.allclose(small(text).logits, large(text).logits)
    torch.testing.assert_close(grow(small, large)(text).logits, small(text).logits)


def test_the_layers_added_by_growing_have_gradients():
    large = grow(new_model(50), new_model(50, 1, num_hidden_layers=3, intermediate_size=48))
    large(torch.randint(50, (2, 9))).logits.square().sum().backward()
    new = large.model.layers[({0, 1, 2} - set(layer_indices(2, 3))).pop()]
    assert new.self_attn.o_proj.weight.grad.abs().max() > 0


def test_a_model_of_another_width_cannot_grow():
    with pytest.raises(ValueError, match="only layers and MLPs can grow"):
        grow(new_model(50), new_model(60))


def test_a_model_agrees_with_itself_and_a_new_one_has_the_loss_of_chance(tokenizer):
    model = new_model(280)
    streams = {"a": np.arange(100, dtype=np.uint16)}
    assert agreement(model, model, streams)["a"] == {"greedy": 1.0, "sampled": 1.0}
    assert held_out_losses(model, streams)["a"] == pytest.approx(np.log(280), abs=0.2)
