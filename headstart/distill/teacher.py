"""Teachers: what answers prompts for distillation, and how the answers are sampled.

The module must not read or write the file of answers, and must not import training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from headstart.engine.llm import LLM
from headstart.engine.scheduler import Request
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams
from headstart.speculation.rules import RULES
from headstart.target.loading import digest
from headstart.text.conversations import follow_up
from headstart.text.prompts import ChatPrompt, Message
from headstart.text.tokenizer import decode, encode_prompt


@dataclass(frozen=True)
class Settings:
    """How answers are sampled.

    temperature: of the softmax; 0 is greedy.
    top_p, top_k: None: not restricted.
    max_tokens: of one reply.
    seed: of the run; each conversation has its own, mixed from it.
    mode: "continue" samples the first reply of a conversation, "chat" all of them.
    beginning: number of tokens of a text that are the prompt; None: all.
    drop_cut: whether conversations that end at `max_tokens` are dropped.

    Raises ValueError for what is out of range.
    """

    temperature: float = 0.7
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int = 512
    seed: int = 0
    mode: Literal["continue", "chat"] = "continue"
    beginning: int | None = None
    drop_cut: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("continue", "chat"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'continue' or 'chat'")
        if self.beginning is not None and self.beginning < 1:
            raise ValueError(f"beginning is {self.beginning}; it must be at least 1 token, or None for the whole text")
        self.params(self.max_tokens)

    def params(self, max_tokens: int) -> SamplingParams:
        """The sampling parameters of one reply. Raises ValueError for what is out of range."""
        return SamplingParams(
            max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed
        )

    def seed_of(self, prompt: ChatPrompt) -> int:
        """The seed of a conversation."""
        return mix(self.seed, prompt.index)

    def unanswered_turns_of(self, prompt: ChatPrompt) -> list[list[Message]]:
        """The messages before each reply that is to be sampled."""
        return prompt.unanswered_turns()[: 1 if self.mode == "continue" else None]


@dataclass
class Conversation:
    """A prompt and the answers to it so far.

    messages: of the chat; empty for a text.
    tokens: prompt and answers.
    mask: loss mask, 1 for tokens of the answers.
    finish_reason: of the last answer.
    error: why there is no answer, or no further one; None: no error.
    """

    prompt: ChatPrompt
    messages: list[Message] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finish_reason: str = "stop"
    error: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no answer."""
        return not any(self.mask)

    @property
    def num_answered(self) -> int:
        """Number of tokens of the answers."""
        return sum(self.mask)


class Teacher(Protocol):
    """A model that answers prompts."""

    @property
    def info(self) -> dict[str, Any]:
        """`name`, `digest` and other keys that identify the model."""
        ...

    @property
    def is_seeded(self) -> bool:
        """Whether answers are sampled with the noise `g(seed, index, token)`."""
        ...

    def converse(self, prompts: Iterable[ChatPrompt], settings: Settings) -> Iterator[Conversation]:
        """The conversation of each prompt, in the order in which they end; a bounded number runs at once."""
        ...


class EngineTeacher:
    """The target in this process, with any drafter.

    Raises ValueError for an acceptance rule under which answers depend on the drafts.
    """

    is_seeded = True

    def __init__(self, llm: LLM) -> None:
        if llm.engine.rule is not RULES["coupled"]:
            raise ValueError("answers are distilled by the rule 'coupled' only: under other rules they depend on what was drafted")
        self.llm = llm
        self.info = {"name": llm.engine.target.name, "digest": digest(llm.engine.target.model)}

    def converse(self, prompts: Iterable[ChatPrompt], settings: Settings) -> Iterator[Conversation]:
        """The conversation of each prompt, in the order in which they end; as many wait in the engine as run."""
        engine, dialogues = self.llm.engine, (_Dialogue(self.llm, prompt, settings) for prompt in prompts)
        running: dict[int, _Dialogue] = {}
        try:
            while True:
                while len(running) < 2 * engine.seating.num_seats and (dialogue := next(dialogues, None)) is not None:
                    if dialogue.ask():
                        running[dialogue.request.id] = dialogue
                    else:
                        yield dialogue.conversation
                if not running:
                    return
                engine.step()
                for dialogue in [one for one in running.values() if one.request.finish_reason is not None]:
                    del running[dialogue.request.id]
                    if dialogue.take_answer() and dialogue.ask():
                        running[dialogue.request.id] = dialogue
                    else:
                        yield dialogue.conversation
        finally:
            for dialogue in running.values():
                engine.abort(dialogue.request)


class _Dialogue:
    """A conversation with the engine; its tokens are those of the prompts and of the answers, as sampled."""

    request: Request

    def __init__(self, llm: LLM, prompt: ChatPrompt, settings: Settings) -> None:
        self.llm = llm
        self.settings = settings
        self.conversation = Conversation(prompt)
        self.unanswered_turns = settings.unanswered_turns_of(prompt)

    def ask(self) -> bool:
        """Give the next prompt to the engine; False if that is impossible: `conversation.error` says why."""
        conversation, turn = self.conversation, self.unanswered_turns.pop(0) if self.unanswered_turns else []
        try:
            new = self._prompt([*conversation.messages, *turn])
            room = self.llm.engine.target.context - len(conversation.tokens) - len(new)
            if room < 1:
                raise ValueError(f"there is no room for an answer in the context of {self.llm.engine.target.context} tokens")
        except ValueError as error:  # the other prompts can still be answered
            conversation.error = str(error)
            return False
        conversation.messages += turn
        conversation.tokens += new
        conversation.mask += [0] * len(new)
        params, seed = self.settings.params(min(room, self.settings.max_tokens)), self.settings.seed_of(conversation.prompt)
        self.request = self.llm.engine.add(conversation.tokens, params, seed=seed, stop_ids=self.llm.stop_ids)
        return True

    def _prompt(self, messages: list[Message]) -> list[int]:
        """The tokens between those so far and the next answer."""
        tokenizer, text = self.llm.tokenizer, self.conversation.prompt.text
        if text is not None:
            return encode_prompt(tokenizer, text)[: self.settings.beginning]
        return follow_up(tokenizer, messages) if self.conversation.tokens else encode_prompt(tokenizer, messages)

    def take_answer(self) -> bool:
        """Append the answer to the conversation; whether the conversation continues."""
        conversation, output = self.conversation, self.request.output
        conversation.tokens += output
        conversation.mask += [1] * len(output)
        conversation.finish_reason = self.request.finish_reason or "abort"
        if conversation.prompt.text is None:
            conversation.messages.append({"role": "assistant", "content": decode(self.llm.tokenizer, output)})
        return bool(self.unanswered_turns) and conversation.finish_reason == "stop"
