"""From messages to tokens and a loss mask, and what a heads' trainer reads: distilled lines, chats, plain texts.

Which tokens are the assistant's is the template's to say, never a search for strings. This file knows files and templates. It
refuses to know tensors, models and what is learned.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.text.chat_template import checked_messages, name_of, render
from headstart.text.jsonl import read_fields
from headstart.text.tokenizer import special_ids, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


# -- one conversation -------------------------------------------------------------------------------------------------------


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and a mask that is 1 where they are the assistant's, its end-of-turn tokens included.

    By the template's generation markers where it has them, else by differencing. Both lists are as long as the text. Raises
    ValueError, naming the tokenizer, for a template that renders the beginning of a conversation in another way than the whole.
    """
    messages = checked_messages(messages)
    return _by_markers(tokenizer, messages) or _by_differencing(tokenizer, messages)


def follow_up(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """What the template writes between the end of the last reply in `messages` and the begin of the next one.

    The last message is no reply. With it, a reply's own tokens can stay in the text as they were sampled.
    """
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    told, mask = encode_conversation(tokenizer, messages[: last + 1])
    end = len(mask) - mask[::-1].index(1) if any(mask) else len(mask)
    whole = _tokens(tokenizer, messages, is_prompt=True)
    _check_prefix(tokenizer, told[:end], whole)
    return whole[end:]


def _by_markers(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]] | None:
    """None without markers, and where the mask has not one span for every reply: transformers finds a span's ends by character,
    and loses those that begin with a blank if the tokenizer counts blanks to no token (`trim_offsets`, as Llama 3 has it)."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template is not None else ""
    if not tokenizer.is_fast or not MARKER.search(template):
        return None
    found = render(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
    tokens, mask = list(found["input_ids"]), list(found["assistant_masks"])
    num_spans = sum(now > before for before, now in zip([0, *mask], mask, strict=False))
    return (tokens, mask) if num_spans == sum(message["role"] == "assistant" for message in messages) else None


def _by_differencing(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """A reply is what the whole has more than a prompt for it has, up to its last special token: the end of the turn."""
    whole = _tokens(tokenizer, messages)
    mask = [0] * len(whole)
    specials = special_ids(tokenizer)
    for place in (place for place, message in enumerate(messages) if message["role"] == "assistant"):
        if place == 0:
            raise ValueError("the conversation begins with the assistant, so its reply has no prompt; begin with a user's message")
        before, after = _tokens(tokenizer, messages[:place], is_prompt=True), _tokens(tokenizer, messages[: place + 1])
        _check_prefix(tokenizer, before, whole)
        _check_prefix(tokenizer, after, whole)
        begin, end = len(before), len(after)
        end = next((i for i in range(end, begin, -1) if whole[i - 1] in specials), end)
        mask[begin:end] = [1] * (end - begin)
    return whole, mask


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], is_prompt: bool = False) -> list[int]:
    return list(render(tokenizer, messages, add_generation_prompt=is_prompt, return_dict=False))


def _check_prefix(tokenizer: PreTrainedTokenizerBase, beginning: list[int], whole: list[int]) -> None:
    if whole[: len(beginning)] != beginning:
        raise ValueError(
            f"the chat template of {name_of(tokenizer)} renders the beginning of this conversation in another way than the whole, "
            "so its replies cannot be told apart; use conversations of one reply, or a template with generation markers"
        )


# -- examples ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A text to learn from.

    tokens, mask: as long as the text; mask is True for tokens that count. temperature, seed: those the target answered with, where
    it was this target in this package (`g(seed, index, token)` is then the noise of the token at `index`); else None.
    """

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]
    temperature: float | None = None
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class ReadReport:
    """What became of the data. num_read: lines and files of text; num_cut: conversations that lost their end; num_pieces:
    examples that are a piece of a longer plain text; num_foreign: distilled lines whose target is not known to be this one;
    dropped: how often for which reason."""

    num_read: int = 0
    num_cut: int = 0
    num_pieces: int = 0
    num_foreign: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        words = [f"{self.num_read} read"]
        counts = {"cut": self.num_cut, "pieces of texts": self.num_pieces, "of an unknown or other target": self.num_foreign}
        words += [f"{count} {what}" for what, count in counts.items() if count]
        return ", ".join(words + [f"{count} dropped: {why}" for why, count in self.dropped.most_common()])


