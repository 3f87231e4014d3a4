"""Answers in OpenAI's form: the objects of whole answers and of the events of a stream. Must not import FastAPI."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol
from uuid import uuid4

from headstart.engine.drawn_tree import DrawnTree
from headstart.engine.stats import Part
from headstart.serve.jobs import Logprob, Update
from headstart.serve.token_texts import TokenTexts

Object = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What all objects of one response have: kind of request, id, time, model."""

    kind: str
    model: str
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, name: str) -> Object:
        """The beginning of an object. name: its type."""
        return {"id": f"{self.kind}-{self.id}", "object": name, "created": self.created, "model": self.model}


@dataclass
class Collected:
    """One answer so far.

    echo: the text before it.
    offset: characters of the texts of its tokens so far, and of the echo.
    """

    echo: str = ""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    guessed: list[bool] = field(default_factory=list)
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    rounds: Sequence[Part] = ()
    num_cached: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        self.offset = len(self.echo)

    def add(self, update: Update) -> None:
        """Add an update."""
        self.text += update.text
        self.tokens += update.tokens
        self.guessed += update.guessed
        self.logprobs += update.logprobs or ()
        self.num_cached = update.num_cached
        if update.finish_reason is not None:
            self.finish_reason, self.rounds = update.finish_reason, update.rounds


class Form(Protocol):
    """How one kind of request is answered."""

    def whole(self, answers: Sequence[Collected]) -> Object:
        """The object of a whole answer, without its usage."""
        ...

    def first(self, index: int, echo: str) -> Object | None:
        """The choice of an answer's first event; None: there is none."""
        ...

    def piece(self, update: Update, so_far: Collected) -> Object:
        """The choice of an event. so_far: the answer with the update."""
        ...

    def event(self, choices: list[Object]) -> Object:
        """The object of an event."""
        ...


@dataclass(frozen=True)
class Options:
    """What a client asked for.

    has_logprobs: whether choices have log-probabilities.
    has_ids: whether choices have token ids, and which of them were drafted.
    """

    has_logprobs: bool = False
    has_ids: bool = False


class ChatForm:
    """How chats are answered."""

    def __init__(self, head: Head, texts: TokenTexts, options: Options) -> None:
        self._head, self._texts, self._options = head, texts, options

    def whole(self, answers: Sequence[Collected]) -> Object:
        choices = [
            {"index": index, "message": {"role": "assistant", "content": answer.text, "refusal": None}}
            | {"logprobs": self._logprobs(answer.tokens, answer.logprobs), "finish_reason": answer.finish_reason}
            | _ids(self._options, answer.tokens, answer.guessed)
            for index, answer in enumerate(answers)
        ]
        return self._head.of("chat.completion") | {"choices": choices}

    def first(self, index: int, echo: str) -> Object | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, update: Update, so_far: Collected) -> Object:
        delta = {"content": update.text} if update.text or not update.finish_reason else {}
        choice = {"index": update.job.index, "delta": delta, "logprobs": self._logprobs(update.tokens, update.logprobs or ())}
        return choice | {"finish_reason": update.finish_reason} | _ids(self._options, update.tokens, update.guessed)

    def event(self, choices: list[Object]) -> Object:
        return self._head.of("chat.completion.chunk") | {"choices": choices}

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[Logprob]) -> Object | None:
        if not self._options.has_logprobs:
            return None
        lines = [
            self._line(token, chosen) | {"top_logprobs": [self._line(other, value) for other, value in best.items()]}
            for token, (chosen, best) in zip(tokens, logprobs, strict=True)
        ]
        return {"content": lines, "refusal": None}

    def _line(self, token: int, logprob: float) -> Object:
        return {"token": self._texts.text(token), "logprob": finite(logprob), "bytes": list(self._texts.bytes(token))}


class CompletionForm:
    """How completions are answered."""

    def __init__(self, head: Head, texts: TokenTexts, options: Options) -> None:
        self._head, self._texts, self._options = head, texts, options

    def whole(self, answers: Sequence[Collected]) -> Object:
        choices = [
            {"index": index, "text": answer.echo + answer.text}
            | {"logprobs": self._logprobs(answer.tokens, answer.logprobs, len(answer.echo)), "finish_reason": answer.finish_reason}
            | _ids(self._options, answer.tokens, answer.guessed)
            for index, answer in enumerate(answers)
        ]
        return self._head.of("text_completion") | {"choices": choices}

    def first(self, index: int, echo: str) -> Object | None:
        return {"index": index, "text": echo, "logprobs": None, "finish_reason": None} if echo else None

    def piece(self, update: Update, so_far: Collected) -> Object:
        logprobs = self._logprobs(update.tokens, update.logprobs or (), so_far.offset)
        if self._options.has_logprobs:
            so_far.offset += sum(len(self._texts.text(token)) for token in update.tokens)
        choice = {"index": update.job.index, "text": update.text, "logprobs": logprobs, "finish_reason": update.finish_reason}
        return choice | _ids(self._options, update.tokens, update.guessed)

    def event(self, choices: list[Object]) -> Object:
        return self._head.of("text_completion") | {"choices": choices}

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[Logprob], offset: int) -> Object | None:
        if not self._options.has_logprobs:
            return None
        names = [self._texts.text(token) for token in tokens]
        starts = list(accumulate((len(name) for name in names), initial=offset))[:-1]
        best = [{self._texts.text(token): finite(value) for token, value in table.items()} for _, table in logprobs]
        return {
            "tokens": names,
            "token_logprobs": [finite(own) for own, _ in logprobs],
            "top_logprobs": best,
            "text_offset": starts,
        }


def _ids(options: Options, tokens: Sequence[int], guessed: Sequence[bool]) -> Object:
    return {"token_ids": list(tokens), "drafted": list(guessed)} if options.has_ids else {}


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, -9999.0)


def usage(num_prompt: int, answers: Sequence[Collected]) -> Object:
    """The number of tokens of a request."""
    num_answer = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": sum(answer.num_cached for answer in answers)},
    }


def speculation(answers: Sequence[Collected]) -> Object:
    """A request's figures of speculation, as vLLM gives them; `num_spec_tokens` is the depth of the deepest draft."""
    steps = [part for answer in answers for part in answer.rounds if part.drafts and part.tokens]
    accepted, drafts = sum(part.held for part in steps), sum(part.drafts for part in steps)
    deepest = max((part.tried for part in steps), default=0)
    counts = Counter(part.held for part in steps)
    return {
        "mean_acceptance_length": 1 + accepted / len(steps) if steps else 1.0,
        "draft_acceptance_rate": accepted / drafts if drafts else 0.0,
        "acceptance_histogram": [counts[held] for held in range(deepest + 1)],
        "num_spec_steps": len(steps),
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafts,
        "num_spec_tokens": deepest,
    }


def drawn(tree: DrawnTree, update: Update, texts: TokenTexts) -> Object:
    """A round's tree for a page that draws it. One entry per draft, parents first; parent -1 is the root.

    `emitted` are the tokens that the round gave, and `drafted` whether each of them had been guessed.
    """
    return {
        "emitted": [texts.visible(token) for token in update.tokens],
        "drafted": list(update.guessed),
        "root": texts.text(tree.root),
        "tokens": [texts.text(token) for token in tree.tokens],
        "token_ids": list(tree.tokens),
        "parents": list(tree.parents),
        "chances": [round(chance, 4) for chance in tree.chances],
        "kept": list(tree.kept),
        "sources": list(tree.sources),
    }
