"""The connection to an OpenAI-compatible server: the client, the name of its model, and its errors as sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from openai import OpenAI

T = TypeVar("T")
R = TypeVar("R")
MAX_WORDS = 300  # characters of a server's own message


def connect(url: str, api_key: str | None = None, retries: int = 2) -> OpenAI:
    """A client of the endpoint.

    url: with its /v1.
    api_key: None: the endpoint needs none.
    retries: of a request that fails with HTTP 429 or 500, or without a connection.
    Raises ValueError without the package `openai`.
    """
    try:
        from openai import OpenAI
    except ImportError:
        raise ValueError("an endpoint needs the package openai; install it with: pip install 'headstart[endpoint]'") from None
    return OpenAI(base_url=url, api_key=api_key or "none", max_retries=retries)


def served_model(client: OpenAI, url: str, name: str | None) -> str:
    """The name of the model to ask for. A server that does not list its models is believed.

    name: None: the only one there is.
    Raises ValueError where the endpoint cannot be reached, where it has no model of that name, and where none was named and
    there is more than one.
    """
    from openai import APIConnectionError, APIStatusError, OpenAIError

    try:
        names = [model.id for model in client.models.list()]
    except APIConnectionError as error:
        raise ValueError(sentence(error, url)) from error
    except (OpenAIError, AttributeError, TypeError, ValueError) as error:
        if name is not None:
            return name
        status = f"HTTP {error.status_code}" if isinstance(error, APIStatusError) else "its answer is no list"
        raise ValueError(
            f"the endpoint {url} does not list its models ({status}); its URL mostly ends in /v1, else give --endpoint-model"
        ) from error
    if name is None and len(names) == 1:
        return names[0]
    if name is None or (names and name not in names):
        wanted = "is not told which model to use" if name is None else f"has no model {name!r}"
        raise ValueError(f"the endpoint {url} {wanted}; name one of its models: {', '.join(map(repr, names)) or 'none is listed'}")
    return name


def sentence(error: Exception, url: str) -> str:
    """What went wrong with a request, in one sentence with the server's own words."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, APITimeoutError):
        return f"the endpoint {url} does not answer in time"
    if isinstance(error, APIConnectionError):
        return f"the endpoint {url} cannot be reached ({error.__cause__ or error}); start its server, or correct the URL"
    body: object = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    words = " ".join(str(message or getattr(error, "message", error)).split())[:MAX_WORDS]
    status = f"HTTP {error.status_code}, " if isinstance(error, APIStatusError) else ""
    return f"the endpoint {url} does not answer: {status}{words}"


def is_too_long(error: Exception) -> bool:
    """Whether a server refuses a request because prompt and answer exceed its context."""
    from openai import BadRequestError

    return isinstance(error, BadRequestError) and any(word in str(error).lower() for word in ("context", "max_model_len"))


def at_once(work: Callable[[T], R], items: Iterable[T], num: int) -> Iterator[R]:
    """The results of `work` on each item, in the order in which they end; `num` run at once, each in a thread.

    Closing the iterator begins no further item. Raises what `work` raises.
    """
    waiting, results = iter(items), Queue[tuple[R | None, Exception | None]]()
    num_running = 0

    def run(item: T) -> None:
        try:
            results.put((work(item), None))
        except Exception as error:  # raised where the results are read
            results.put((None, error))

    while True:
        for item in waiting:
            Thread(target=run, args=(item,), daemon=True).start()  # a daemon does not delay an interruption
            num_running += 1
            if num_running == num:
                break
        if not num_running:
            return
        result, error = results.get()
        num_running -= 1
        if error is not None:
            raise error
        yield result  # type: ignore[misc]  # None only where `work` gives it
