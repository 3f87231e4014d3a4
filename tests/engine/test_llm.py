"""`LLM`: chat, planners by name, release of the model, and how it is printed."""

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from folders import TEMPLATE, write_model
from transformers.utils import logging

import headstart
from headstart.engine.stats import Stats
from headstart.speculation.planner import Best, Chain, StaticTree
from headstart.target.tokenizer_loading import load_tokenizer

QUESTION = "What did the cat say?"
MESSAGES = [{"role": "user", "content": QUESTION}]
SETTINGS = {"max_tokens": 12, "temperature": 0.8, "seed": 3, "ignore_eos": True}
THINKING = "{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}"


@pytest.fixture(scope="module")
def llm(model_folder):
    return headstart.load(model_folder, device="cpu", dtype="float32")


def user_model(folder):
    """A model object as users have it, and its tokenizer."""
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)


# -- chat -------------------------------------------------------------------------------------------------------------------


def test_chat_applies_the_chat_template(llm):
    ids = llm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    expected = llm.generate(ids, **SETTINGS)[0].token_ids
    assert llm.chat(QUESTION, **SETTINGS)[0].token_ids == expected
    assert llm.chat(MESSAGES, **SETTINGS)[0].token_ids == expected
    assert llm.chat(QUESTION, headstart.SamplingParams(**SETTINGS))[0].token_ids == expected
    assert llm.generate(QUESTION, **SETTINGS)[0].token_ids != expected  # a string is continued without the template
    assert "".join(map(str, llm.chat_stream(QUESTION, **SETTINGS))) == llm.chat(MESSAGES, **SETTINGS)[0].text
    assert len(llm.chat(QUESTION, n=3, **SETTINGS)) == 3


def test_variables_reach_the_chat_template(tmp_path):
    llm = headstart.load(write_model(tmp_path / "model", template=TEMPLATE + THINKING), device="cpu")
    thinking, silent = (
        llm.chat(QUESTION, chat_template_kwargs=variables, **SETTINGS)[0].token_ids
        for variables in (None, {"enable_thinking": False})
    )
    ids = llm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False, enable_thinking=False)
    assert llm.generate(ids, **SETTINGS)[0].token_ids == silent != thinking
    stream = llm.chat_stream(QUESTION, chat_template_kwargs={"enable_thinking": False}, **SETTINGS)
    assert [token for piece in stream for token in piece.token_ids] == list(silent)


REFUSED = [
    ("", {}, "the message is an empty string"),
    ([], {}, "the conversation is an empty list"),
    ([1, 2], {}, "a conversation is a string or a list of messages, not token ids"),
    (5, {}, "a conversation is a string or a list of messages, not int"),
    (MESSAGES[0], {}, "a conversation is a string or a list of messages, not dict"),
    ([{"role": "user"}], {}, "message 0 has no 'content'"),
    (QUESTION, {"chat_template_kwargs": {"enable_thinkng": False}}, "the chat template of .* takes no variable 'enable_thinkng'"),
    (QUESTION, {"chat_template_kwargs": {"add_generation_prompt": False}}, "takes no variable 'add_generation_prompt'"),
    (QUESTION, {"max_new_tokens": 3}, "did you mean max_tokens"),
    (QUESTION, {"params": {"max_tokens": 3}}, "params is {'max_tokens': 3}; it must be SamplingParams"),
]


