"""The settings of a server that clients cannot change."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits, and who may ask.

    model: the name under which the model is served.
    host, port: where to listen; port 0: any free one.
    max_tokens: most tokens of an answer; None: as many as the context has.
    max_queue: answers that may wait.
    timeout: seconds within which a request is answered, its waiting included.
    grace: seconds that requests have after a signal to stop.
    keys: API keys, of which clients need one; (): clients need none.
    origins: web pages (scheme, host and port) whose scripts may ask, or "*"; (): none.
    hosts: names by which clients may call the server, or "*"; (): on a loopback address its names only, elsewhere any.
    max_body: bytes of a request's body.
    max_header: bytes of a request's head.
    max_connections: open connections.
    slow_seconds: seconds that a client has to send a request, and to take a piece of an answer.
    with_metrics: whether every answer has its figures of speculation, asked for or not.
    with_vllm_metrics: whether metrics have vLLM's names too.
    """

    model: str = "headstart"
    host: str = "127.0.0.1"
    port: int = 8000
    max_tokens: int | None = None
    max_queue: int = 256
    timeout: float = 600.0
    grace: float = 30.0
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body: int = 4 * 2**20
    max_header: int = 16 * 2**10
    max_connections: int = 512
    slow_seconds: float = 60.0
    with_metrics: bool = False
    with_vllm_metrics: bool = False

    def __post_init__(self) -> None:
        for name in ("max_queue", "timeout", "max_body", "max_header", "max_connections", "slow_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.grace < 0 or not 0 <= self.port < 2**16:
            raise ValueError(f"grace is {self.grace} and port is {self.port}; they must be at least 0, and port less than 65536")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
