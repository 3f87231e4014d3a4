"""Everything with characters: prompts into tokens, tokens into streamed text, stop strings, stop tokens.

Knows tokenizers and chat templates. Refuses to know tensors, logits and rounds: tokens come and go as integers.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from headstart.text.jsonl import SURROGATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int]

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
MAX_CHARACTER_BYTES = 4
LONGEST_RENDERING = 2.0  # seconds of processor time for a chat template, which takes thousandths
# -- tokens to text --


class Detokenizer:
    """Tokens in, text out, a piece at a time; the pieces joined equal decoding all tokens at once.

    The text of `push` is final and a function of the tokens alone, not of how they were grouped into pushes. Two things
    are not final and wait: a character whose bytes are incomplete, and a run of byte tokens such as `<0xE2>`, because a
    decoder with byte fallback gives up the whole run when one byte of it is wrong.

    The cost of a push does not grow with the text. A decoder sees only a window: some context whose text is already out
    (a token decoded alone would lose its leading space), then the new tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._silent = special_ids(tokenizer)
        self._window: list[int] = []  # context, then the newest tokens
        self._held: list[int] = []  # after the window: byte tokens, and special ones, which do not end a run of bytes
        self._num_out = 0  # characters of the window's text that are out
        self._limit = 32  # tokens in the window before the context is cut

    def copy(self) -> Detokenizer:
        """One that goes on from here by itself."""
        clone = copy(self)
        clone._window, clone._held = self._window[:], self._held[:]
        return clone

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make final."""
        num_ready = 0
        for token_id in token_ids:
            self._held.append(token_id)
            if self._ends_bytes(token_id):
                num_ready = len(self._held)
        if not num_ready:
            return ""
        self._window += self._held[:num_ready]
        del self._held[:num_ready]
        piece = self._release(_without_incomplete_end(self._decode(self._window)))
        if len(self._window) > self._limit:
            self._cut_context()
        return piece

    def flush(self) -> str:
        """What was waiting, as it would be decoded if no token followed; the last call."""
        self._window += self._held
        self._held = []
        return self._release(self._decode(self._window))

    def _release(self, text: str) -> str:
        piece = text[self._num_out :]
        self._num_out = len(text)
        return piece

    def _ends_bytes(self, token_id: int) -> bool:
        """Whether later tokens leave the text up to this one alone, but for an incomplete character at its end."""
        if token_id in self._silent:
            return False
        token = cast("str | None", self._tokenizer.convert_ids_to_tokens(token_id))
        return token is not None and not BYTE_TOKEN.fullmatch(token)

    def _cut_context(self) -> None:
        """Forget all but the last few tokens.

        A context may begin inside a character, which spoils at most its first three bytes. With four characters of
        context, hence at least four bytes, what follows is read as in the whole text.
        """
        size = MAX_CHARACTER_BYTES
        text = self._decode(self._window[-size:])
        while len(text) < MAX_CHARACTER_BYTES and size < len(self._window):
            size *= 2  # special tokens and such, that have no text
            text = self._decode(self._window[-size:])
        self._window = self._window[-size:]
        self._num_out = len(_without_incomplete_end(text))
        self._limit = 2 * size + 24

    def _decode(self, token_ids: list[int]) -> str:
        return decode(self._tokenizer, token_ids)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of `token_ids`, special tokens left out: what a stream of the same tokens joins to."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return cast("str", text)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that `decode` leaves out."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added.items() if token.special}


def _without_incomplete_end(text: str) -> str:
    """Bytes that are an incomplete character at the end are decoded to exactly one replacement character."""
    return text.removesuffix(REPLACEMENT)


# -- stop strings --


class StopStrings:
    """Text in, text out, up to the first stop string; holds back only what may become one.

    The stop string that *completes* first wins, which makes the answer independent of how the text was cut into pieces;
    among those that complete together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if "" in stops:
            raise ValueError("a stop string is empty: it would stop before the first token; leave it out")
        self._stops = stops
        self._held = ""

    def copy(self) -> StopStrings:
        """One that goes on from here by itself."""
        return copy(self)

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is out for certain, and the stop string that ended it, if any."""
        text = self._held + text
        found = [(start + len(stop), -len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, _, stop = min(found)
            self._held = ""
            return text[: end - len(stop)], stop
        num_held = self._longest_beginning(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """What was held back, once no text follows."""
        text, self._held = self._held, ""
        return text

    def _longest_beginning(self, text: str) -> int:
        """How many characters at the end of `text` are the beginning of a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


