"""Chats and completions, asked for by the client of OpenAI as it is."""

import json

import openai
import pytest
from serving import embedded_target

from headstart.speculation.noise import mix

MESSAGES = [{"role": "user", "content": "Tell me about a dog."}]
PROMPT = "Once upon a time"
MODEL = "embedded"
EXTRA = {"return_token_ids": True}


def ids_of(choice) -> list[int]:
    return choice.model_extra["token_ids"]


def plain_text(server, prompt=PROMPT, **settings):
    return server.plain().generate(prompt, **settings)[0]


def test_a_completion_is_the_text_of_plain_decoding(server, client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, extra_body=EXTRA)
    expected = plain_text(server, max_tokens=40)
    assert answer.choices[0].text == expected.text
    assert ids_of(answer.choices[0]) == list(expected.token_ids)
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.object == "text_completion"


def test_a_chat_is_rendered_by_the_models_template(server, client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=30, temperature=0)
    expected = server.plain().chat(MESSAGES, max_tokens=30)[0]
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "about a dog."}]}]
    joined = client.chat.completions.create(model=MODEL, messages=parts, max_tokens=30, temperature=0)
    assert joined.choices[0].message.content == expected.text


def test_an_answers_message_can_be_sent_back(client):
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8).choices[0].message
    again = client.chat.completions.create(
        model=MODEL, messages=[*MESSAGES, first, {"role": "user", "content": "And then?"}], max_tokens=8
    )
    assert again.choices[0].message.content is not None


def test_a_stream_has_the_same_text_and_ends_with_its_usage(client):
    settings = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "temperature": 0.7, "seed": 5}
    whole = client.chat.completions.create(**settings)
    events = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    reasons = [event.choices[0].finish_reason for event in events if event.choices]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({event.id for event in events}) == 1


def test_the_same_seed_gives_the_same_text_and_another_one_another(client):
    def text(seed):
        return client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=1.0, seed=seed).choices[0].text

    assert text(3) == text(3)
    assert len({text(seed) for seed in range(4)}) > 1


def test_n_answers_are_those_of_the_engine_with_mixed_seeds(server, client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, temperature=1.0, seed=9, n=3, extra_body=EXTRA)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    expected = [list(plain_text(server, max_tokens=16, temperature=1.0, seed=mix(9, number)).token_ids) for number in range(3)]
    assert [ids_of(choice) for choice in answer.choices] == expected


def test_a_list_of_prompts_and_token_ids_are_answered_in_order(server, client):
    tokens = server.service.preparer.tokenizer.encode("The little dog")
    texts = client.completions.create(model=MODEL, prompt=[PROMPT, "The little dog"], max_tokens=12, temperature=0)
    ids = client.completions.create(model=MODEL, prompt=tokens, max_tokens=12, temperature=0)
    both = client.completions.create(model=MODEL, prompt=[tokens, tokens], max_tokens=12, temperature=0)
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert texts.choices[1].text == ids.choices[0].text == both.choices[0].text == both.choices[1].text
    assert texts.choices[0].text == plain_text(server, max_tokens=12).text


def test_a_stop_string_ends_the_text_before_it(server, client):
    whole = plain_text(server, max_tokens=40).text
    stop = whole[15:20]
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "never there"])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, stop=stop, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == answer.choices[0].text


def test_echo_puts_the_prompt_before_the_answer(server, client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10, temperature=0, echo=True)
    assert answer.choices[0].text == PROMPT + plain_text(server, max_tokens=10).text
    streamed = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10, temperature=0, echo=True, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == answer.choices[0].text


def test_log_probabilities_are_those_of_the_target(server, client):
    expected = plain_text(server, max_tokens=12, logprobs=3)
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3).choices[0]
    assert answer.logprobs.token_logprobs == pytest.approx([own for own, _ in expected.logprobs])
    assert "".join(answer.logprobs.tokens) == answer.text
    assert [len(best) for best in answer.logprobs.top_logprobs] == [3] * 12
    assert [
        answer.text[start:].startswith(name)
        for start, name in zip(answer.logprobs.text_offset, answer.logprobs.tokens, strict=True)
    ]
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    lines = chat.choices[0].logprobs.content
    assert "".join(line.token for line in lines) == chat.choices[0].message.content
    assert all(line.top_logprobs[0].logprob == line.logprob for line in lines)
    assert bytes(byte for line in lines for byte in line.bytes).decode() == chat.choices[0].message.content


