"""Runs a service until a signal ends it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from headstart.serve.app import make_app
from headstart.serve.security import connection_class
from headstart.serve.service import Service
from headstart.serve.settings import Settings

_CLOSING = 3  # seconds for connections to close, after all requests have ended


class Server(uvicorn.Server):
    """uvicorn's server, which ends after the requests in flight have ended, with exit status 0.

    SIGTERM or Ctrl-C begins the end; the same again ends at once.
    """

    def __init__(self, service: Service) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                make_app(service), loop="asyncio", http=connection_class(settings), ws="none", lifespan="on", access_log=False,
                log_level="warning", server_header=False, limit_concurrency=settings.max_connections, proxy_headers=False,
                h11_max_incomplete_event_size=settings.max_header, timeout_graceful_shutdown=_CLOSING,
            )
        )  # fmt: skip
        self._service = service
        self._ending: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end. Called in a signal handler."""
        if self._service.is_stopping:
            self.should_exit = True
            self.force_exit = self.force_exit or sig == signal.SIGINT
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """End after the requests in flight. Only on the event loop."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        await self._service.drain()
        self.should_exit = True


def listen(settings: Settings) -> socket.socket:
    """A socket with the server's address; connections are refused until `serve` is called.

    Raises ValueError where the address is taken or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise ValueError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; name another --port or --host"
        ) from None
    return bound


def serve(service: Service, listening: socket.socket, on_ready: Callable[[], object] = lambda: None) -> None:
    """Serve until a signal. on_ready: called when requests are taken."""

    async def run() -> None:
        server = Server(service)
        serving = asyncio.ensure_future(server.serve([listening]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if not serving.done():
            on_ready()
        await serving

    asyncio.run(run())
