"""The framing of event streams, and that streams end with their clients."""

import asyncio
import json
import socket
import time
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import embedded_service, running

from headstart.serve.answering import DONE, Answering, event_bytes
from headstart.serve.jobs import Job, Mailbox, Update
from headstart.serve.preparing import Prepared
from headstart.serve.protocol import ChatRequest, CompletionRequest
from headstart.serve.responses import ChatForm, CompletionForm, Head, Options

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


def read_events(stream: bytes) -> list[str]:
    """The data of each event, by the rules of server-sent events: lines, blank lines between events."""
    events, data = [], []
    for line in stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if line:
            field, _, value = line.partition(":")
            assert field == "data"
            data.append(value.removeprefix(" "))
        elif data:
            events.append("\n".join(data))
            data = []
    assert not data, "the last event has no end"
    return events


@given(st.recursive(st.none() | TEXTS | st.integers(), lambda inner: st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8))
def test_an_event_is_read_back_whatever_its_text_holds(value):
    stream = event_bytes({"value": value}) + DONE
    first, last = read_events(stream)
    assert json.loads(first) == {"value": value}
    assert last == "[DONE]"


class WorkerOfUpdates:
    """Delivers given updates at once."""

    def __init__(self, texts):
        self._texts, self.cancelled = texts, []

    def submit(self, jobs):
        for job, texts in zip(jobs, self._texts, strict=True):
            for number, text in enumerate(texts):
                reason = "stop" if number == len(texts) - 1 else None
                job.mailbox.put(Update(job, tokens=(1, 2), guessed=(True, False), text=text, finish_reason=reason))

    def cancel(self, jobs, failure=None):
        self.cancelled += jobs


def answering_of(texts, body, form_type):
    mailbox, worker = Mailbox(), WorkerOfUpdates(texts)
    params = SimpleNamespace(logprobs=None)
    jobs = [Job(None, (1,), params, 0, None, mailbox, index=index) for index in range(len(texts))]
    form = form_type(Head("x", "model"), SimpleNamespace(), Options())
    return Answering(Prepared(jobs, 1, [""] * len(texts), 60.0), form, body, worker, None, False, lambda _: None), worker


def stream_of(texts, body, form_type):
    async def collect():
        answering, worker = answering_of(texts, body, form_type)
        await answering.start()
        stream = b"".join([event async for event in answering.events()])
        answering.close()
        assert not worker.cancelled
        return stream

    return asyncio.run(collect())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(TEXTS, min_size=1, max_size=5), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_the_pieces_of_every_answer_join_to_its_text(texts, is_chat, has_usage):
    fields = {"stream": True, "stream_options": {"include_usage": has_usage}}
    if is_chat:
        body, form = ChatRequest(messages=[{"role": "user", "content": "a"}], **fields), ChatForm
    else:
        body, form = CompletionRequest(prompt="a", **fields), CompletionForm
    *events, last = read_events(stream_of(texts, body, form))
    assert last == "[DONE]"
    objects = [json.loads(event) for event in events]
    assert (objects[-1]["choices"] == []) == has_usage
    joined = [""] * len(texts)
    for choice in (choice for event in objects for choice in event["choices"]):
        joined[choice["index"]] += (choice["delta"].get("content") or "") if is_chat else choice["text"]
    assert joined == ["".join(pieces) for pieces in texts]
    reasons = [choice["finish_reason"] for event in objects for choice in event["choices"] if choice["finish_reason"]]
    assert reasons == ["stop"] * len(texts)
    if has_usage:
        assert objects[-1]["usage"]["completion_tokens"] == 2 * sum(map(len, texts))


# -- clients that go away ---------------------------------------------------------------------------------------------------


def until(condition, seconds=10.0):
    """Wait for a condition. Returns whether it came true."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="module")
def slow_server():
    """One row and one answer at a time."""
    from headstart.serve.lanes import Sizes

    with running(embedded_service((None,), sizes=Sizes(max_rows=1, prefixes=0))) as server:
        yield server


LONG = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 1.0, "seed": 1}


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away_frees_its_slots(slow_server, is_streamed):
    engine = slow_server.engine
    body = json.dumps(LONG | {"stream": is_streamed}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    host, port = slow_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        assert until(lambda: engine.scheduler.running and engine.scheduler.running[0].output)
        request = engine.scheduler.running[0]
    assert until(lambda: request.finish_reason is not None)
    assert request.finish_reason == "abort"
    assert len(request.output) < 400
    assert until(lambda: engine.seating.num_used == 0)


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(slow_server):
    service = slow_server.service
    with slow_server.http() as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as first:
        lines = first.iter_lines()
        next(lines)
        for _ in range(3):  # one in the engine's own list, two in the queue
            with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=slow_server.url, timeout=0.15) as impatient:
                impatient.post("/v1/completions", json=LONG)
        assert until(lambda: len(service.queue) == 0 and not slow_server.engine.scheduler.waiting)
        assert "data:" in "".join(list(lines)[-3:])
    assert until(lambda: not service.in_flight)


def test_a_stream_that_fails_midway_ends_with_an_error_event(slow_server):
    with slow_server.http() as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "timeout": 0.2}) as answer:
        stream = b"".join(answer.iter_raw())
    *events, error, done = read_events(stream)
    assert done == "[DONE]"
    assert json.loads(error)["error"]["code"] == "timeout"
    assert events
    assert until(lambda: slow_server.engine.is_idle)
