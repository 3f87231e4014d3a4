"""Answers of an OpenAI-compatible endpoint: a target that another engine serves, as a teacher for `distill`.

This file knows the chat completions API. It refuses to know whether the model behind it is the one it is taken for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from headstart.distill.distill import Conversation, Settings
from headstart.text.conversations import encode_conversation
from headstart.text.prompts import ChatPrompt

if TYPE_CHECKING:
    from openai import OpenAI
    from transformers import PreTrainedTokenizerBase


class EndpointTeacher:
    """A served model. Its answers come as text and become tokens by `tokenizer`; their noise is not ours, so no seed explains it.

    url: with its /v1. rows: requests at once. Raises ValueError without the package `openai`.
    """

    is_seeded = False

    def __init__(self, url: str, model: str, tokenizer: PreTrainedTokenizerBase, api_key: str | None = None, rows: int = 8) -> None:
        if rows < 1:
            raise ValueError(f"rows is {rows}; it must be at least 1")
        if tokenizer.chat_template is None:
            raise ValueError("an endpoint speaks in messages, and this tokenizer has no chat template to turn them into tokens")
        self.url = url
        self.model = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.client = _client(url, api_key)
        self.info = {"name": model, "digest": None, "endpoint": url}

    def converse(self, prompts: Iterable[ChatPrompt], settings: Settings) -> Iterator[Conversation]:
        """Each prompt's conversation, as they end; `rows` run at once. Leaving early sends no further request."""
        waiting, results = iter(prompts), Queue[Conversation | Exception]()
        num_running, is_left = 0, Event()
        try:
            while True:
                while num_running < self.rows and (prompt := next(waiting, None)) is not None:
                    work = (prompt, settings, results, is_left)
                    Thread(target=self._work, args=work, daemon=True).start()  # a daemon: no slow server holds up an interruption
                    num_running += 1
                if not num_running:
                    return
                result = results.get()
                num_running -= 1
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            is_left.set()

    def _work(self, prompt: ChatPrompt, settings: Settings, results: Queue[Conversation | Exception], is_left: Event) -> None:
        try:
            results.put(self._talk(prompt, settings, is_left))
        except Exception as error:  # it is raised where the results are read
            results.put(error)

    def _talk(self, prompt: ChatPrompt, settings: Settings, is_left: Event) -> Conversation:
        told = Conversation(prompt)
        if prompt.text is not None:
            told.error = "a text to be continued cannot be sent to a chat endpoint"
            return told
        for cue in settings.unanswered_turns_of(prompt):
            content, told.finish_reason = self._reply([*told.messages, *cue], settings, settings.seed_of(prompt))
            told.messages += [*cue, {"role": "assistant", "content": content}]
            if told.finish_reason != "stop" or is_left.is_set():
                break
        try:
            told.tokens, told.mask = encode_conversation(self.tokenizer, told.messages)
        except ValueError as error:  # this conversation does not fit the template; others may
            told.error = str(error)
            return told
        end = len(told.mask) - told.mask[::-1].index(1) if any(told.mask) else 0
        end -= told.finish_reason == "length"  # the end of the turn was not the model's
        del told.tokens[end:], told.mask[end:]
        return told

    def _reply(self, messages: list[dict[str, Any]], settings: Settings, seed: int) -> tuple[str, str]:
        from openai import OpenAIError

        optional: dict[str, Any] = {} if settings.top_p is None else {"top_p": settings.top_p}
        if settings.top_k is not None:
            optional["extra_body"] = {"top_k": settings.top_k}  # no field of OpenAI's, but of most engines'
        sent: list[Any] = messages
        try:
            answer = self.client.chat.completions.create(
                model=self.model,
                messages=sent,
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                seed=seed % 2**31,  # what every server takes
                **optional,
            )
        except OpenAIError as error:
            raise ValueError(f"the endpoint {self.url} does not answer: {error}") from error
        if not answer.choices:
            raise ValueError(f"the endpoint {self.url} gave no choice; is it a chat completions endpoint?")
        return answer.choices[0].message.content or "", str(answer.choices[0].finish_reason)


def _client(url: str, api_key: str | None) -> OpenAI:
    try:
        from openai import OpenAI
    except ImportError:
        raise ValueError("an endpoint needs the package openai; install it with: pip install 'headstart[train]'") from None
    return OpenAI(base_url=url, api_key=api_key or "none")