@dataclass(frozen=True)
class Piece:
    """Final text, how many of the pushed tokens belong to the answer, and the stop string that ended it."""

    text: str
    num_tokens_used: int
    stopped: str | None = None


class TextStream:
    """The text of one answer, streamed, cut at the first stop string.

    `num_tokens_used` counts the pushed tokens up to the one that completed the stop string, so that a kept path can be
    cut inside before any of it is emitted; where it is cut does not depend on how many tokens came at a time. Stop
    strings are looked for in the text, where special tokens do not appear: those are stop tokens (`stop_token_ids`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops) if stops else None

    def copy(self) -> TextStream:
        """One that goes on from here by itself."""
        clone = copy(self)
        clone._detokenizer = self._detokenizer.copy()
        clone._stops = self._stops and self._stops.copy()
        return clone

    def push(self, token_ids: Sequence[int]) -> Piece:
        if self._stops is None:
            return Piece(self._detokenizer.push(token_ids), len(token_ids))
        text = ""
        for num_used, token_id in enumerate(token_ids, 1):
            final, stopped = self._stops.push(self._detokenizer.push([token_id]))
            text += final
            if stopped:
                return Piece(text, num_used, stopped)
        return Piece(text, len(token_ids))

    def flush(self) -> Piece:
        """The rest, once no token follows; bytes that became text only now may still hold a stop string."""
        rest = self._detokenizer.flush()
        if self._stops is None:
            return Piece(rest, 0)
        text, stopped = self._stops.push(rest)
        return Piece(text if stopped else text + self._stops.flush(), 0, stopped)


# -- prompts to tokens --

_FIXED = {"add_generation_prompt": True, "return_dict": False}  # how a chat template is asked for a prompt


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The token ids of a prompt: a string, messages for the chat template, or token ids, which stay as they are."""
    if isinstance(prompt, str):
        _check_characters(prompt, "the prompt")
        return _not_empty(tokenizer.encode(prompt), "the prompt is an empty string: give at least one character")
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise ValueError(f"a prompt is a string, a list of messages or of token ids, not {type(prompt).__name__}")
    _not_empty(prompt, "the prompt is an empty list: give at least one message or token id")
    if all(isinstance(item, int) for item in prompt):
        return _within_vocabulary(tokenizer, cast("Sequence[int]", prompt))
    return encode_chat(tokenizer, checked_messages(prompt))


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: str | Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
) -> list[int]:
    """The token ids of a conversation that the model is to continue; a string is one message of the user.

    variables: what the chat template may read besides the messages. Raises ValueError for one that the template does not read,
    and for a tokenizer without a template.
    """
    if isinstance(messages, str):
        _not_empty(messages, "the message is an empty string: give at least one character")
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or any(isinstance(message, int) for message in messages):
        raise ValueError(f"a conversation is a string or a list of messages, not {_kind_of(messages)}")
    _not_empty(messages, "the conversation is an empty list: give at least one message")
    template = tokenizer.chat_template
    for name in variables or ():
        if template is not None and (name in ("messages", *_FIXED) or not re.search(rf"\b{re.escape(name)}\b", str(template))):
            raise ValueError(f"the chat template of {name_of(tokenizer)} takes no variable {name!r}; leave it out")
    token_ids = render(tokenizer, checked_messages(messages), **_FIXED, **(variables or {}))
    return _not_empty(token_ids, f"the chat template of {name_of(tokenizer)} made an empty prompt")


