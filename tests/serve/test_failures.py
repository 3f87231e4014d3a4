"""A request that fails harms no other, and the engine thread goes on."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import embedded_service, running

from headstart.serve.lanes import Sizes

SECRET = "the secret word is marmalade"
BODY = {"max_tokens": 20, "temperature": 0, "return_token_ids": True, "ignore_eos": True}


@pytest.fixture
def server():
    with running(embedded_service((None,), sizes=Sizes(max_rows=4, prefixes=0))) as started:
        yield started


def post(server, prompt):
    with server.http() as http:
        return http.post("/v1/completions", json=BODY | {"prompt": prompt})


def post_all(server, prompts):
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: post(server, prompt), prompts))


def fail_for(server, monkeypatch, is_guilty, times=None):
    """Let rounds fail that score a token of a guilty request. times: how often; None: always."""
    engine, left = server.engine, [times]
    turns = engine.scheduler.turns

    def failing(*chunk):
        rows = turns(*chunk)
        if any(is_guilty(turn.request) for turn in rows) and left[0] != 0:
            left[0] = None if left[0] is None else left[0] - 1
            raise RuntimeError("boom")
        return rows

    monkeypatch.setattr(engine.scheduler, "turns", failing)


def test_a_round_that_fails_once_is_repeated(server, monkeypatch):
    expected = post(server, "The cat").json()["choices"][0]["token_ids"]
    fail_for(server, monkeypatch, lambda request: len(request.output) == 5, times=1)
    assert post(server, "The cat").json()["choices"][0]["token_ids"] == expected


def test_a_request_with_which_rounds_keep_failing_ends_and_its_neighbours_go_on(server, monkeypatch, caplog):
    guilty = len(server.service.preparer.tokenizer.encode(SECRET))
    expected = post(server, "The cat").json()["choices"][0]["token_ids"]
    fail_for(server, monkeypatch, lambda request: len(request.prompt) == guilty)
    with caplog.at_level(logging.DEBUG, "headstart.serve"):
        answers = post_all(server, ["The cat", SECRET, "The cat", "The cat"])
    assert answers[1].status_code == 500
    assert answers[1].json()["error"]["code"] == "internal_error"
    assert "boom" not in answers[1].text
    for answer in (answers[0], *answers[2:]):
        assert answer.json()["choices"][0]["token_ids"] == expected
    assert "boom" in caplog.text
    assert "marmalade" not in caplog.text


def test_where_every_round_fails_every_request_ends_with_an_error_and_later_ones_are_answered(server, monkeypatch):
    with monkeypatch.context() as patch:
        fail_for(server, patch, lambda request: True)
        assert [answer.status_code for answer in post_all(server, ["a b", "c d", "e f"])] == [500, 500, 500]
    assert post(server, "The cat").status_code == 200
    with server.http() as http:
        assert http.get("/health").status_code == 200


def test_a_text_stream_that_raises_ends_its_own_request_only(server, monkeypatch):
    from headstart.text.text_stream import TextStream

    push = TextStream.push

    def raising(self, tokens):
        if self._stops is not None:
            raise RuntimeError(f"cannot decode {SECRET}")
        return push(self, tokens)

    monkeypatch.setattr(TextStream, "push", raising)
    with server.http() as http, ThreadPoolExecutor(2) as pool:
        bad = pool.submit(http.post, "/v1/completions", json=BODY | {"prompt": "a", "stop": "x"})
        good = pool.submit(post, server, "The cat")
    assert bad.result().status_code == 500
    assert SECRET not in bad.result().text
    assert good.result().status_code == 200


def test_an_unexpected_error_is_answered_without_its_words_and_logged_without_them(server, monkeypatch, caplog):
    def broken(*_):
        raise KeyError(SECRET)

    monkeypatch.setattr(server.service.preparer, "completion", broken)
    with caplog.at_level(logging.DEBUG):
        answer = post(server, "a")
    assert answer.status_code == 500
    assert "marmalade" not in answer.text + caplog.text
    assert "KeyError" in caplog.text
