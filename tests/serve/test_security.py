"""Keys, names of the host, headers of responses, and connections that do nothing."""

import socket
import time
from contextlib import suppress

import pytest
from serving import embedded_service, running

from headstart.serve.security import KEYS_VARIABLE, Keys, is_loopback, read_keys


def test_keys_are_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert read_keys(None) == ()
    monkeypatch.setenv(KEYS_VARIABLE, "one, two")
    assert read_keys(None) == ("one", "two")
    file = tmp_path / "keys"
    file.write_text("# ours\nthree\n\nfour\n")
    assert read_keys(str(file)) == ("three", "four")


def test_a_file_without_keys_is_refused_and_so_is_a_key_that_no_header_holds(tmp_path):
    file = tmp_path / "keys"
    file.write_text("\n# none\n")
    with pytest.raises(ValueError, match="holds no API key"):
        read_keys(str(file))
    file.write_text("a key\n")
    with pytest.raises(ValueError, match="a header cannot hold it"):
        read_keys(str(file))


def test_a_key_is_known_whole_only():
    keys = Keys(["sesame"])
    assert keys.name_of("Bearer sesame") == keys.name_of("bearer sesame ")
    assert [keys.name_of(text) for text in ("Bearer sesam", "Bearer ", "sesame", "Bearer sesame sesame")] == [None] * 4


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)])
def test_loopback_addresses_are_recognised(host, expected):
    assert is_loopback(host) == expected


def test_a_page_that_pretends_to_be_this_server_is_refused(server):
    with server.http() as http:
        assert http.get("/health", headers={"Host": "evil.example"}).status_code == 403
        assert http.get("/health", headers={"Host": "localhost:1"}).status_code == 200


def test_responses_have_strict_headers_and_allow_no_other_origin(server):
    with server.http() as http:
        answer = http.get("/v1/models", headers={"Origin": "https://page.example"})
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers
    assert "server" not in answer.headers


@pytest.fixture(scope="module")
def open_server():
    with running(
        embedded_service((None,), slow_seconds=0.4, origins=("https://page.example",), hosts=("name.example",))
    ) as started:
        yield started


def test_an_origin_that_is_named_may_ask(open_server):
    headers = {"Origin": "https://page.example", "Host": "name.example"}
    preflight = headers | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with open_server.http() as http:
        assert http.get("/health", headers=headers).headers["access-control-allow-origin"] == "https://page.example"
        assert http.options("/v1/completions", headers=preflight).status_code == 200
        assert "access-control-allow-origin" not in http.get("/health", headers=headers | {"Origin": "https://x.example"}).headers


@pytest.mark.parametrize("start", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: na"])
def test_a_connection_without_a_request_is_closed(open_server, start):
    host, port = open_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(start)
        began = time.monotonic()
        with suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        assert time.monotonic() - began < 3


def test_a_connection_with_an_unread_body_is_not_used_again():
    with running(embedded_service(max_body=100)) as server, server.http() as client:
        answer = client.post("/v1/completions", content=b"x" * 2**20)
        assert (answer.status_code, answer.headers["connection"]) == (413, "close")
        assert client.get("/health").status_code == 200
