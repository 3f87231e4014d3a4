"""Suites of prompts: what is shipped, what is elsewhere, and conversations of several messages."""

import json
import sys
from types import SimpleNamespace

import pytest

import headstart
from headstart.bench import elsewhere, suites
from headstart.bench.suites import Case, load_cases
from headstart.bench.tasks import encode_prompt_sets, read_prompt_sets, with_answers
from headstart.speculation.params import SamplingParams
from headstart.text.tokenizer import encode_prompt

SIZES = {"mt-bench": 16, "gsm8k": 16, "humaneval": 16, "summaries": 6, "translation": 8, "qa": 8, "retrieval": 6}


@pytest.fixture(scope="module")
def llm(model_folder):
    with headstart.load(model_folder, drafter=None) as llm:
        yield llm


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_a_shipped_suite_has_its_prompts_and_a_line_in_the_licence_table(name, size):
    cases = load_cases(name)
    assert len(cases) == size == len({case.prompt for case in cases})
    assert SIZES.keys() == set(suites.SHIPPED)
    assert f"`{name}.jsonl`" in (suites.FOLDER / "README.md").read_text()


def test_the_categories_are_those_of_spec_bench():
    sets = read_prompt_sets(["categories"])
    assert list(sets) == ["conversation", "translation", "summaries", "qa", "maths", "retrieval"]
    assert {len(cases) for cases in sets.values()} == {6}
    assert all(len(case.following) == 1 for case in sets["conversation"])


def test_the_category_in_a_file_is_the_kind_of_its_prompts(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [{"prompt": "a", "category": "x"}, {"prompt": "b"}, {"prompt": "c", "category": "x"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {name: [case.prompt for case in cases] for name, cases in read_prompt_sets([str(path)]).items()} == {
        "x": ["a", "c"],
        "mine": ["b"],
    }
    assert list(read_prompt_sets([str(path), "qa"], 2)) == ["mine/x", "mine", "qa/qa"]


@pytest.mark.parametrize("name", elsewhere.ELSEWHERE)
def test_a_suite_that_is_not_shipped_says_where_to_get_it(name, monkeypatch):
    monkeypatch.setattr(elsewhere, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is not shipped; get its JSONL file from https://.* and pass --prompts FILE"):
        load_cases(name)


def test_a_suite_of_the_hub_is_read_where_datasets_is_installed(monkeypatch):
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return iter([{"article": "News.", "highlights": "New."}] * 3)

    monkeypatch.setattr(elsewhere, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_cases("cnn-dailymail", 2) == [Case("Summarize: News.", "New.")] * 2
    assert asked == [(("abisee/cnn_dailymail", "3.0.0"), {"split": "test", "streaming": True})]


def test_a_hub_that_cannot_be_read_is_one_sentence(monkeypatch):
    def load_dataset(*arguments, **settings):
        raise OSError("no route\nto host")

    monkeypatch.setattr(elsewhere, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"cannot be read from the hub .*: no route to host; get its JSONL file"):
        load_cases("gsm8k-all")


# -- conversations --


def test_a_second_message_is_asked_with_the_answer_of_plain_decoding(llm):
    params = SamplingParams(max_tokens=5, seed=1, ignore_eos=True)
    first, second = with_answers(llm, [Case("the cat", following=(Case("and the sea"),))], params)
    (answer,) = llm.chat("the cat", params)
    assert (first, second) == (Case("the cat"), Case("and the sea", history=(("the cat", answer.text),)))
    tasks, _ = encode_prompt_sets(llm, {"set": [first, second]}, 5)
    messages = [("user", "the cat"), ("assistant", answer.text), ("user", "and the sea")]
    expected = encode_prompt(llm.tokenizer, [{"role": role, "content": text} for role, text in messages])
    assert tasks[1].prompt == tuple(expected)
    assert [(task.kind, task.text) for task in tasks] == [("set", "the cat"), ("set", "and the sea")]


def test_a_second_message_follows_the_reference_where_there_is_one(llm):
    case = Case("one", "yes", following=(Case("two", "no"), Case("three", "maybe")))
    asked = with_answers(llm, [case], SamplingParams(max_tokens=5))
    assert [turn.history for turn in asked] == [(), (("one", "yes"),), (("one", "yes"), ("two", "no"))]


def test_a_conversation_ends_where_its_answer_would_exceed_the_context(llm):
    asked = with_answers(llm, [Case("the cat", following=(Case("and"),)), Case("a")], SamplingParams(max_tokens=5000))
    assert [turn.prompt for turn in asked] == ["the cat", "a"]
