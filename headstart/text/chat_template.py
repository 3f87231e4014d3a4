"""Chat messages: their validation, and their rendering by a tokenizer's chat template."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from headstart.text.jsonl import SURROGATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_RENDERING = 2.0  # seconds of CPU time for a chat template, which takes thousandths


def checked_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as dicts. Raises ValueError, naming the index, for what is no message with 'role' and 'content'."""
    return [_message(index, item) for index, item in enumerate(messages)]


def _message(index: int, item: object) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise ValueError(f"message {index} is a {type(item).__name__}; a message is a dict with 'role' and 'content'")
    for key in ("role", "content"):
        if key not in item:
            raise ValueError(f"message {index} has no '{key}'; a message is a dict with 'role' and 'content'")
        if not isinstance(item[key], str):
            raise ValueError(f"the '{key}' of message {index} is a {type(item[key]).__name__}; give a string")
        check_characters(item[key], f"the '{key}' of message {index}")
    return dict(item)


def check_characters(text: str, what: str) -> None:
    """Raise ValueError for a text with half of a surrogate pair. what: the text's name in the message."""
    if match := SURROGATE.search(text):
        raise ValueError(f"{what} holds half of a surrogate pair (U+{ord(match[0]):04X} at {match.start()}), which is no character")


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
    """What `apply_chat_template` returns for these messages.

    settings: keyword arguments of `apply_chat_template`.
    Raises ValueError if there is no template, or if it refuses the messages, fails, or takes over `LONGEST_RENDERING` seconds.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name_of(tokenizer)} has no chat template: give the prompt as one string, "
            "or set tokenizer.chat_template to the template the model was trained with"
        )
    from jinja2 import TemplateError

    try:
        with _time_limit(LONGEST_RENDERING):
            return tokenizer.apply_chat_template([dict(message) for message in messages], **settings)
    except TemplateError as error:
        raise ValueError(f"the chat template of {name_of(tokenizer)} refuses these messages: {error}") from error
    except Exception as error:  # a template is somebody else's program, which can raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the chat template of {name_of(tokenizer)} fails on these messages: {reason}") from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a template that takes this thread more seconds of CPU time.

    Python has no other way to stop a loop in the same thread: a trace function compares the time at every line of the template, and
    of nothing else.
    """
    deadline, previous = time.thread_time() + seconds, sys.gettrace()

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > deadline:
            raise TimeoutError(f"it has not ended after {seconds:g} seconds")
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return on_line if frame.f_code.co_filename == "<template>" else None

    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(previous)


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """How error messages name a tokenizer."""
    return f"the tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "the tokenizer"