def _kind_of(messages: object) -> str:
    return "token ids" if isinstance(messages, Sequence) else type(messages).__name__


def _not_empty(items: Sequence[Any], sentence: str) -> list[Any]:
    if not len(items):
        raise ValueError(sentence)
    return list(items)


def _within_vocabulary(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    size = vocabulary_size(tokenizer)
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong} is not in the vocabulary of {name_of(tokenizer)}: ids are 0 to {size - 1}")
    return list(token_ids)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id, added tokens included. Slow: it counts them."""
    return max([len(tokenizer), *(token_id + 1 for token_id in tokenizer.added_tokens_decoder)])


def checked_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as dicts. Raises ValueError, naming the place, for what is no message with 'role' and 'content'."""
    return [_message(place, item) for place, item in enumerate(messages)]


def _message(place: int, item: object) -> dict[str, Any]:
    """A chat message, or a sentence that says what is wrong with it."""
    if not isinstance(item, Mapping):
        raise ValueError(f"message {place} is a {type(item).__name__}; a message is a dict with 'role' and 'content'")
    for key in ("role", "content"):
        if key not in item:
            raise ValueError(f"message {place} has no '{key}'; a message is a dict with 'role' and 'content'")
        if not isinstance(item[key], str):
            raise ValueError(f"the '{key}' of message {place} is a {type(item[key]).__name__}; give a string")
        _check_characters(item[key], f"the '{key}' of message {place}")
    return dict(item)


def _check_characters(text: str, what: str) -> None:
    if found := SURROGATE.search(text):
        raise ValueError(f"{what} holds half of a surrogate pair (U+{ord(found[0]):04X} at {found.start()}), which is no character")


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
    """Messages through the chat template: what `apply_chat_template` gives with these settings.

    Raises ValueError if there is no template, or if it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name_of(tokenizer)} has no chat template: give the prompt as one string, "
            "or set tokenizer.chat_template to the template the model was trained with"
        )
    from jinja2 import TemplateError

    try:
        with _limited(LONGEST_RENDERING):
            return tokenizer.apply_chat_template([dict(message) for message in messages], **settings)
    except TemplateError as error:
        raise ValueError(f"the chat template of {name_of(tokenizer)} refuses these messages: {error}") from error
    except Exception as error:  # a template is a program of others, which can fail in any way
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the chat template of {name_of(tokenizer)} fails on these messages: {said}") from error


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a template that takes this thread more seconds of processor time than that.

    Python has no other way to stop a loop in the same thread: every line of a template, and of nothing else, asks for the time.
    """
    end, before = time.thread_time() + seconds, sys.gettrace()

    def on_line(frame: FrameType, event: str, given: Any) -> Any:
        if time.thread_time() > end:
            raise TimeoutError(f"it has not ended after {seconds:g} seconds")
        return on_line

    def on_call(frame: FrameType, event: str, given: Any) -> Any:
        return on_line if frame.f_code.co_filename == "<template>" else None

    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """For sentences."""
    return f"the tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "the tokenizer"


# -- what belongs to a model --


def stop_token_ids(tokenizer: object, generation_config: object = None, config: object = None) -> tuple[int, ...]:
    """The tokens that end an answer: those of the generation config (or else the config), and the tokenizer's own.

    The union, because chat models often end a turn with a token that only the tokenizer names, while base models that
    became chat models keep an old end of text in their config.
    """
    of_model = _eos(generation_config) or _eos(config)
    return tuple(dict.fromkeys(of_model + _eos(tokenizer)))


def _eos(holder: object) -> tuple[int, ...]:
    eos: Any = getattr(holder, "eos_token_id", None)
    if eos is None:
        return ()
    found = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if wrong := [token_id for token_id in found if not isinstance(token_id, int) or isinstance(token_id, bool)]:
        raise ValueError(f"eos_token_id of the model is {wrong[0]!r}; it must be a token id, or a list of some")
    return found
