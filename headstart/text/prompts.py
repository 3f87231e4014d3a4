"""Prompts from published files: chat messages, single prompts, and texts to continue. Must not know tokens or models."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from headstart.text.chat_template import checked_messages
from headstart.text.jsonl import PROMPTS, applied_to, first_text, read_fields

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt from a file: messages, in which every reply is to be generated anew, or a text to be continued.

    id: file name and line number, as "prompts.jsonl:3".
    index: line number from 0.
    messages: of the conversation, replies included; empty for a text.
    text: to be continued; None for a conversation.
    """

    id: str
    index: int
    messages: tuple[Message, ...] = ()
    text: str | None = None

    def unanswered_turns(self) -> list[list[Message]]:
        """The messages before each reply that is to be generated, without earlier ones."""
        turns: list[list[Message]] = [[]]
        for message in self.messages:
            if message["role"] != "assistant":
                turns[-1].append(message)
            elif turns[-1]:
                turns.append([])
        return turns if turns[-1] else turns[:-1]


def read_prompts(path: str | Path, limit: int | None = None, *, is_chat: bool = True) -> list[ChatPrompt]:
    """The prompts of a file, compressed or not.

    path: a JSONL file with one of the fields `messages`, `turns`, `prompt`, `instruction`, `question`, or `text` to be continued;
    or a text file with one prompt in each line.
    limit: number of prompts to read; None: all.
    is_chat: whether the target has a chat template; without one, a single prompt is continued as a text.
    Raises ValueError, naming the line, for a line without a prompt, and for a file without prompts.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 prompt")
    prompts = [_prompt(path, number, fields, is_chat) for number, fields in islice(read_fields(path, "prompts"), limit)]
    if not prompts:
        raise ValueError(f'{path} holds no prompt; write one JSON object per line, such as {{"prompt": "Hello"}}')
    return prompts


def _prompt(path: Path, number: int, fields: dict[str, Any], is_chat: bool) -> ChatPrompt:
    id, index = f"{path.name}:{number}", number - 1
    try:
        messages = tuple(_messages(fields))
    except ValueError as error:
        raise ValueError(f"line {number} of {path}: {error}") from None
    if not messages and isinstance(text := fields.get("text"), str) and text.strip():
        return ChatPrompt(id, index, text=text)
    if not any(message["role"] != "assistant" for message in messages):
        raise ValueError(f"line {number} of {path} has no prompt; give one of the fields messages, {', '.join(PROMPTS)}, text")
    if is_chat:
        return ChatPrompt(id, index, messages)
    if len(messages) > 1 or "messages" in fields:
        raise ValueError(f"line {number} of {path} is a conversation, and this target has no chat template; give prompts or texts")
    return ChatPrompt(id, index, text=messages[0]["content"])


def _messages(fields: dict[str, Any]) -> list[Message]:
    if isinstance(messages := fields.get("messages"), list):
        return [{"role": message["role"], "content": message["content"]} for message in checked_messages(messages)]
    turns = fields.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return [{"role": "user", "content": turn} for turn in turns]
    prompt = first_text(fields, PROMPTS)
    return [{"role": "user", "content": prompt + applied_to(fields)}] if prompt else []
