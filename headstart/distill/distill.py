"""The target's own answers as training data: heads learn best from what their target says.

A conversation's seed is a function of the run's seed and of the prompt's place in its file, so an answer depends neither on
batching nor on an interruption: a killed run goes on where it stopped and ends with the lines it would have had. This file knows
prompts, turns and the file of answers. It refuses to know what is learned from them.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from headstart.engine.llm import LLM
from headstart.engine.scheduler import Request
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams
from headstart.speculation.rules import RULES
from headstart.target.loading import digest
from headstart.text.conversations import follow_up
from headstart.text.jsonl import parsed
from headstart.text.prompts import ChatPrompt, Message
from headstart.text.tokenizer import decode, encode_prompt

BEGIN = b'{"id": "'  # of every line that is written here


# -- how --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How answers are sampled. max_tokens: of one reply. seed: of the run; each conversation has its own, mixed from it.

    mode: "continue" gives the first reply, "chat" all of them. beginning: of a text to be continued, only so many tokens are the
    prompt; None for all. drop_cut: a conversation that ends for length is not kept.
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
        """Checked: raises ValueError for what is out of range."""
        return SamplingParams(
            max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed
        )

    def seed_of(self, prompt: ChatPrompt) -> int:
        return mix(self.seed, prompt.index)

    def unanswered_turns_of(self, prompt: ChatPrompt) -> list[list[Message]]:
        return prompt.unanswered_turns()[: 1 if self.mode == "continue" else None]


# -- who answers ------------------------------------------------------------------------------------------------------------


@dataclass
class Conversation:
    """An prompt and what has become of it. mask is 1 where a token is the target's. trouble: why there is no answer, or no
    further one, or None."""

    prompt: ChatPrompt
    messages: list[Message] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finish_reason: str = "stop"
    error: str | None = None

    @property
    def is_empty(self) -> bool:
        return not any(self.mask)

    @property
    def num_answered(self) -> int:
        return sum(self.mask)


class Teacher(Protocol):
    """What answers. facts: `name`, `digest` and whatever tells it from others. is_seeded: whether `g(seed, index, token)` is the
    noise of an answer."""

    @property
    def info(self) -> dict[str, Any]: ...
    @property
    def is_seeded(self) -> bool: ...
    def converse(self, prompts: Iterable[ChatPrompt], settings: Settings) -> Iterator[Conversation]:
        """Each prompt's conversation, as they end; a bounded number runs at once."""
        ...


class EngineTeacher:
    """The target in this process, with any drafter. Raises ValueError where the engine does not answer as plain decoding does."""

    is_seeded = True

    def __init__(self, llm: LLM) -> None:
        if llm.engine.rule is not RULES["coupled"]:
            raise ValueError("answers are distilled by the rule 'coupled' only: under others they depend on what was guessed")
        self.llm = llm
        self.info = {"name": llm.engine.target.name, "digest": digest(llm.engine.target.model)}

    def converse(self, prompts: Iterable[ChatPrompt], settings: Settings) -> Iterator[Conversation]:
        """Each prompt's conversation, as they end; as many wait in the engine as run."""
        engine, talks = self.llm.engine, (_Dialogue(self.llm, prompt, settings) for prompt in prompts)
        running: dict[int, _Dialogue] = {}
        try:
            while True:
                while len(running) < 2 * engine.seating.num_seats and (talk := next(talks, None)) is not None:
                    if talk.ask():
                        running[talk.request.id] = talk
                    else:
                        yield talk.told
                if not running:
                    return
                engine.step()
                for talk in [talk for talk in running.values() if talk.request.finish_reason is not None]:
                    del running[talk.request.id]
                    if talk.take_answer() and talk.ask():
                        running[talk.request.id] = talk
                    else:
                        yield talk.told
        finally:
            for talk in running.values():
                engine.abort(talk.request)


class _Dialogue:
    """One conversation on its way: its tokens grow by what is said to the target, and by what the target answers, as sampled."""

    request: Request

    def __init__(self, llm: LLM, prompt: ChatPrompt, settings: Settings) -> None:
        self.llm = llm
        self.settings = settings
        self.told = Conversation(prompt)
        self.unanswered_turns = settings.unanswered_turns_of(prompt)

    def ask(self) -> bool:
        """Hand the next prompt to the engine; False if that cannot be: `told` says why."""
        told, cue = self.told, self.unanswered_turns.pop(0) if self.unanswered_turns else []
        try:
            new = self._prompt([*told.messages, *cue])
            room = self.llm.engine.target.context - len(told.tokens) - len(new)
            if room < 1:
                raise ValueError(f"there is no room for an answer in the context of {self.llm.engine.target.context} tokens")
        except ValueError as error:  # this prompt cannot be; others can
            told.error = str(error)
            return False
        told.messages += cue
        told.tokens += new
        told.mask += [0] * len(new)
        params, seed = self.settings.params(min(room, self.settings.max_tokens)), self.settings.seed_of(told.prompt)
        self.request = self.llm.engine.add(told.tokens, params, seed=seed, stop_ids=self.llm.stop_ids)
        return True

    def _prompt(self, messages: list[Message]) -> list[int]:
        """The tokens between what is there and the next answer."""
        tokenizer, text = self.llm.tokenizer, self.told.prompt.text
        if text is not None:
            return encode_prompt(tokenizer, text)[: self.settings.beginning]
        return follow_up(tokenizer, messages) if self.told.tokens else encode_prompt(tokenizer, messages)

    def take_answer(self) -> bool:
        """Take the answer down; whether the conversation goes on."""
        told, output = self.told, self.request.output
        told.tokens += output
        told.mask += [1] * len(output)
        told.finish_reason = self.request.finish_reason or "abort"
        if told.prompt.text is None:
            told.messages.append({"role": "assistant", "content": decode(self.llm.tokenizer, output)})
        return bool(self.unanswered_turns) and told.finish_reason == "stop"


