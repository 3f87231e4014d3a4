"""What stands between the network and the app: keys, names, limits of size and time, and headers of responses."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from headstart.serve.errors import ApiError
from headstart.serve.settings import Settings

logger = logging.getLogger("headstart.serve")

KEYS_VARIABLE = "HEADSTART_API_KEYS"
_OPEN = ("/health", "/ready")  # paths that need no key
_KEYED = ("/v1/", "/tokenize", "/detokenize", "/metrics", "/openapi.json")  # paths that need one, by their beginning
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def read_keys(path: str | None) -> tuple[str, ...]:
    """The API keys of a file, one a line, or else those in the variable `HEADSTART_API_KEYS`, with commas between them.

    Raises ValueError for a file without keys, and for a key that no header can hold.
    """
    if path is not None:
        keys = [line.strip() for line in Path(path).read_text().splitlines()]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not keys:
            raise ValueError(f"the file {path} holds no API key; write one a line")
    else:
        keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError("an API key has a space or a character that is not ASCII; a header cannot hold it")
    return tuple(keys)


class Keys:
    """Compares keys in a time that does not depend on them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def name_of(self, authorization: str) -> str | None:
        """A name of the key in a header `Authorization: Bearer KEY`; None where it is none of ours."""
        scheme, _, key = authorization.partition(" ")
        digest = sha256(key.strip().encode()).digest()
        is_known = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:16] if any(is_known) and scheme.lower() == "bearer" else None


class Guard:
    """Checks a request's name of the host, key and size, and adds headers to its response.

    `scope["headstart.user"]` is then the name of the client's key, or its address.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._keys = Keys(settings.keys) if settings.keys else None
        self._hosts = settings.hosts or (_loopback_names(settings.host) if is_loopback(settings.host) else ("*",))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, _with_headers(send))
            return
        try:
            await self._app(scope, _Body(receive, self._settings), _with_headers(send))
        except Exception as error:  # answered by the app; raised again for servers that log what it says
            logger.debug("a request failed: %s", type(error).__name__)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["path"]) > self._settings.max_header:
            raise ApiError(431, f"the headers are larger than {self._settings.max_header} bytes", code="headers_too_large")
        if "*" not in self._hosts and _host_name(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "the server is not called by this name; start it with --allow-host to allow it", "host")
        client = scope.get("client")
        scope["headstart.user"] = client[0] if client else ""
        is_preflight = scope["method"] == "OPTIONS"
        if self._keys is not None and not is_preflight and scope["path"].startswith(_KEYED):
            name = self._keys.name_of(headers.get("authorization", ""))
            if name is None:
                raise ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key")
            scope["headstart.user"] = name
        size = headers.get("content-length", "0")
        if size.isdigit() and int(size[:20]) > self._settings.max_body:
            raise _too_large(self._settings)


_UNREAD = (401, 403, 408, 413)  # of answers that may come before the body is read, after which a connection cannot be used again


class _Body:
    """A request's messages, with limits of their size and of the time that they take."""

    def __init__(self, receive: Receive, settings: Settings) -> None:
        self._receive, self._settings = receive, settings
        self._size, self._is_complete = 0, False

    async def __call__(self) -> Message:
        """The next message."""
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._settings.slow_seconds):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the body of the request did not come in time") from None
        self._size += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._size > self._settings.max_body:
            raise _too_large(self._settings)
        return message


def _too_large(settings: Settings) -> ApiError:
    return ApiError(413, f"the body is larger than {settings.max_body} bytes", code="body_too_large")


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if message["status"] in _UNREAD:
                headers["Connection"] = "close"
            message = {**message, "headers": headers.raw}
        await send(message)

    return wrapped


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _loopback_names(host: str) -> tuple[str, ...]:
    """Names of this machine for itself. Any other name would be that of a page that pretends to be this server."""
    return ("localhost", "127.0.0.1", "::1", host)


def _host_name(header: str) -> str:
    """The host of a `Host` header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] or header if header.count(":") == 1 else header


class Connection(H11Protocol):
    """A connection that is closed where its client sends no request, or takes no answer, for `SECONDS`."""

    SECONDS = 60.0

    def connection_made(self, transport: Any) -> None:
        """Start the clocks."""
        super().connection_made(transport)
        self._cycle_before: object = None
        self._check = self.loop.call_later(self.SECONDS, self._close_idle)
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self.SECONDS))

    def _close_idle(self) -> None:
        """Close the connection if no request came since the last check, or since the connection was made."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.cycle is self._cycle_before:
            self.transport.abort()
        else:
            self._cycle_before = self.cycle
            self._check = self.loop.call_later(self.SECONDS, self._close_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._check.cancel()
        super().connection_lost(exc)


def connection_class(settings: Settings) -> type[Connection]:
    """The connections of a server with these settings."""
    return type("Connection", (Connection,), {"SECONDS": settings.slow_seconds})
