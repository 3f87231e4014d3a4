"""What the server refuses, and how it says so."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import embedded_service, running

from headstart.serve.lanes import Sizes

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]
LONG = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}

REFUSED = [
    (COMPLETION, {"prompt": "a", "foo": 1}, "foo"),
    (COMPLETION, {}, "prompt"),
    (COMPLETION, {"prompt": 5}, "prompt"),
    (COMPLETION, {"prompt": ""}, "prompt"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": [[]]}, "prompt"),
    (COMPLETION, {"prompt": [10**9]}, "prompt"),
    (COMPLETION, {"prompt": [-1]}, "prompt"),
    (COMPLETION, {"prompt": ["a"] * 200}, "prompt"),
    (COMPLETION, {"prompt": "word " * 3000}, "prompt"),
    (COMPLETION, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETION, {"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
    (COMPLETION, {"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    (COMPLETION, {"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    (COMPLETION, {"prompt": "a", "temperature": -1}, "temperature"),
    (COMPLETION, {"prompt": "a", "temperature": True}, "temperature"),
    (COMPLETION, {"prompt": "a", "top_p": 0}, "top_p"),
    (COMPLETION, {"prompt": "a", "top_p": 1.1}, "top_p"),
    (COMPLETION, {"prompt": "a", "top_k": -1}, "top_k"),
    (COMPLETION, {"prompt": "a", "min_p": 2}, "min_p"),
    (COMPLETION, {"prompt": "a", "n": 0}, "n"),
    (COMPLETION, {"prompt": "a", "n": 1000}, "n"),
    (COMPLETION, {"prompt": "a", "seed": 2**64}, "seed"),
    (COMPLETION, {"prompt": "a", "stop": ["", "b"]}, "stop"),
    (COMPLETION, {"prompt": "a", "stop": ["x"] * 100}, "stop"),
    (COMPLETION, {"prompt": "a", "stop": [1]}, "stop[0]"),
    (COMPLETION, {"prompt": "a", "stop_token_ids": [10**7]}, "stop_token_ids"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"99999999": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETION, {"prompt": "a", "presence_penalty": 1e9}, "presence_penalty"),
    (COMPLETION, {"prompt": "a", "logprobs": -1}, "logprobs"),
    (COMPLETION, {"prompt": "a", "logprobs": 100}, "logprobs"),
    (COMPLETION, {"prompt": "a", "logprobs": 1, "echo": True}, "echo"),
    (COMPLETION, {"prompt": "a", "suffix": "b"}, "suffix"),
    (COMPLETION, {"prompt": "a", "best_of": 2}, "best_of"),
    (COMPLETION, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETION, {"prompt": "a", "stream": True, "stream_options": {"other": True}}, "stream_options.other"),
    (COMPLETION, {"prompt": "a", "drafter": "/etc/passwd"}, "drafter"),
    (COMPLETION, {"prompt": "a", "accept": "typical"}, "accept"),
    (COMPLETION, {"prompt": "a", "timeout": 0}, "timeout"),
    (COMPLETION, {"prompt": "a", "timeout": 10**6}, "timeout"),
    (COMPLETION, {"prompt": "a", "guided_regex": "("}, "guided_regex"),
    (COMPLETION, {"prompt": "a", "guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    (COMPLETION, {"prompt": "a", "include_trees": True}, "include_trees"),
    (COMPLETION, {"prompt": "\ud800"}, "prompt"),
    (COMPLETION, {"prompt": "a", "stop": "\ud800"}, "stop"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": USER, "tool_choice": "auto"}, "tool_choice"),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 50}, "top_logprobs"),
    (CHAT, {"messages": USER, "logprobs": 1}, "logprobs"),
    (CHAT, {"messages": USER, "max_completion_tokens": -2}, "max_completion_tokens"),
    (CHAT, {"messages": USER, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
    (CHAT, {"messages": USER, "response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"no_such_variable": 1}}, "chat_template_kwargs"),
    (CHAT, {"messages": USER, "metadata": {"a": "b"}}, "metadata"),
    (CHAT, {"messages": USER, "reasoning_effort": "high"}, "reasoning_effort"),
    ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
    ("/detokenize", {"tokens": [10**9]}, "tokens"),
]


@pytest.mark.parametrize(
    ("path", "body", "field"), REFUSED, ids=[f"{field}-{number}" for number, (_, _, field) in enumerate(REFUSED)]
)
def test_what_cannot_be_honoured_is_refused_by_the_fields_name(server, path, body, field):
    with server.http() as http:
        answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert field == error["param"] or error["param"].startswith(f"{field}.") or error["param"].startswith(f"{field}["), error


def test_a_field_that_is_null_is_one_that_was_left_out(server):
    names = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "user", "tools", "tool_choice", "response_format", "store")
    with server.http() as http:
        assert http.post(CHAT, json={"messages": USER, "max_tokens": 2, **dict.fromkeys(names)}).status_code == 200
        assert http.post(CHAT, json={"messages": USER, "max_tokens": 2, "tools": [], "tool_choice": "none"}).status_code == 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"a"', b"[" * 100_000, b'{"prompt": NaN}', b"1" * 5000]
)
def test_a_body_that_is_no_request_is_refused_in_openais_form(server, content):
    with server.http() as http:
        answer = http.post(COMPLETION, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_unknown_paths_and_methods_are_refused_in_openais_form(server):
    with server.http() as http:
        assert http.post("/v1/embeddings", json={}).json()["error"]["type"] == "not_found_error"
        assert http.get(COMPLETION).status_code == 405


def test_no_answer_holds_a_path_or_a_trace(server):
    with server.http() as http:
        for path, body, _ in REFUSED:
            text = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}).text
            assert "headstart/" not in text
            assert "Traceback" not in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES_OF_FIELDS = """
