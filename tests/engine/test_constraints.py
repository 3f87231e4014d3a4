"""Constraints and grammars: drafted text is that of plain decoding under the same constraint, and always allowed."""

import json
import re
from dataclasses import replace

import pytest
import torch
from heads import KINDS, heads_for
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import AsDrafted, Scripted, asks, random_trees, texts
from tiny import VOCAB, tiny

import headstart
from headstart.drafters.lookup import Lookup
from headstart.engine.engine import Engine
from headstart.engine.grammar import Grammar, GrammarTokens, json_schema, regex
from headstart.speculation.constraints import Constraints
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Chain
from headstart.speculation.tree import ROOT, Drafts
from headstart.text.text_stream import TextStream

GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.9, top_p=0.8)
PENALISED = SamplingParams(temperature=0.9, frequency_penalty=0.5)


class Sums:
    """A token may follow an output where it leaves another remainder by 5 than the sum of the last two tokens."""

    error = None

    def mask(self, output):
        return (torch.arange(VOCAB) % 5) != sum(output[-2:]) % 5


class Failing(Sums):
    """Fails after some tokens."""

    def mask(self, output):
        self.error = "too long" if len(output) > 6 else None
        return super().mask(output)


def run(target, requests, constraints, drafter=None, planner=None, accept="coupled", **settings):
    engine = Engine(target, drafter, planner, max_rows=3, accept=accept, **settings)
    pairs = zip(requests, constraints, strict=True)
    added = [engine.add(ask.prompt, ask.params, constraint=constraint) for ask, constraint in pairs]
    for _ in engine.run():
        pass
    return [request.output for request in added], engine


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "top-p", "penalised"])
@pytest.mark.parametrize("kind", ["lookup", *KINDS])
def test_every_drafter_gives_the_constrained_text_of_plain_decoding(kind, params):
    target = tiny()
    requests, constraints = asks(VOCAB, [6, 9, 4], [30, 20, 25], params), [Sums(), None, Sums()]
    plain, _ = run(target, requests, constraints)
    drafter = Lookup() if kind == "lookup" else heads_for(target, kind)
    drafted, engine = run(target, requests, constraints, drafter)
    assert drafted == plain
    assert engine.stats.drafts > 0
    for output in (plain[0], plain[2]):
        assert all(output[i] % 5 != sum(output[max(0, i - 2) : i]) % 5 for i in range(len(output)))
    unconstrained, _ = run(target, requests, [None] * 3)
    assert plain[1] == unconstrained[1]
    assert plain[0] != unconstrained[0]


