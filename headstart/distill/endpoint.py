"""Distillation from an OpenAI-compatible endpoint: a target that another engine serves, as a teacher for `distill`.

Whether the served model is the expected one is not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Event
from typing import TYPE_CHECKING, Any

from headstart.distill.connection import at_once, connect, is_too_long, sentence
from headstart.distill.teacher import Conversation, Settings
from headstart.text.conversations import encode_conversation
from headstart.text.prompts import ChatPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING = ("reasoning", "reasoning_content")  # where servers put what a reasoning parser has cut out of the content


class EndpointTeacher:
    """A served model. Its answers are text, which `tokenizer` encodes; the server's noise is unknown, so lines have no seed.

    url: of the endpoint, with its /v1.
    model: its name there.
    tokenizer: of the model; it needs a chat template.
    api_key: None: the endpoint needs none.
    rows: requests at once.

    Raises ValueError for `rows` below 1, a tokenizer without chat template, and without the package `openai`.
    """

    is_seeded = False

    def __init__(self, url: str, model: str, tokenizer: PreTrainedTokenizerBase, api_key: str | None = None, rows: int = 8) -> None:
        if rows < 1:
            raise ValueError(f"rows is {rows}; it must be at least 1")
        if tokenizer.chat_template is None:
            raise ValueError(
                "an endpoint takes messages, and this tokenizer has no chat template to encode them; name another tokenizer"
            )
        self.url = url
        self.model = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.client = connect(url, api_key)
        self.info = {"name": model, "digest": None, "endpoint": url}

    def converse(self, prompts: Iterable[ChatPrompt], settings: Settings) -> Iterator[Conversation]:
        """The conversation of each prompt, in the order in which they end; `rows` run at once.

        Closing the iterator sends no further request.
        """
        is_closed = Event()
        try:
            yield from at_once(lambda prompt: self._converse_once(prompt, settings, is_closed), prompts, self.rows)
        finally:
            is_closed.set()

    def _converse_once(self, prompt: ChatPrompt, settings: Settings, is_closed: Event) -> Conversation:
        conversation = Conversation(prompt)
        if prompt.text is not None:
            conversation.error = "a text to be continued cannot be sent to a chat endpoint"
            return conversation
        for turn in settings.unanswered_turns_of(prompt):
            reply = self._reply([*conversation.messages, *turn], settings, settings.seed_of(prompt))
            if reply is None:
                conversation.error = f"with max_tokens={settings.max_tokens} it exceeds the endpoint's context"
                break
            content, conversation.finish_reason = reply
            conversation.messages += [*turn, {"role": "assistant", "content": content}]
            if conversation.finish_reason != "stop" or is_closed.is_set():
                break
        if not conversation.messages:
            return conversation
        try:
            conversation.tokens, conversation.mask = encode_conversation(self.tokenizer, conversation.messages)
        except ValueError as error:  # the chat template refuses this conversation; others may fit
            conversation.error = str(error)
            return conversation
        end = len(conversation.mask) - conversation.mask[::-1].index(1) if any(conversation.mask) else 0
        end -= conversation.finish_reason == "length"  # the model did not produce the end of the turn
        del conversation.tokens[end:], conversation.mask[end:]
        return conversation

    def _reply(self, messages: list[dict[str, Any]], settings: Settings, seed: int) -> tuple[str, str] | None:
        """The text and why it ended; None where prompt and answer exceed the server's context."""
        from openai import OpenAIError

        optional: dict[str, Any] = {} if settings.top_p is None else {"top_p": settings.top_p}
        if settings.top_k is not None:
            optional["extra_body"] = {"top_k": settings.top_k}  # not in OpenAI's API, but in that of most engines
        request_messages: list[Any] = messages
        try:
            answer = self.client.chat.completions.create(
                model=self.model,
                messages=request_messages,
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                seed=seed % 2**31,  # a range that every server accepts
                **optional,
            )
        except OpenAIError as error:
            if is_too_long(error):
                return None
            raise ValueError(sentence(error, self.url)) from error
        if not answer.choices:
            raise ValueError(f"the endpoint {self.url} gave no choice; is it a chat completions endpoint?")
        message = answer.choices[0].message
        if any((message.model_extra or {}).get(name) for name in REASONING):
            raise ValueError(
                f"the endpoint {self.url} splits answers into reasoning and content, so the tokens of the answer are not known; "
                "start its server without a reasoning parser"
            )
        return message.content or "", str(answer.choices[0].finish_reason)
