"""Conversations as tokens with a loss mask, and the training examples of heads: distilled lines, chats, plain texts.

The chat template alone determines which tokens are the assistant's; strings are never searched for. Must not import torch.
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
    """The tokens of a conversation, and its loss mask: 1 where they are the assistant's, end-of-turn tokens included.

    Determined by the template's generation markers where it has them, else by differencing. Both lists have one item per token.
    Raises ValueError, naming the tokenizer, for a template that renders the beginning of a conversation differently when more
    follows.
    """
    messages = checked_messages(messages)
    return _by_markers(tokenizer, messages) or _by_differencing(tokenizer, messages)


def follow_up(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The tokens that the template writes between the end of the last reply in `messages` and the beginning of the next one.

    messages: the last one is not the assistant's.
    Appended to a reply's tokens as they were sampled, these continue the conversation without encoding the reply again.
    Raises ValueError as `encode_conversation` does.
    """
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    answered, mask = encode_conversation(tokenizer, messages[: last + 1])
    end = len(mask) - mask[::-1].index(1) if any(mask) else len(mask)
    prompt = _tokens(tokenizer, messages, is_prompt=True)
    _check_prefix(tokenizer, answered[:end], prompt)
    return prompt[end:]


def _by_markers(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]] | None:
    """Tokens and loss mask by the template's generation markers.

    None without markers, and where the mask has not one span for every reply: transformers finds the bounds of a span by character,
    and misses those that begin with a blank if the tokenizer assigns blanks to no token (`trim_offsets`, as in Llama 3).
    """
    template = tokenizer.get_chat_template() if tokenizer.chat_template is not None else ""
    if not tokenizer.is_fast or not MARKER.search(template):
        return None
    encoding = render(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
    tokens, mask = list(encoding["input_ids"]), list(encoding["assistant_masks"])
    num_spans = sum(current > previous for previous, current in zip([0, *mask], mask, strict=False))
    return (tokens, mask) if num_spans == sum(message["role"] == "assistant" for message in messages) else None


def _by_differencing(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Tokens and loss mask, where a reply is what the text with it has more than the prompt for it.

    It ends with its last special token, which ends the turn.
    """
    tokens = _tokens(tokenizer, messages)
    mask = [0] * len(tokens)
    specials = special_ids(tokenizer)
    for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
        if index == 0:
            raise ValueError("the conversation begins with the assistant, so its reply has no prompt; begin with a user's message")
        before, after = _tokens(tokenizer, messages[:index], is_prompt=True), _tokens(tokenizer, messages[: index + 1])
        _check_prefix(tokenizer, before, tokens)
        _check_prefix(tokenizer, after, tokens)
        begin, end = len(before), len(after)
        end = next((i for i in range(end, begin, -1) if tokens[i - 1] in specials), end)
        mask[begin:end] = [1] * (end - begin)
    return tokens, mask


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], is_prompt: bool = False) -> list[int]:
    return list(render(tokenizer, messages, add_generation_prompt=is_prompt, return_dict=False))


def _check_prefix(tokenizer: PreTrainedTokenizerBase, beginning: list[int], tokens: list[int]) -> None:
    if tokens[: len(beginning)] != beginning:
        raise ValueError(
            f"the chat template of {name_of(tokenizer)} renders the beginning of this conversation in another way than the whole, "
            "so its replies cannot be told apart; use conversations of one reply, or a template with generation markers"
        )


# -- examples ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A training example.

    tokens: of the text.
    mask: loss mask, one item per token: True where it enters the loss.
    temperature, seed: of the sampling, where this target wrote the text in this package (`g(seed, index, token)` is then the noise
    of the token at `index`); else None.
    """

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]
    temperature: float | None = None
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class ReadReport:
    """Counts of what was read.

    num_read: lines of JSONL, and plain texts.
    num_cut: conversations cut at the maximum length.
    num_pieces: examples that are a piece of a longer plain text.
    num_foreign: distilled lines whose target is another one or unknown.
    dropped: reasons for leaving out a line or a text, with their counts.
    """

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
    """The training examples of these files, in order, and a report of what was read.

    paths: a .jsonl file (or .jsonl.gz, .jsonl.xz) holds distilled lines (`tokens`, `loss_mask`), chats (`messages`: the loss mask
    is on the assistant's tokens) or texts (`text`: it is on all); any other file is one text.
    digest: hash of the target to be accelerated; None: unknown.
    max_length: tokens at which conversations are cut and texts are split into pieces; None: neither.
    any_target: whether lines distilled from another target are accepted.
    vocab: vocabulary size of the target; None: the tokenizer's.
    Raises ValueError, naming file and line, for content that cannot be read, and where nothing is left.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}; an example needs at least 2 tokens")
    reader = _Reader(tokenizer, digest, max_length, any_target, vocab or vocabulary_size(tokenizer))
    examples = [example for path in paths for example in reader.read(Path(path))]
    if not examples:
        raise ValueError(f"there is nothing to learn in {', '.join(map(str, paths))}: {reader.report}")
    return examples, reader.report


class _Reader:
    """Turns records into examples and counts them in `report`. Fields: as of `read_examples`."""

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
            sizes = [len(values) if isinstance(values, list) else None for values in (tokens, mask)]
            raise ValueError(f"tokens and loss_mask must be two lists of one length; they have {sizes[0]} and {sizes[1]} items")
        wrong = next((token for token in tokens if not isinstance(token, int) or not 0 <= token < self.vocab), None)
        if wrong is not None:
            raise ValueError(f"token {wrong!r} is not in the vocabulary of {self.vocab}")
        target, settings = (_object(fields, name) for name in ("target", "settings"))
        is_of_target = self._is_of_target(target)
        self.report.num_foreign += not is_of_target
        temperature, seed = settings.get("temperature"), settings.get("seed")
        if not isinstance(temperature, int | float | None) or not isinstance(seed, int | None):
            raise ValueError(f"it was answered at temperature {temperature!r} with seed {seed!r}; these must be numbers, or null")
        return self._cut(tokens, mask, temperature, seed if is_of_target else None)

    def _is_of_target(self, target: dict[str, Any]) -> bool:
        """Whether the answer is known to be this target's. Raises ValueError for another target's, unless any is allowed."""
        digest = target.get("digest")
        if digest is not None and self.digest is not None and digest != self.digest and not self.any_target:
            raise ValueError(
                f"this answer is of {target.get('name', 'a target')} (digest {digest}), and the target here is {self.digest}; "
                "heads learn best from their own target's answers: distill again, or allow others with any_target=True "
                "(--any-target)"
            )
        return digest is not None and digest == (self.digest or digest)

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
        examples = [piece for piece in pieces if len(piece) > 1]
        if not examples:
            return self._drop("a text of less than 2 tokens")
        self.report.num_pieces += len(examples) if len(pieces) > 1 else 0
        return (_example(piece, [1] * len(piece), None, None) for piece in examples)

    def _drop(self, reason: str) -> Iterator[Example]:
        self.report.dropped[reason] += 1
        return iter(())


def _object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if not isinstance(value, dict | None):
        raise ValueError(f"its {name} is a {type(value).__name__}; it must be an object, as `headstart distill` writes it")
    return value or {}


def _example(tokens: list[int], mask: list[int], temperature: float | None, seed: int | None) -> Example:
    return Example(tuple(tokens), tuple(map(bool, mask)), temperature, seed)