def test_log_probabilities_of_a_stream_come_with_their_tokens(client):
    settings = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 1}
    whole = client.completions.create(**settings).choices[0].logprobs
    events = [event.choices[0].logprobs for event in client.completions.create(**settings, stream=True)]
    for field in ("tokens", "token_logprobs", "text_offset"):
        assert [item for event in events for item in getattr(event, field)] == getattr(whole, field)


def test_an_answer_in_a_json_schema_is_json_of_that_schema(client):
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}}}
    schema |= {"required": ["name", "age"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=60, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "dog", "schema": schema, "strict": True}},
    )  # fmt: skip
    if answer.choices[0].finish_reason == "stop":
        assert set(json.loads(answer.choices[0].message.content)) == {"name", "age"}
    else:
        assert answer.choices[0].message.content.startswith('{"name":')


def test_an_answer_matches_the_regular_expression_with_any_drafter(client):
    texts = {
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0.8, seed=1,
            extra_body={"guided_regex": "(yes|no), [a-z]{3,5}", "drafter": drafter},
        ).choices[0].text
        for drafter in ("mtp", "lookup", "none")
    }  # fmt: skip
    assert len(texts) == 1
    assert texts.pop().split(", ")[0] in ("yes", "no")


@pytest.mark.parametrize("drafter", ["mtp", "lookup", "none"])
def test_a_client_chooses_the_drafter_and_gets_the_same_text(server, client, drafter):
    extra = {"drafter": drafter, "include_metrics": True, "return_token_ids": True}
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, extra_body=extra)
    assert ids_of(answer.choices[0]) == list(plain_text(server, max_tokens=40).token_ids)
    figures = answer.model_extra["metrics"]["speculative_decoding"]
    assert sum(figures["acceptance_histogram"]) == figures["num_spec_steps"]
    assert sum(count * steps for count, steps in enumerate(figures["acceptance_histogram"])) == figures["num_accepted_draft_tokens"]
    assert any(answer.choices[0].model_extra["drafted"]) == (figures["num_accepted_draft_tokens"] > 0)
    if drafter == "none":
        assert figures["num_draft_tokens"] == 0


def test_figures_of_speculation_come_only_if_asked_for(client):
    assert "metrics" not in client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4).model_extra


def test_trees_of_the_rounds_come_with_a_stream(client):
    events = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=60, temperature=0, stream=True, extra_body={"include_trees": True, "drafter": "mtp"}
    )
    trees = [event.choices[0].model_extra["tree"] for event in events if "tree" in event.choices[0].model_extra]
    assert trees
    assert all(len(tree["tokens"]) == len(tree["parents"]) == len(tree["kept"]) for tree in trees)


def test_settings_of_sampling_reach_the_engine(server, client):
    settings = {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    ours = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "ignore_eos": True}
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=24, seed=4, **settings, logit_bias={"20": -5}, extra_body=ours | EXTRA
    )
    expected = plain_text(server, max_tokens=24, seed=4, **settings, **ours, logit_bias={20: -5.0})
    assert ids_of(answer.choices[0]) == list(expected.token_ids)


def test_a_chat_without_max_tokens_may_fill_the_context(server, client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, stop=["."])
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert server.service.lanes[0].most_tokens <= embedded_target().context


def test_the_model_is_listed_by_its_name(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).model_extra["drafters"] == ["mtp", "lookup"]
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("other")


def test_texts_become_tokens_and_tokens_texts(server):
    with server.http() as http:
        told = http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
        assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
        assert PROMPT in http.post("/detokenize", json={"tokens": told["tokens"]}).json()["prompt"]
        chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
        assert chat["count"] > http.post("/tokenize", json={"prompt": MESSAGES[0]["content"]}).json()["count"]
