"""Distillation: the target's own answers to prompts, written as training data for heads.

The seed of a conversation is a function of the run's seed and of the prompt's index in its file, so answers depend neither on
batching nor on interruptions: a resumed run writes the same lines as an uninterrupted one. The module must not import training.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headstart.distill.teacher import Conversation, Settings, Teacher
from headstart.text.jsonl import parsed
from headstart.text.prompts import ChatPrompt

LINE_START = b'{"id": "'  # of every line that is written here


@dataclass
class DistillProgress:
    """Progress of a run, in conversations.

    num_prompts: of the run.
    num_found: already in the file at the start.
    num_answered: new ones in the file.
    num_tokens: tokens of the new answers.
    num_cut: new ones that end at `max_tokens`.
    num_dropped: new ones that were dropped because they end there.
    skipped: number without an answer, by error.
    shortened: number that end early, by error.
    """

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
        """Prompts that need no further work."""
        return self.num_found + self.num_answered + self.num_dropped + self.skipped.total()

    def count(self, conversation: Conversation, is_dropped: bool) -> None:
        """Add a conversation that has ended."""
        if conversation.error is not None:
            (self.skipped if conversation.is_empty else self.shortened)[conversation.error] += 1
        if conversation.is_empty:
            return
        self.num_tokens += conversation.num_answered
        self.num_dropped += is_dropped
        self.num_answered += not is_dropped
        self.num_cut += not is_dropped and conversation.finish_reason == "length"


def distill(
    teacher: Teacher,
    prompts: Sequence[ChatPrompt],
    settings: Settings,
    path: str | Path,
    on_progress: Callable[[DistillProgress], None] = lambda progress: None,
) -> DistillProgress:
    """Write the teacher's answers to a JSONL file, one line for each conversation as it ends, and return the progress.

    path: of the file. If it exists, its conversations are kept and the others are added.
    on_progress: called at the start and after each conversation.

    Raises ValueError if the file holds answers of another target or with other settings, and if it cannot be written. Lines that
    are in the file stay, however the process ends.
    """
    path = Path(path)
    if path.suffix in (".gz", ".xz"):
        raise ValueError(
            f"{path} cannot be continued after an interruption if it is compressed; write plain .jsonl and compress it later"
        )
    answered = _resume(path, {prompt.id: prompt for prompt in prompts}, settings, teacher)
    progress = DistillProgress(len(prompts), num_found=sum(prompt.id in answered for prompt in prompts))
    on_progress(progress)
    remaining = (prompt for prompt in prompts if prompt.id not in answered)
    with _opened(path) as file:
        for conversation in teacher.converse(remaining, settings):
            is_dropped = settings.drop_cut and conversation.finish_reason == "length"
            if not conversation.is_empty:
                line = json.dumps(_line(conversation, settings, teacher, is_dropped), ensure_ascii=False)
                _append(file, path, line + "\n", progress)
            progress.count(conversation, is_dropped)
            on_progress(progress)
    return progress


def _opened(path: Path) -> io.FileIO:
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; name another file") from None


def _append(file: io.FileIO, path: Path, line: str, progress: DistillProgress) -> None:
    """Append a complete line, or nothing. Raises ValueError if the disk is full, with the number of conversations kept."""
    size, remaining = os.fstat(file.fileno()).st_size, line.encode("utf-8")
    try:
        while remaining:
            remaining = remaining[file.write(remaining) :]
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise ValueError(
            f"{path} cannot be written: {error.strerror}; the {progress.num_found + progress.num_answered} conversations that "
            "are in it are whole, so make room and give the same command again"
        ) from None


def _line(conversation: Conversation, settings: Settings, teacher: Teacher, is_dropped: bool) -> dict[str, Any]:
    """The keys of a line. A dropped conversation leaves a line without tokens, so that it is not tried again."""
    prompt = conversation.prompt
    content = {"messages": conversation.messages} if prompt.text is None else {"text": prompt.text}
    seed = settings.seed_of(prompt) if teacher.is_seeded else None
    return {
        "id": prompt.id,
        **({} if is_dropped else content),
        "tokens": [] if is_dropped else conversation.tokens,
        "loss_mask": [] if is_dropped else conversation.mask,
        "settings": _shared_settings(settings) | {"seed": seed},
        "target": teacher.info,
        "finish_reason": conversation.finish_reason,
    }


def _shared_settings(settings: Settings) -> dict[str, Any]:
    """The settings that all lines of a file share."""
    shared = asdict(settings)
    return shared | {"base_seed": shared.pop("seed")}


def _resume(path: Path, prompts: dict[str, ChatPrompt], settings: Settings, teacher: Teacher) -> set[str]:
    """The ids of the conversations in a file. An incomplete last line is removed from it."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}; name another file") from None
        return set()
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no ordinary file'}; name a file for the answers")
    ids: set[str] = set()
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and line[: len(LINE_START)] == LINE_START[: len(line)]:
                break  # cut short by a kill
            ids.add(_checked(path, number, line, prompts, settings, teacher))
            size += len(line)
    if size < path.stat().st_size:
        os.truncate(path, size)
    return ids


def _checked(path: Path, number: int, line: bytes, prompts: dict[str, ChatPrompt], settings: Settings, teacher: Teacher) -> str:
    """The id of a line. Raises ValueError if the line is not of this run."""
    where = f"line {number} of {path}"
    try:
        fields = parsed(line, where)
        id, target = str(fields["id"]), fields["target"]
        actual = {name: value for name, value in fields["settings"].items() if name != "seed"}
        actual |= {name: target[name] for name in target if name != "name"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{where} is no distilled conversation; write to another file") from None
    expected = _shared_settings(settings) | {name: value for name, value in teacher.info.items() if name != "name"}
    for name in sorted(actual | expected):
        if actual.get(name) != expected.get(name):
            raise ValueError(
                f"{where} was answered with {name} {actual.get(name)!r}, and now it is {expected.get(name)!r}; "
                "go on with the same, or write to another file"
            )
    prompt = prompts.get(id)
    first_message = list(prompt.messages[:1]) if prompt and prompt.text is None else []
    if first_message and fields["tokens"] and fields.get("messages", [])[:1] != first_message:
        raise ValueError(f"{where} answers another prompt than {id} is now; go on with the same prompts, or write to another file")
    return id