@pytest.mark.parametrize("accept", ["rejection", "typical"])
def test_other_acceptance_rules_stay_within_the_constraint(accept):
    target = tiny()
    outputs, _ = run(target, asks(VOCAB, [6, 9], [30, 30], SAMPLED), [Sums()] * 2, heads_for(target, "mtp"), Chain(3), accept)
    for output in outputs:
        assert all(output[i] % 5 != sum(output[max(0, i - 2) : i]) % 5 for i in range(len(output)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_any_trees_and_any_memory_leave_the_constrained_text_as_it_is(seed, ahead):
    target = tiny()
    requests, constraints = asks(VOCAB, [5, 7, 3], [20, 20, 20], SAMPLED, seed), [Sums(), None, Sums()]
    plain, _ = run(target, requests, constraints)
    drafter = Scripted(random_trees(VOCAB, 8, seed), texts(requests, plain), planner=AsDrafted(8, 4))
    memory = 70 * Engine(target).slot_bytes
    drafted, _ = run(target, requests, constraints, drafter, memory=memory, ahead=ahead, prefixes=1)
    assert drafted == plain


def test_a_constraint_that_fails_ends_its_own_request_only():
    target = tiny()
    requests = asks(VOCAB, [5, 5], [20, 20], GREEDY)
    engine = Engine(target, max_rows=2)
    failing, other = (
        engine.add(ask.prompt, ask.params, constraint=constraint)
        for ask, constraint in zip(requests, (Failing(), None), strict=True)
    )
    with pytest.raises(ValueError, match="the constraint failed: too long"):
        list(engine.run())
    list(engine.run())
    assert (failing.finish_reason, len(failing.output), other.finish_reason, len(other.output)) == ("error", 7, "length", 20)


def test_forbidden_drafts_are_left_out_with_what_follows_them():
    constraints = Constraints({1: (Sums(), (1, 2))})
    drafts = Drafts.of(
        tokens=[3, 4, 5, 3, 4, 1, 2],
        parents=[ROOT, 0, 1, ROOT, ROOT, 4, 3],
        rows=[0, 0, 0, 1, 1, 1, 1],
        depths=[1, 2, 3, 1, 1, 2, 2],
        chances=[0.5] * 7,
    )
    left = constraints.without_forbidden(drafts, 2)
    assert left.tokens.tolist() == [3, 4, 5, 4]  # after (1, 2) no 3; after (1, 2, 4) no 1
    left.check()


# -- grammars ---------------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm():
    return headstart.load(drafter="mtp")


@pytest.fixture(scope="module")
def plain():
    return headstart.load(drafter=None)


@pytest.fixture(scope="module")
def tokens(llm):
    return GrammarTokens(llm.tokenizer, llm.engine.target.vocab, llm.stop_ids)


def complete(llm, grammar, prompt="Tell me about it: ", **settings):
    stream = TextStream(llm.tokenizer)
    params = SamplingParams(max_tokens=100, **settings)
    request = llm.engine.add(llm.tokenizer.encode(prompt), params, stop_ids=llm.stop_ids, stream=stream, constraint=grammar)
    text = "".join(event.text for event in llm.engine.run())
    return text, request


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_follows_its_schema_and_is_that_of_plain_decoding(llm, plain, tokens, temperature):
    grammar = json_schema(SCHEMA)
    for seed in range(3):
        text, request = complete(llm, Grammar(tokens, grammar), temperature=temperature, seed=seed)
        same, _ = complete(plain, Grammar(tokens, grammar), temperature=temperature, seed=seed)
        assert text == same
        assert request.finish_reason == "stop"
        answer = json.loads(text)
        assert list(answer) == ["name", "age", "tags"]
        assert len(answer["name"]) <= 8
        assert 0 <= answer["age"] <= 99
        assert {*answer["tags"]} <= {"red", "blue"}


def test_an_answer_matches_its_regular_expression(llm, tokens):
    pattern = r"[a-c]{3}-\d{2,4}"
    for seed in range(5):
        text, request = complete(llm, Grammar(tokens, regex(pattern)), temperature=1.0, seed=seed)
        assert re.fullmatch(pattern, text)
        assert request.finish_reason == "stop"


def test_a_mask_does_not_depend_on_what_was_asked_before(tokens, llm):
    used = Grammar(tokens, json_schema(SCHEMA))
    path = tuple(llm.tokenizer.encode('{"name":"ann","age":', add_special_tokens=False))
    for length in (len(path), 2, 5, 0, len(path), 1, 4):
        fresh = Grammar(tokens, json_schema(SCHEMA))
        assert torch.equal(used.mask(path[:length]), fresh.mask(path[:length]))


def test_an_output_outside_the_grammar_can_only_end(tokens, llm):
    grammar = Grammar(tokens, regex("a+"))
    outside = tuple(llm.tokenizer.encode("xyz", add_special_tokens=False))
    assert grammar.mask(outside).nonzero().flatten().tolist() == sorted(llm.stop_ids)
    assert grammar.mask(()).sum() > 0


def test_grammars_that_cannot_be_read_are_refused(tokens, llm):
    with pytest.raises(ValueError, match="the grammar cannot be read"):
        Grammar(tokens, regex("(["))
    with pytest.raises(ValueError, match="the grammar cannot be read"):
        Grammar(tokens, json_schema({"type": "no such type"}))
    with pytest.raises(ValueError, match="grammars need a stop token"):
        GrammarTokens(llm.tokenizer, llm.engine.target.vocab, ())


def test_only_constrained_rows_cost_masks(llm):
    engine, asked = Engine(tiny(), max_rows=2), []

    class Counted(Sums):
        def mask(self, output):
            asked.append(output)
            return super().mask(output)

    one, other = asks(VOCAB, [5, 5], [10, 10], GREEDY)
    engine.add(one.prompt, replace(one.params), constraint=Counted())
    engine.add(other.prompt, other.params)
    list(engine.run())
    assert len(asked) == 10
