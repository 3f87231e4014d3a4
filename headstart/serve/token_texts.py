"""The text and the bytes of single tokens, for log-probabilities and trees."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from headstart.text.detokenizer import BYTE_TOKEN, REPLACEMENT
from headstart.text.tokenizer import decode, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEPT = 2**16  # tokens whose texts are kept


class TokenTexts:
    """Texts of tokens as they are inside a text: a leading space is kept, a special token is its name."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._anchor = list(tokenizer.encode("a", add_special_tokens=False))  # decoded first, a token loses its leading space
        self._anchor_text = decode(tokenizer, self._anchor)
        self._of_byte = {letter: byte for byte, letter in _byte_letters().items()}
        self.text = lru_cache(_KEPT)(self._text)
        self.bytes = lru_cache(_KEPT)(self._bytes)

    def _text(self, token: int) -> str:
        """The text of a token; with replacement characters where its bytes are no characters."""
        if token in self._special:
            return str(self._tokenizer.convert_ids_to_tokens(token))
        return decode(self._tokenizer, [*self._anchor, token])[len(self._anchor_text) :]

    def visible(self, token: int) -> str:
        """The text of a token in an answer, where special tokens have none."""
        return "" if token in self._special else self.text(token)

    def _bytes(self, token: int) -> tuple[int, ...]:
        """The bytes of a token, also where they are part of a character."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if BYTE_TOKEN.fullmatch(name):
            return (int(name[3:5], 16),)
        if REPLACEMENT in (text := self.text(token)) and all(letter in self._of_byte for letter in name):
            return tuple(self._of_byte[letter] for letter in name)
        return tuple(text.encode("utf-8", "replace"))


def _byte_letters() -> dict[int, str]:
    """The letter by which byte-level vocabularies write each byte: its own where that can be printed, else one from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + number) for number, byte in enumerate(others)}