def read_examples(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    digest: str | None = None,
    max_length: int | None = None,
    *,
    any_target: bool = False,
    vocab: int | None = None,
) -> tuple[list[Example], ReadReport]:
    """Everything in these files, in order, and what became of it.

    A .jsonl file (or .gz, .xz) holds distilled lines (`tokens`, `loss_mask`), chats (`messages`: the assistant's tokens count) or
    texts (`text`: all count); any other file is one text. Conversations are cut at max_length tokens, texts are split into pieces
    of it. digest: of the target to be accelerated; lines distilled from another one are refused unless any_target. vocab: the
    target's, where it is larger than the tokenizer's. Raises ValueError, naming file and line, for what cannot be read.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}; an example needs at least 2 tokens")
    reader = _Reader(tokenizer, digest, max_length, any_target, vocab or vocabulary_size(tokenizer))
    examples = [example for path in paths for example in reader.read(Path(path))]
    if not examples:
        raise ValueError(f"there is nothing to learn in {', '.join(map(str, paths))}: {reader.report}")
    return examples, reader.report


class _Reader:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, digest: str | None, max_length: int | None, any_target: bool, vocab: int
    ) -> None:
        self.tokenizer = tokenizer
        self.digest = digest
        self.max_length = max_length
        self.any_target = any_target
        self.vocab = vocab
        self.report = ReadReport()

    def read(self, path: Path) -> Iterator[Example]:
        for number, fields in read_fields(path, "text"):
            self.report.num_read += 1
            try:
                yield from self._line(fields)
            except ValueError as error:
                raise ValueError(f"line {number} of {path}: {error}") from error

    def _line(self, fields: dict[str, Any]) -> Iterator[Example]:
        if "tokens" in fields:
            return self._distilled(fields)
        if isinstance(fields.get("messages"), list):
            return self._chat(fields["messages"])
        if isinstance(fields.get("text"), str):
            return self._text(fields["text"])
        raise ValueError("it has no field to learn from; give tokens and loss_mask, or messages, or text")

    def _distilled(self, fields: dict[str, Any]) -> Iterator[Example]:
        tokens, mask = fields["tokens"], fields.get("loss_mask")
        if not isinstance(tokens, list) or not isinstance(mask, list) or len(tokens) != len(mask):
            sizes = [len(one) if isinstance(one, list) else None for one in (tokens, mask)]
            raise ValueError(f"tokens and loss_mask must be two lists of one length; they have {sizes[0]} and {sizes[1]} items")
        strange = next((token for token in tokens if not isinstance(token, int) or not 0 <= token < self.vocab), None)
        if strange is not None:
            raise ValueError(f"token {strange!r} is not in the vocabulary of {self.vocab}")
        target, settings = (_object(fields, name) for name in ("target", "settings"))
        is_own = self._is_own(target)
        self.report.num_foreign += not is_own
        temperature, seed = settings.get("temperature"), settings.get("seed")
        if not isinstance(temperature, int | float | None) or not isinstance(seed, int | None):
            raise ValueError(f"it was answered at temperature {temperature!r} with seed {seed!r}; these must be numbers, or null")
        return self._cut(tokens, mask, temperature, seed if is_own else None)

    def _is_own(self, target: dict[str, Any]) -> bool:
        """Whether the answer is known to be this target's; one that is known to be another's is refused."""
        given = target.get("digest")
        if given is not None and self.digest is not None and given != self.digest and not self.any_target:
            raise ValueError(
                f"this answer is of {target.get('name', 'a target')} (digest {given}), and the target here is {self.digest}; heads "
                "learn best from their own target's answers: distill anew, or allow others with any_target=True (--any-target)"
            )
        return given is not None and given == (self.digest or given)

    def _chat(self, messages: list[Any]) -> Iterator[Example]:
        messages = checked_messages(messages)
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"it holds messages, and {name_of(self.tokenizer)} has no chat template; give texts, or distilled lines"
            )
        try:
            tokens, mask = encode_conversation(self.tokenizer, messages)
        except ValueError as error:  # this conversation does not fit the template; others may
            return self._drop(str(error))
        return self._cut(tokens, mask)

    def _cut(
        self, tokens: list[int], mask: list[int], temperature: float | None = None, seed: int | None = None
    ) -> Iterator[Example]:
        if not tokens:
            return self._drop("empty: no answer, or one that was cut short and not wanted")
        if not any(mask):
            return self._drop("data without assistant turns")
        size = self.max_length or len(tokens)
        if not any(mask[1:size]):
            return self._drop("the first reply begins beyond max_length")
        self.report.num_cut += len(tokens) > size
        return iter([_example(tokens[:size], mask[:size], temperature, seed)])

    def _text(self, text: str) -> Iterator[Example]:
        tokens = self.tokenizer.encode(text, verbose=False)
        size = self.max_length or max(1, len(tokens))
        pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        whole = [piece for piece in pieces if len(piece) > 1]
        if not whole:
            return self._drop("a text of less than 2 tokens")
        self.report.num_pieces += len(whole) if len(pieces) > 1 else 0
        return (_example(piece, [1] * len(piece), None, None) for piece in whole)

    def _drop(self, why: str) -> Iterator[Example]:
        self.report.dropped[why] += 1
        return iter(())


def _object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    found = fields.get(name)
    if not isinstance(found, dict | None):
        raise ValueError(f"its {name} is a {type(found).__name__}; it must be an object, as `headstart distill` writes it")
    return found or {}


def _example(tokens: list[int], mask: list[int], temperature: float | None, seed: int | None) -> Example:
    return Example(tuple(tokens), tuple(map(bool, mask)), temperature, seed)
