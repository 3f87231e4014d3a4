"""Grammars as constraints: JSON schemas and regular expressions, by the library llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class GrammarTokens:
    """A tokenizer as grammars read it; made once for a model, in about a second.

    vocab: number of the target's logits.
    stop_ids: tokens that end an answer, which a grammar admits where a text may end.
    Raises ValueError for a tokenizer that the library cannot read, and without the library.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: int, stop_ids: Sequence[int]) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ValueError("grammars need the package llguidance; install headstart[serve]") from None
        if not stop_ids:
            raise ValueError("grammars need a stop token, and this model has none")
        self.vocab, self.stop_ids = vocab, tuple(stop_ids)
        try:
            self.tokens: LLTokenizer = from_tokenizer(cast(Any, tokenizer), n_vocab=vocab, eos_token=list(stop_ids))
        except Exception as error:  # of another library, which may raise anything
            raise ValueError(f"grammars cannot read this model's tokenizer: {error}") from error


def json_schema(schema: Mapping[str, Any] | None) -> str:
    """The grammar of a JSON schema, written on one line; None: of any object. Raises ValueError for what is no JSON.

    On one line, because small models would add spaces for ever.
    """
    from llguidance import LLMatcher

    text = json.dumps(schema if schema is not None else _ANY_OBJECT)
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})


def regex(pattern: str) -> str:
    """The grammar of a regular expression that the whole answer matches."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(pattern)


class Grammar:
    """The constraint that an output begins a text of a grammar, and ends where such a text may end.

    grammar: as `json_schema` or `regex` makes it.
    Raises ValueError for a grammar that cannot be read or has no text.

    error: what went wrong, after which only the stop tokens are admitted; None: nothing.
    """

    def __init__(self, tokens: GrammarTokens, grammar: str) -> None:
        from llguidance import LLMatcher

        self._tokens = tokens
        self._matcher: LLMatcher = LLMatcher(tokens.tokens, grammar, log_level=0)
        self._consumed: tuple[int, ...] = ()
        self.error: str | None = None
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be read: {_line(self._matcher.get_error())}")

    def mask(self, output: tuple[int, ...]) -> Tensor:
        """[vocab] bool: the tokens that may follow an output. The stop tokens alone after an output that is none of the grammar."""
        if self.error is None and self._goto(output):
            allowed = self._allowed()
            if bool(allowed.any()):
                return allowed
        return self._stops()

    def _goto(self, output: tuple[int, ...]) -> bool:
        """Bring the matcher to an output. Returns whether it begins a text of the grammar."""
        common = 0
        while common < min(len(output), len(self._consumed)) and output[common] == self._consumed[common]:
            common += 1
        if common < len(self._consumed):
            self._matcher.rollback(len(self._consumed) - common)
        rest = [token for token in output[common:] if token not in self._tokens.stop_ids]
        count = self._matcher.try_consume_tokens(rest)
        self._consumed = output[: common + count]
        self._check()
        return common + count == len(output)

    def _allowed(self) -> Tensor:
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed = bits.flatten().bool()
        missing = self._tokens.vocab - len(allowed)
        return torch.cat([allowed, allowed.new_zeros(missing)]) if missing > 0 else allowed[: self._tokens.vocab]

    def _stops(self) -> Tensor:
        allowed = torch.zeros(self._tokens.vocab, dtype=torch.bool)
        allowed[list(self._tokens.stop_ids)] = True
        return allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            self.error = _line(self._matcher.get_error())


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