messages prompt model max_tokens max_completion_tokens temperature top_p top_k min_p n stop seed logprobs
top_logprobs echo presence_penalty frequency_penalty repetition_penalty logit_bias stream stream_options
response_format guided_regex user stop_token_ids ignore_eos drafter accept timeout tools tool_choice
chat_template_kwargs include_metrics return_token_ids tokens other
"""
FIELDS = NAMES_OF_FIELDS.split()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([CHAT, COMPLETION, "/tokenize", "/detokenize"]), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_no_malformed_body_makes_the_server_fail(server, path, fields):
    valid = {CHAT: {"messages": USER}, COMPLETION: {"prompt": "a"}, "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [1]}}[
        path
    ]
    limit = {"max_tokens": 2} if path in (CHAT, COMPLETION) else {}
    with server.http() as http:
        answer = http.post(path, content=json.dumps(valid | limit | fields), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text)


# -- limits of size, number and time ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow():
    limits = {
        "max_queue": 2,
        "max_tokens": 450,
        "max_body": 2000,
        "slow_seconds": 1.0,
        "timeout": 120.0,
        "keys": ("sesame", "other"),
    }
    with running(embedded_service((None,), sizes=Sizes(max_rows=1, prefixes=0), **limits)) as server:
        yield server


KEY = {"Authorization": "Bearer sesame"}


def test_more_answers_than_the_queue_holds_are_told_when_to_come_back(narrow):
    def ask(number):
        with narrow.http(headers=KEY) as http:
            return http.post(COMPLETION, json=LONG | {"user": str(number), "seed": number, "max_tokens": 150})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    refusal = next(answer for answer in answers if answer.status_code == 429)
    assert int(refusal.headers["Retry-After"]) >= 1
    assert refusal.json()["error"]["type"] == "rate_limit_error"


def test_answers_longer_than_the_server_makes_are_refused(narrow):
    with narrow.http(headers=KEY) as http:
        answer = http.post(COMPLETION, json={"prompt": "a", "max_tokens": 451})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"


def test_a_body_that_is_too_large_is_refused_whether_its_size_is_told_or_not(narrow):
    body = json.dumps({"prompt": "a" * 3000}).encode()
    headers = KEY | {"Content-Type": "application/json"}
    with narrow.http(headers=headers) as http:
        assert http.post(COMPLETION, content=body).status_code == 413
        assert http.post(COMPLETION, content=iter([body[:1500], body[1500:]])).status_code == 413
        assert http.post(COMPLETION, content=body).json()["error"]["type"] == "invalid_request_error"


def test_headers_that_are_too_large_are_refused(narrow):
    with narrow.http(headers=KEY | {"X-Large": "a" * 40_000}) as http:
        answer = http.get("/health")
    assert answer.status_code == 431
    assert answer.json()["error"]["code"] == "headers_too_large"


def test_a_body_that_does_not_come_in_time_is_refused(narrow):
    def slowly():
        yield b'{"prompt":'
        time.sleep(1.5)
        yield b' "a"}'

    with narrow.http(headers=KEY | {"Content-Type": "application/json"}) as http:
        assert http.post(COMPLETION, content=slowly()).status_code == 408


def test_a_request_that_takes_too_long_ends_with_an_error_and_frees_its_slots(narrow):
    with narrow.http(headers=KEY) as http:
        answer = http.post(COMPLETION, json=LONG | {"timeout": 0.05})
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "timeout"
    deadline = time.monotonic() + 5
    while narrow.engine.seating.num_used and time.monotonic() < deadline:
        time.sleep(0.01)
    assert narrow.engine.seating.num_used == 0


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer wrong", "sesame", "Basic sesame", "Bearer sesame2"])
def test_a_client_without_a_key_is_refused(narrow, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    with narrow.http(headers=headers) as http:
        answer = http.post(COMPLETION, json={"prompt": "a", "max_tokens": 1})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/metrics").status_code == 401
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("key", ["sesame", "other"])
def test_each_key_opens(narrow, key):
    with narrow.http(headers={"Authorization": f"Bearer {key}"}) as http:
        assert http.post(COMPLETION, json={"prompt": "a", "max_tokens": 1}).status_code == 200