@pytest.mark.parametrize(("messages", "settings", "sentence"), REFUSED, ids=[sentence for _, _, sentence in REFUSED])
def test_an_invalid_conversation_is_refused_in_one_sentence(llm, messages, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        llm.chat(messages, **settings)
    with pytest.raises(ValueError, match=sentence):
        llm.chat_stream(messages, **settings)


def test_chat_with_a_model_without_a_chat_template_is_refused(tmp_path):
    llm = headstart.load(write_model(tmp_path / "model", template=None), device="cpu")
    for variables in (None, {"enable_thinking": False}):
        with pytest.raises(ValueError, match="has no chat template: give the prompt as one string"):
            llm.chat(QUESTION, chat_template_kwargs=variables)


@pytest.mark.parametrize("prompts", [5, None, b"The cat", {"role": "user"}], ids=["number", "none", "bytes", "dict"])
def test_a_prompt_of_the_wrong_type_is_refused_in_one_sentence(llm, prompts):
    with pytest.raises(ValueError, match="a prompt is a string, a list of messages or of token ids, not "):
        llm.generate(prompts)


@pytest.mark.slow
def test_the_first_example_of_the_readme_runs_with_the_embedded_model(capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    example, count = re.subn(r'headstart\.load\("[^"]+"\)', 'headstart.load(device="cpu")', example)
    assert count == 1
    exec(example, {})
    story = capsys.readouterr().out
    assert len(story) > 200
    assert "Stats" in story


# -- planners ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "planner"),
    [("chain:5", Chain(5)), ("best:nodes=4", Best(nodes=4)), ("full:2,1", StaticTree.full(2, 1)), (Chain(2), Chain(2))],
)
def test_a_planner_may_be_an_object_or_a_string_as_on_the_command_line(model_folder, spec, planner):
    llm = headstart.load(model_folder, drafter="lookup", planner=spec, device="cpu")
    assert llm.engine.planner == planner


@pytest.mark.parametrize("drafter", ["auto", "mtp", "medusa"])
def test_a_calibrated_tree_is_that_of_the_drafter(drafter):
    llm = headstart.load(drafter=drafter, planner="tree:8", device="cpu")
    assert len(llm.engine.planner.paths) == 8


@pytest.mark.parametrize("drafter", ["auto", "mtp"])
def test_the_trees_of_the_embedded_heads_are_not_those_of_another_model(model_folder, drafter):
    with pytest.raises(ValueError, match=f"planner tree:8 needs trees that were measured, and drafter '{drafter}' has none"):
        headstart.load(model_folder, drafter=drafter, planner="tree:8", device="cpu")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"planner": "chian:5"}, "planner 'chian:5' is unknown; write auto, chain:DEPTH"),
        ({"planner": 5}, "planner is 5; it must be a planner, a string such as 'chain:5', or None"),
        (
            {"planner": "tree:8", "drafter": "lookup"},
            "planner tree:8 needs trees that were measured, and drafter 'lookup' has none",
        ),
        ({"planner": "chain:5", "drafter": None}, "planner is chain:5, but drafter None drafts nothing"),
    ],
)
def test_a_planner_that_does_not_fit_is_refused_before_a_model_is_loaded(settings, sentence, monkeypatch):
    monkeypatch.setattr("headstart.target.target.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=sentence):
        headstart.load(**settings)


def test_a_calibrated_tree_needs_the_name_of_its_heads(llm):
    class UnnamedHeads:
        name = "guess"

    with pytest.raises(ValueError, match="planner tree:8 needs trees that were measured, and a drafter object"):
        headstart.load(drafter=UnnamedHeads(), planner="tree:8")


# -- release ----------------------------------------------------------------------------------------------------------------


def test_release_returns_the_model_and_ends_the_object(model_folder):
    model, tokenizer = user_model(model_folder)
    llm = headstart.load(model, tokenizer=tokenizer, drafter="lookup")
    pieces = iter(llm.stream("The cat", **SETTINGS))
    next(pieces)
    assert llm.release() is model
    assert model.config._attn_implementation == "sdpa"
    for use in (llm.generate, llm.stream, llm.chat, llm.chat_stream):
        with pytest.raises(ValueError, match=r"^the model .* was released from this LLM; load it again to use it$"):
            use("The cat")
    with pytest.raises(ValueError, match="was released"):
        next(pieces)
    assert llm.release() is model  # once more changes nothing
    assert headstart.load(model, tokenizer=tokenizer, drafter=None).generate("The cat", max_tokens=3)[0].token_ids


def test_a_with_block_releases_the_model_also_after_an_error(model_folder):
    model, tokenizer = user_model(model_folder)
    with headstart.load(model, tokenizer=tokenizer) as llm:
        assert llm.generate("The cat", max_tokens=3)
    assert llm.is_released
    with pytest.raises(RuntimeError, match="mine"), headstart.load(model, tokenizer=tokenizer) as llm:
        raise RuntimeError("mine")
    assert llm.is_released
    assert model.config._attn_implementation == "sdpa"


def test_a_load_that_fails_leaves_the_callers_model_alone(model_folder):
    model, tokenizer = user_model(model_folder)
    for wrong in ({"drafter": "crystal-ball"}, {"max_rows": 0}, {"accept": "maybe"}):
        with pytest.raises(ValueError, match=r"crystal-ball|max_rows|maybe"):
            headstart.load(model, tokenizer=tokenizer, **wrong)
        assert model.config._attn_implementation == "sdpa"


# -- how it is printed ------------------------------------------------------------------------------------------------------


def test_an_llm_is_printed_in_one_line(model_folder):
    llm = headstart.load(model_folder, drafter="lookup", planner="chain:4", dtype="float32", device="cpu", exact=False)
    assert repr(llm) == f"<LLM {model_folder.name}, drafter lookup, planner Chain(depth=4), not exact, float32, cpu>"
    llm.release()
    assert repr(llm).endswith(", cpu, released>")
    plain = headstart.load(model_folder, drafter=None, dtype="float32", device="cpu", exact=True)
    assert repr(plain) == f"<LLM {model_folder.name}, drafter None, exact, float32, cpu>"
    tree = headstart.load(drafter="medusa", planner="tree:16", device="cpu")
    assert "planner StaticTree," in repr(tree)


def test_the_repr_of_an_answer_has_its_beginning_and_its_str_is_its_text(llm):
    [answer] = llm.generate("The cat", max_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    assert str(answer) == answer.text
    assert "\n" not in repr(answer)
    assert len(repr(answer)) < 200
    assert re.fullmatch(r"<Answer .{2,130}: 40 tokens, length, tau \d+\.\d\d>", repr(answer))


def test_the_repr_of_stats_has_tau_and_acceptance_rates():
    stats = Stats()
    assert repr(stats) == "<Stats 0 tokens in 0 rounds, tau 0.00>"
    stats.rounds = 2
    stats.count(3, 2, 3)
    stats.count(1, 0, 1)
    assert repr(stats) == "<Stats 4 tokens in 2 rounds, tau 2.00, acceptance by depth 0.50 1.00 0.00>"


def test_loading_shows_no_progress_bars_and_leaves_the_users_hook(model_folder):
    bars = []

    def users(factory, args, options):
        bars.append((options.get("desc"), options.get("disable", False)))
        return factory(*args, **options)

    before = logging.set_tqdm_hook(users)
    try:
        headstart.load(model_folder, device="cpu")
        assert ("Loading weights", True) in bars
        assert ("Loading weights", False) not in bars
        hf.AutoModelForCausalLM.from_pretrained(model_folder)
        assert ("Loading weights", False) in bars
    finally:
        assert logging.set_tqdm_hook(before) is users
