"""Running requests: the KV cache, where an answer ends, log-probabilities, waiting and forking, memory, and text."""

import gc
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import AsDrafted, Ask, Scripted, asks, check_empty, decode, random_trees, right, texts
from tiny import VOCAB, cut, tiny

from headstart import load
from headstart.drafters.draft_model import ModelDrafter
from headstart.drafters.lookup import Lookup
from headstart.engine.engine import Engine
from headstart.engine.llm import LLM
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain, StaticTree
from headstart.speculation.tree import Drafts, merge
from headstart.target.cache import Seating
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.text_stream import TextStream
from headstart.text.tokenizer import decode as text_of

SAMPLED = SamplingParams(temperature=1.0)


# -- the KV cache -----------------------------------------------------------------------------------------------------------


def prefilled(target, text):
    """Keys and values of every layer after scoring a text in an empty cache."""
    seating = Seating(1, len(text))
    store, seat = target.new_cache(seating), seating.take(len(text))
    target.score(merge([text], [0], [False], Drafts.none()), store, [seat])
    return [store.layer(layer) for layer in range(target.num_layers)]


def check_cache(target, store, seat, text, tolerance):
    start = store.seating[seat].start
    for layer, expected_stores in enumerate(prefilled(target, text)):
        for actual, expected in zip(store.layer(layer), expected_stores, strict=True):
            torch.testing.assert_close(actual[:, start : start + len(text)], expected, atol=tolerance, rtol=0)


def check_caches(engine, tolerance):
    for request in engine.scheduler.running:
        length = engine.cache.lengths[request.seat]
        assert length == request.scored
        if length:
            check_cache(engine.target, engine.cache, request.seat, request.known(0, length), tolerance)
        if isinstance(engine.drafter, ModelDrafter):
            length = engine.drafter.cache.lengths[request.seat]
            if length:
                check_cache(engine.drafter.model, engine.drafter.cache, request.seat, request.known(0, length), tolerance)


JOINS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 3), st.integers(0, 8)),  # prompt, tokens, samples, round
    min_size=1,
    max_size=4,
)
ABORTS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 10)), max_size=2)  # which request, in which round


def run_rounds(engine, joins, aborts, tolerance, seed=0):
    """Run rounds in which requests join, fork, end and are aborted. Checks the caches after each round."""
    rng = random.Random(seed)
    requests = []
    for now in range(200):
        for size, tokens, samples, when in joins:
            if when == now:
                prompt = [rng.randrange(VOCAB) for _ in range(size)]
                params = replace(SAMPLED, max_tokens=tokens)
                leader = engine.add(prompt, params, seed=rng.randrange(1000))
                followers = [engine.add(prompt, params, seed=rng.randrange(1000), leader=leader) for _ in range(samples - 1)]
                requests += [leader, *followers]
        for which, when in aborts:
            if when == now and which < len(requests):
                engine.abort(requests[which])
        engine.step()
        engine.seating.check()
        check_caches(engine, tolerance)
        if now > 8 and engine.scheduler.is_idle:
            break
    check_empty(engine)
    assert all(request.finish_reason in ("length", "abort") for request in requests)
    return requests


@settings(max_examples=20, deadline=None, derandomize=True)
@given(joins=JOINS, aborts=ABORTS, seed=st.integers(0, 1000), chunk=st.sampled_from([4, 16, 256]))
def test_the_cache_equals_a_fresh_prefill_after_any_rounds(joins, aborts, seed, chunk):
    target = tiny("gpt2")  # in fp64 throughout; other models round to fp32 in their norms
    answer = [random.Random(seed).randrange(VOCAB) for _ in range(40)]
    drafter = Scripted(random_trees(VOCAB, 10, seed), [answer])
    drafter.coming = lambda text: answer[len(text) % 7 :]  # not the real answers: mostly wrong, but of any shape
    engine = Engine(target, drafter, AsDrafted(10, 6), max_rows=3, memory=150 * target.slot_bytes, chunk=chunk)
    run_rounds(engine, joins, aborts, 1e-9, seed)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(joins=JOINS, aborts=ABORTS, chain=st.booleans())
