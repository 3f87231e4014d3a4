"""One server of the embedded model, shared by the tests of its answers."""

from collections.abc import Iterator

import pytest
from serving import Running, embedded_service, running


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with running(embedded_service(("mtp", "lookup"), with_vllm_metrics=True)) as started:
        yield started


@pytest.fixture(scope="session")
def client(server):
    return server.client()
