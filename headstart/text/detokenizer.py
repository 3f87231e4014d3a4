"""Streaming detokenization: tokens in, final pieces of text out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, cast

from headstart.text.tokenizer import decode, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or an incomplete one
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
MAX_CHARACTER_BYTES = 4


class Detokenizer:
    """Turns tokens into text piece by piece; the pieces joined equal decoding all tokens at once.

    The text of `push` is final and depends on the tokens alone, not on how they were grouped into pushes. Two things are held back:
    a character whose bytes are incomplete, and a run of byte tokens such as `<0xE2>`, because a decoder with byte fallback drops
    the whole run when one byte of it is wrong.

    The cost of a push does not grow with the text. Only a window is decoded: some context whose text was returned already (a token
    decoded alone would lose its leading space), then the new tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._without_text = special_ids(tokenizer)
        self._window: list[int] = []  # context, then the newest tokens
        self._held: list[int] = []  # after the window: byte tokens, and special tokens, which do not end a run of bytes
        self._num_returned = 0  # characters of the window's text that were returned
        self._limit = 32  # tokens in the window before the context is cut

    def copy(self) -> Detokenizer:
        """An independent copy in the same state."""
        clone = copy(self)
        clone._window, clone._held = self._window[:], self._held[:]
        return clone

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that becomes final with these tokens."""
        num_ready = 0
        for token_id in token_ids:
            self._held.append(token_id)
            if self._ends_bytes(token_id):
                num_ready = len(self._held)
        if not num_ready:
            return ""
        self._window += self._held[:num_ready]
        del self._held[:num_ready]
        piece = self._new_text(_without_incomplete_end(self._decode(self._window)))
        if len(self._window) > self._limit:
            self._cut_context()
        return piece

    def flush(self) -> str:
        """The text that was held back, decoded as if no token followed. The last call."""
        self._window += self._held
        self._held = []
        return self._new_text(self._decode(self._window))

    def _new_text(self, text: str) -> str:
        piece = text[self._num_returned :]
        self._num_returned = len(text)
        return piece

    def _ends_bytes(self, token_id: int) -> bool:
        """Whether later tokens cannot change the text up to this one, except for an incomplete character at its end."""
        if token_id in self._without_text:
            return False
        token = cast("str | None", self._tokenizer.convert_ids_to_tokens(token_id))
        return token is not None and not BYTE_TOKEN.fullmatch(token)

    def _cut_context(self) -> None:
        """Drop all but the last few tokens of the window.

        A context may begin inside a character, which spoils at most its first three bytes. After four characters of context, hence
        at least four bytes, text is decoded as in the complete sequence.
        """
        size = MAX_CHARACTER_BYTES
        text = self._decode(self._window[-size:])
        while len(text) < MAX_CHARACTER_BYTES and size < len(self._window):
            size *= 2  # some tokens, such as special ones, have no text
            text = self._decode(self._window[-size:])
        self._window = self._window[-size:]
        self._num_returned = len(_without_incomplete_end(text))
        self._limit = 2 * size + 24

    def _decode(self, token_ids: list[int]) -> str:
        return decode(self._tokenizer, token_ids)


def _without_incomplete_end(text: str) -> str:
    """The text without the one replacement character that an incomplete character at its end is decoded to."""
    return text.removesuffix(REPLACEMENT)
