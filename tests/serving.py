"""A server in a thread of the tests' process, on a free port of this machine."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import openai

from headstart.engine.llm import LLM
from headstart.serve.lanes import Lane, Sizes, open_lanes
from headstart.serve.running import Server, listen
from headstart.serve.service import Service
from headstart.serve.settings import Settings
from headstart.target.loading import embedded
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer

SIZES = Sizes(max_rows=4)


@dataclass
class Running:
    """A server that runs."""

    service: Service
    server: Server
    url: str

    @property
    def engine(self):
        return self.service.lanes[0].engine

    def client(self, **more) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **more})

    def http(self, **more) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **more)

    def plain(self) -> LLM:
        """Plain decoding on the same target, in an engine of its own."""
        from headstart.engine.engine import Engine

        return LLM(Engine(self.engine.target, None, max_rows=4), self.service.preparer.tokenizer)


@contextmanager
def running(service: Service) -> Iterator[Running]:
    """Serve in a thread until the end of the block; then every slot must be free but those of kept prefixes."""
    listening = listen(service.settings)
    server = Server(service)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            threading.Event().wait(0.01)
        yield Running(service, server, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
    for lane in service.lanes:
        check_free(lane)


def check_free(lane: Lane) -> None:
    """No request is left in a lane, and no slot is in use but those of kept prefixes."""
    engine = lane.engine
    assert not lane.jobs
    assert engine.is_idle
    kept = sum(engine.seating[prefix.seat].capacity for prefix in engine.state.prefixes)
    assert engine.seating.num_used == kept
    assert engine.seating.num_used + engine.seating.num_free == engine.seating.num_slots


def embedded_service(
    drafters: Sequence[str | None] = ("mtp",), rules: Sequence[str] = ("coupled",), sizes: Sizes = SIZES, **settings
) -> Service:
    """A service of the embedded model."""
    target = embedded_target()
    lanes = open_lanes(target, drafters, rules, sizes)
    chosen = Settings(**{"model": "embedded", "port": 0, "grace": 5.0, **settings})
    return Service(load_tokenizer(embedded("target")), lanes, chosen)


_targets: list[Target] = []


def embedded_target() -> Target:
    if not _targets:
        _targets.append(Target.load(embedded("target")))
    return _targets[0]