def test_the_draft_models_cache_equals_a_fresh_prefill_too(joins, aborts, chain):
    target = tiny("llama")
    planner = Chain(3) if chain else Best(nodes=6, depth=3, width=3, beam=2)
    run_rounds(Engine(target, ModelDrafter(draft()), planner, max_rows=3), joins, aborts, 1e-5)


@cache
def draft():
    return cut(tiny().model, 2)


def test_kept_branches_move_and_the_cache_still_equals_a_fresh_prefill():
    """The right path may be anywhere in a tree, so a commit has to gather."""
    target, requests = tiny("gpt2"), asks(VOCAB, [5, 11, 2], [25, 14, 20], SAMPLED)
    plain, _ = decode(target, requests)
    drafter = Scripted(random_trees(VOCAB, 14, skill=0.7), texts(requests, plain))
    engine = Engine(target, drafter, AsDrafted(14, 6), max_rows=3)
    running = [engine.add(ask.prompt, ask.params) for ask in requests]
    while not engine.scheduler.is_idle:
        engine.step()
        check_caches(engine, 1e-9)
    assert [request.output for request in running] == plain
    assert engine.stats.tau > 1.5


def test_rejection_keeps_the_cache_sound_and_a_seed_repeats_its_answer():
    target, requests = tiny(), asks(VOCAB, [5, 11, 2], [25, 14, 20], SAMPLED)
    answers = []
    for _ in range(2):
        engine = Engine(target, ModelDrafter(draft()), StaticTree.full(3, 2), max_rows=2, accept="rejection")
        running = [engine.add(ask.prompt, ask.params) for ask in requests]
        while not engine.scheduler.is_idle:
            engine.step()
            check_caches(engine, 1e-5)
        check_empty(engine)
        answers.append([request.output for request in running])
    assert answers[0] == answers[1]
    assert engine.stats.tau > 1.3


# -- where an answer ends ---------------------------------------------------------------------------------------------------


def drafting(target, requests, plain, depth=6):
    return Engine(target, Scripted(right(depth), texts(requests, plain)), AsDrafted(depth=depth))


def finish(engine):
    for _ in engine.run():
        pass
    check_empty(engine)


def test_a_stop_token_inside_a_kept_path_ends_the_answer_there():
    target, (ask,) = tiny(), asks(VOCAB, [6], [20], SAMPLED)
    (plain,), _ = decode(target, [ask])
    stop = next(token for index, token in enumerate(plain) if index == 9 or (index > 5 and token not in plain[:index]))
    first = plain.index(stop)
    for params, stop_ids, length, reason in [
        (ask.params, [stop], first + 1, "stop"),
        (replace(ask.params, stop_token_ids=(stop,)), [], first + 1, "stop"),
        (replace(ask.params, ignore_eos=True), [stop], 20, "length"),
        (replace(ask.params, ignore_eos=True, stop_token_ids=(stop,)), [], first + 1, "stop"),
    ]:
        engine = drafting(target, [ask], [plain])
        request = engine.add(ask.prompt, params, stop_ids=stop_ids)
        finish(engine)
        assert (request.output, request.finish_reason) == (plain[:length], reason)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 8])
def test_max_tokens_is_met_exactly_however_deep_the_drafts(max_tokens):
    target, (ask,) = tiny(), asks(VOCAB, [6], [20], SAMPLED)
    (plain,), _ = decode(target, [ask])
    engine = drafting(target, [ask], [plain])
    request = engine.add(ask.prompt, replace(ask.params, max_tokens=max_tokens))
    finish(engine)
    assert (request.output, request.finish_reason) == (plain[:max_tokens], "length")


def test_an_answer_may_fill_the_context_to_its_last_token():
    target, (ask,) = tiny(), asks(VOCAB, [28], [100], SAMPLED)
    (plain,), _ = decode(target, [ask])
    engine = drafting(target, [ask], [plain])
    request = engine.add(ask.prompt, ask.params)
    finish(engine)
    assert request.output == plain
    assert request.length == target.context


