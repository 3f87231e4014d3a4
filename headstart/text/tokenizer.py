"""A tokenizer's part of generation: prompts to token ids, token ids to text, its vocabulary and its stop tokens.

Tokens are plain integers; must not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from headstart.text.chat_template import check_characters, checked_messages, name_of, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int]

_FIXED = {"add_generation_prompt": True, "return_dict": False}  # settings of `apply_chat_template` that make a prompt


# -- prompts to tokens ------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The token ids of a prompt: a string, messages for the chat template, or token ids, which stay as they are.

    Raises ValueError for a prompt that is empty, of another type, or with a token id outside the vocabulary.
    """
    if isinstance(prompt, str):
        check_characters(prompt, "the prompt")
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
    """The token ids of a conversation that the model is to continue.

    messages: a string is one message of the user.
    variables: what the chat template may read besides the messages.
    Raises ValueError for a variable that the template does not read, and for a tokenizer without a template.
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


def _not_empty(items: Sequence[Any], message: str) -> list[Any]:
    if not len(items):
        raise ValueError(message)
    return list(items)


def _within_vocabulary(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    size = vocabulary_size(tokenizer)
    outside = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
    if outside is not None:
        raise ValueError(f"token id {outside} is not in the vocabulary of {name_of(tokenizer)}: ids are 0 to {size - 1}")
    return list(token_ids)


# -- tokens to text, and the vocabulary -------------------------------------------------------------------------------------


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of `token_ids` without special tokens; the pieces of a `Detokenizer` joined equal it."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return cast("str", text)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that `decode` leaves out."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added.items() if token.special}


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id, added tokens included. Slow: it counts them."""
    return max([len(tokenizer), *(token_id + 1 for token_id in tokenizer.added_tokens_decoder)])


def stop_token_ids(tokenizer: object, generation_config: object = None, config: object = None) -> tuple[int, ...]:
    """The tokens that end an answer: those of the generation config (or else the config), and the tokenizer's own.

    The union, because chat models often end a turn with a token that only the tokenizer names, while base models that became chat
    models keep an old end-of-text token in their config.
    Raises ValueError for an `eos_token_id` that is neither a token id nor a list of token ids.
    """
    of_model = _eos(generation_config) or _eos(config)
    return tuple(dict.fromkeys(of_model + _eos(tokenizer)))


def _eos(holder: object) -> tuple[int, ...]:
    eos: Any = getattr(holder, "eos_token_id", None)
    if eos is None:
        return ()
    token_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if wrong := [token_id for token_id in token_ids if not isinstance(token_id, int) or isinstance(token_id, bool)]:
        raise ValueError(f"eos_token_id of the model is {wrong[0]!r}; it must be a token id, or a list of some")
    return token_ids