# -- the file ---------------------------------------------------------------------------------------------------------------


@dataclass
class DistillProgress:
    """How far a run has come. num_found: conversations that were in the file already; num_answered: new ones in the file;
    num_tokens: the target's, in these; num_cut: of these, how many end for length; num_dropped: how many were not kept for
    that; skipped, shortened: how many could not be answered, or not to their end, for which reason."""

    num_prompts: int
    num_found: int = 0
    num_answered: int = 0
    num_tokens: int = 0
    num_cut: int = 0
    num_dropped: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)

    @property
    def num_done(self) -> int:
        return self.num_found + self.num_answered + self.num_dropped + self.skipped.total()

    def count(self, told: Conversation, is_dropped: bool) -> None:
        if told.error is not None:
            (self.skipped if told.is_empty else self.shortened)[told.error] += 1
        if told.is_empty:
            return
        self.num_tokens += told.num_answered
        self.num_dropped += is_dropped
        self.num_answered += not is_dropped
        self.num_cut += not is_dropped and told.finish_reason == "length"


def distill(
    teacher: Teacher,
    prompts: Sequence[ChatPrompt],
    settings: Settings,
    path: str | Path,
    on_progress: Callable[[DistillProgress], None] = lambda so_far: None,
) -> DistillProgress:
    """Write the teacher's answers to a JSONL file, a line for each conversation as it ends, and go on with a file that is there.

    on_progress: called at the start and after each conversation. Raises ValueError if the file holds answers of another target or
    with
    other settings. However the process ends, what is in the file by then stays.
    """
    path = Path(path)
    if path.suffix in (".gz", ".xz"):
        raise ValueError(f"{path} cannot be continued after an interruption if it is packed; write plain .jsonl and pack it later")
    found = _resume(path, {prompt.id: prompt for prompt in prompts}, settings, teacher)
    so_far = DistillProgress(len(prompts), num_found=sum(prompt.id in found for prompt in prompts))
    on_progress(so_far)
    left = (prompt for prompt in prompts if prompt.id not in found)
    with _opened(path) as file:
        for told in teacher.converse(left, settings):
            is_dropped = settings.drop_cut and told.finish_reason == "length"
            if not told.is_empty:
                _append(file, path, json.dumps(_line(told, settings, teacher, is_dropped), ensure_ascii=False) + "\n", so_far)
            so_far.count(told, is_dropped)
            on_progress(so_far)
    return so_far


def _opened(path: Path) -> io.FileIO:
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; name another file") from None


def _append(file: io.FileIO, path: Path, line: str, so_far: DistillProgress) -> None:
    """A whole line, or none. Raises ValueError, saying what is kept, on a full disk."""
    size, left = os.fstat(file.fileno()).st_size, line.encode("utf-8")
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise ValueError(
            f"{path} cannot be written: {error.strerror}; the {so_far.num_found + so_far.num_answered} conversations in it "
            "are whole, so make room and give the same command again"
        ) from None


def _line(told: Conversation, settings: Settings, teacher: Teacher, is_dropped: bool) -> dict[str, Any]:
    """As it is written. A conversation that is not kept leaves a line without tokens, so that it is not tried again."""
    content = {"messages": told.messages} if told.prompt.text is None else {"text": told.prompt.text}
    seed = settings.seed_of(told.prompt) if teacher.is_seeded else None
    return {
        "id": told.prompt.id,
        **({} if is_dropped else content),
        "tokens": [] if is_dropped else told.tokens,
        "loss_mask": [] if is_dropped else told.mask,
        "settings": _recorded(settings) | {"seed": seed},
        "target": teacher.info,
        "finish_reason": told.finish_reason,
    }


def _recorded(settings: Settings) -> dict[str, Any]:
    """What every line of a file has in common."""
    shared = asdict(settings)
    return shared | {"base_seed": shared.pop("seed")}


def _resume(path: Path, prompts: dict[str, ChatPrompt], settings: Settings, teacher: Teacher) -> set[str]:
    """The ids of the conversations in a file, after a last line that was not finished has been cut off."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}; name another file") from None
        return set()
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no ordinary file'}; name a file for the answers")
    found: set[str] = set()
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and line[: len(BEGIN)] == BEGIN[: len(line)]:
                break  # torn
            found.add(_checked(path, number, line, prompts, settings, teacher))
            size += len(line)
    if size < path.stat().st_size:
        os.truncate(path, size)
    return found


def _checked(path: Path, number: int, line: bytes, prompts: dict[str, ChatPrompt], settings: Settings, teacher: Teacher) -> str:
    """The id of a line. Raises ValueError if it is none of this run."""
    where = f"line {number} of {path}"
    try:
        fields = parsed(line, where)
        id, target = str(fields["id"]), fields["target"]
        held = {name: value for name, value in fields["settings"].items() if name != "seed"}
        held |= {name: target[name] for name in target if name != "name"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{where} is no distilled conversation; write to another file") from None
    wanted = _recorded(settings) | {name: value for name, value in teacher.info.items() if name != "name"}
    for name in sorted(held | wanted):
        if held.get(name) != wanted.get(name):
            raise ValueError(
                f"{where} was answered with {name} {held.get(name)!r}, and now it is {wanted.get(name)!r}; go on with the same, "
                "or write to another file"
            )
    prompt = prompts.get(id)
    begin = list(prompt.messages[:1]) if prompt and prompt.text is None else []
    if begin and fields["tokens"] and fields.get("messages", [])[:1] != begin:
        raise ValueError(f"{where} answers another prompt than {id} is now; go on with the same prompts, or write to another file")
    return id