def test_guessed_marks_drafted_tokens():
    target, (ask,) = tiny(), asks(VOCAB, [6], [8], SAMPLED)
    (plain,), _ = decode(target, [ask])
    engine = drafting(target, [ask], [plain], depth=2)
    request = engine.add(ask.prompt, ask.params)
    finish(engine)
    assert request.guessed == [False, True, True, False, True, True, False, False]  # 1 + 3 + 3, then one is left


# -- log-probabilities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distribution", [SamplingParams(), SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.3)], ids=str
)
def test_logprobs_are_the_models_raw_ones_whatever_the_distribution_and_the_drafts(distribution):
    target, (ask,) = tiny(), asks(VOCAB, [6], [20], replace(distribution, logprobs=3))
    (plain,), _ = decode(target, [ask])
    engine = Engine(target, Scripted(random_trees(VOCAB, 12), texts([ask], [plain])), AsDrafted(12))
    request = engine.add(ask.prompt, ask.params)
    finish(engine)
    with torch.inference_mode():
        logits = target.model(torch.tensor([[*ask.prompt, *plain]])).logits[0, len(ask.prompt) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    assert request.output == plain
    assert [logprob for logprob, _ in request.logprobs] == pytest.approx(expected[range(20), plain].tolist(), abs=1e-5)
    for (_, table), line in zip(request.logprobs, expected, strict=True):
        best = line.topk(3)
        assert list(table) == best.indices.tolist()
        assert list(table.values()) == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_drafters_own_planner_is_used_unless_another_is_given():
    drafter = Lookup()
    assert Engine(tiny(), drafter).planner is drafter.planner
    assert Engine(tiny(), drafter, Chain(2)).planner == Chain(2)
    assert Engine(tiny()).planner is None


# -- waiting and forking ----------------------------------------------------------------------------------------------------


def test_more_requests_than_fit_wait_and_finish():
    target = tiny()
    requests = asks(VOCAB, [10] * 9, [5, 12, 3, 9, 20, 1, 7, 4, 16], SAMPLED)
    plain, _ = decode(target, requests)
    engine = Engine(target, max_rows=8, memory=70 * target.slot_bytes)  # two or three of them at a time
    running = [engine.add(ask.prompt, ask.params) for ask in requests]
    most = 0
    for _ in engine.run():
        engine.seating.check()
        most = max(most, len(engine.scheduler.running))
    check_empty(engine)
    assert [request.output for request in running] == plain
    assert 2 <= most < 9


def test_a_request_that_can_never_fit_is_refused_in_one_sentence():
    target = tiny()
    engine = Engine(target, max_rows=2, memory=40 * target.slot_bytes)
    with pytest.raises(ValueError, match=r"prompt of 30 tokens plus max_tokens=20 exceeds the cache, which holds 39 tokens"):
        engine.add([1] * 30, SamplingParams(max_tokens=20))
    engine.add([1] * 30, SamplingParams(max_tokens=9))
    finish(engine)
    with pytest.raises(ValueError, match="exceeds the context of 128 tokens"):
        engine.add([1] * 120, SamplingParams(max_tokens=9))


REFUSALS = [
    ([], {}, "the prompt is empty"),
    ([VOCAB], {}, f"token {VOCAB} is not in the vocabulary of {VOCAB}"),
    ([1], {"logit_bias": {500: 1.0}}, "token 500 is not in the vocabulary"),
    ([1], {"stop": ("a",)}, "stop strings need a tokenizer"),
    ([1], {"logprobs": VOCAB + 1}, f"logprobs is {VOCAB + 1}; the vocabulary has {VOCAB}"),
]


@pytest.mark.parametrize(("prompt", "fields", "sentence"), REFUSALS)
def test_a_request_that_cannot_be_honoured_is_refused_before_any_work(prompt, fields, sentence):
    engine = Engine(tiny())
    with pytest.raises(ValueError, match=sentence):
        engine.add(prompt, SamplingParams(max_tokens=4, **fields))
    check_empty(engine)


def test_other_requests_keep_decoding_during_a_prompt_longer_than_a_chunk():
    target = tiny()
    engine = Engine(target, max_rows=2, chunk=8)
    first = engine.add([1, 2], SamplingParams(max_tokens=12))
    engine.step()
    second = engine.add([3] * 30, SamplingParams(max_tokens=2))
    rounds = 0
    while not second.output:
        engine.step()
        rounds += 1
    assert rounds == 4  # 8 + 8 + 8 + 6
    assert len(first.output) == 1 + 4


@pytest.mark.parametrize("samples", [2, 5])
def test_samples_share_the_prompt_and_equal_separate_requests(samples):
    target, (ask,) = tiny(), asks(VOCAB, [20], [10], SAMPLED)
    separate = [Ask(ask.prompt, replace(ask.params, seed=mix(3, sample))) for sample in range(samples)]
    plain, plain_engine = decode(target, separate)
    engine = Engine(target, Lookup(), Best(), max_rows=3)
    leader = engine.add(ask.prompt, ask.params, seed=mix(3, 0))
    others = [engine.add(ask.prompt, ask.params, seed=mix(3, sample), leader=leader) for sample in range(1, samples)]
    finish(engine)
    assert [request.output for request in (leader, *others)] == plain
    assert engine.stats.nodes < plain_engine.stats.nodes  # the prompt was scored fewer times


def test_followers_of_an_aborted_leader_score_the_prompt_themselves():
    target, (ask,) = tiny(), asks(VOCAB, [9], [6], SAMPLED)
    (plain,), _ = decode(target, [ask])
    engine = Engine(target, max_rows=1)
    leader = engine.add(ask.prompt, ask.params)
    follower = engine.add(ask.prompt, ask.params, leader=leader)
    engine.step()
    engine.abort(leader)
    finish(engine)
    assert (leader.finish_reason, leader.output) == ("abort", plain[:1])
    assert follower.output == plain


def test_an_abort_at_any_time_frees_everything():
    target = tiny()
    engine = Engine(target, Lookup(), Best(), max_rows=2)
    running, waiting = ([engine.add([1, 2, 3], SamplingParams(max_tokens=9)) for _ in range(2)] for _ in range(2))
    first, second = running
    third, fourth = waiting
    engine.step()
    for request in (first, third, third):  # running, waiting, twice
        engine.abort(request)
        engine.seating.check()
    finish(engine)
    assert [r.finish_reason for r in (first, second, third, fourth)] == ["abort", "length", "abort", "length"]


# -- memory -----------------------------------------------------------------------------------------------------------------


def stores(store):
    return sum(tensor.nbytes for tensor in store._stores.values())


def test_the_announced_bytes_are_the_tensors_bytes():
    target, drafter = tiny(), ModelDrafter(draft())
    engine = Engine(target, drafter, Chain(3), max_rows=3, memory=1_000_000)
    assert engine.memory == stores(engine.cache) + stores(drafter.cache) == engine.cache.bytes + drafter.cache.bytes
    assert 1_000_000 - engine.slot_bytes < engine.memory <= 1_000_000
    plain = Engine(target, max_rows=3)
    assert plain.memory == stores(plain.cache) == plain.cache.bytes
    assert plain.seating.num_slots >= 3 * target.context


def test_too_little_memory_is_refused():
    with pytest.raises(ValueError, match="memory of 10 bytes holds no token"):
        Engine(tiny(), memory=10)


def resident():
    """Resident bytes of this process, where the system reports them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def tensors():
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not report the memory of a process")
def test_two_hundred_requests_leave_neither_tensors_nor_memory_behind():
    target = tiny("llama", torch.float32)
    distribution = SamplingParams(temperature=1.0, repetition_penalty=1.1, top_p=0.9)
    engine = Engine(target, Lookup(), Best(nodes=8), max_rows=4)

    def run_requests(seed, count):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 60) for _ in range(count)]
        for ask in asks(VOCAB, lengths, [rng.randint(5, 40) for _ in range(count)], distribution, seed):
            engine.add(ask.prompt, ask.params)
        finish(engine)

    run_requests(0, 60)
    before, before_bytes = tensors(), resident()
    run_requests(1, 200)
    assert engine.stats.rounds > 1000
    assert tensors() <= before + 5
    assert resident() < before_bytes + 20e6


# -- text -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(model_folder):
    return load(model_folder, dtype=torch.float64, drafter=None)


def with_answers(llm, prompt, answers, depth=5):
    """The same model with a drafter that knows these answers to the prompt."""
    ids = llm.tokenizer.encode(prompt)
    drafter = Scripted(right(depth), [[*ids, *answer] for answer in answers])
    return LLM(Engine(llm.engine.target, drafter, AsDrafted(depth=depth)), llm.tokenizer)


def test_streamed_pieces_join_to_the_text(llm):
    (answer,) = llm.generate("The cat", max_tokens=40, temperature=1.2, seed=4, ignore_eos=True)
    drafted = with_answers(llm, "The cat", [answer.token_ids])
    pieces = list(drafted.stream("The cat", max_tokens=40, temperature=1.2, seed=4, ignore_eos=True))
    assert "".join(map(str, pieces)) == answer.text == text_of(llm.tokenizer, answer.token_ids)
    assert [token for piece in pieces for token in piece.token_ids] == list(answer.token_ids)
    assert len(pieces) == 1 + 7  # one token, then 39 in sixes


@pytest.mark.parametrize("start", [4, 9, 17, 30])
def test_a_stop_string_cuts_a_kept_path_where_plain_decoding_stops(llm, start):
    settings = {"max_tokens": 40, "temperature": 1.2, "seed": 11, "ignore_eos": True}
    (answer,) = llm.generate("The cat", **settings)
    stop = answer.text[start : start + 3]
    (plain,) = llm.generate("The cat", stop=stop, **settings)
    (drafted,) = with_answers(llm, "The cat", [answer.token_ids]).generate("The cat", stop=stop, **settings)
    assert plain.text == drafted.text == answer.text[: answer.text.index(stop)]
    assert plain.token_ids == drafted.token_ids == answer.token_ids[: len(plain.token_ids)]
    assert plain.finish_reason == drafted.finish_reason == "stop"
    check_empty(llm.engine)


def test_a_seed_that_was_drawn_repeats_the_answer(llm):
    first, second = (llm.generate("The sea", max_tokens=20, temperature=1.0, ignore_eos=True)[0] for _ in range(2))
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    (again,) = llm.generate("The sea", max_tokens=20, temperature=1.0, ignore_eos=True, seed=first.seed)
    assert (again.token_ids, again.seed) == (first.token_ids, first.seed)


def test_several_samples_and_prompts_are_repeated_one_by_one(llm):
    settings = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    samples = llm.generate("The sea", n=3, seed=5, **settings)
    for index, sample in enumerate(samples):
        assert sample.seed == mix(5, index)
        assert llm.generate("The sea", seed=sample.seed, **settings)[0].token_ids == sample.token_ids
    many = llm.generate(["The sea", "The cat"], seed=5, **settings)
    for index, (prompt, answer) in enumerate(zip(["The sea", "The cat"], many, strict=True)):
        assert answer.seed == mix(5, index)
        assert llm.generate(prompt, seed=answer.seed, **settings)[0].token_ids == answer.token_ids


def test_leaving_a_stream_early_frees_its_seat(llm):
    for _ in llm.stream("The cat", max_tokens=40, ignore_eos=True):
        break
    check_empty(llm.engine)


def test_a_text_stream_without_end_is_flushed_when_the_answer_ends(model_folder):
    """A token that is a part of a character is held back, and becomes text once nothing follows."""
    tokenizer = load_tokenizer(model_folder)
    target = Target.load(model_folder, dtype=torch.float64)
    half = tokenizer.encode("é")[0]
    engine = Engine(target)
    params = SamplingParams(max_tokens=3, logit_bias={half: 1000.0})
    request = engine.add(tokenizer.encode("The"), params, stream=TextStream(tokenizer))
    text = "".join(event.text for event in engine.run())
    assert request.output == [half] * 3
    assert text == text_of(tokenizer, request.output)
