"""What `generate` and `chat` share: options, encoding of messages, and printing of answers as they are generated."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.options import SamplingOptions, waiting

if TYPE_CHECKING:
    from headstart.engine.answers import Answering, Fragment
    from headstart.engine.llm import LLM
    from headstart.speculation.params import SamplingParams
    from headstart.text.tokenizer import Prompt

System = Annotated[str | None, typer.Option(help="System message for the chat template.")]
ShowDrafts = Annotated[bool, typer.Option("--show-drafts", help="Underline accepted drafts, and print a summary at the end.")]
UNDERLINE, PLAIN = "\x1b[4m", "\x1b[24m"


def check_output(show_drafts: bool, as_json: bool, logprobs: int | None) -> None:
    """Raise ValueError for options of the output that contradict one another."""
    if show_drafts and as_json:
        raise ValueError("--show-drafts marks streamed text, and --json lists the drafted tokens anyway; drop one of them")
    if logprobs is not None and not as_json:
        raise ValueError("--logprobs are printed by --json only; add --json")


def encode_messages(llm: "LLM", messages: "Prompt") -> list[int]:
    """The tokens of a conversation, by the chat template."""
    from headstart.text.tokenizer import encode_prompt

    return encode_prompt(llm.tokenizer, messages)


def fit_to_context(params: "SamplingParams", sampling: SamplingOptions, llm: "LLM", ids: Sequence[int]) -> "SamplingParams":
    """The parameters with the default of max_tokens reduced to what the context leaves; an explicit --max-tokens stays."""
    if sampling.max_tokens is not None:
        return params
    return replace(params, max_tokens=max(1, min(params.max_tokens, llm.engine.target.context - len(ids))))


# -- printing ---------------------------------------------------------------------------------------------------------------


def print_answers(llm: "LLM", answering: "Answering", show_drafts: bool, as_json: bool) -> bool:
    """Print answers, streaming where there is one. Returns False if the user interrupted; partial answers are printed too."""
    is_finished = True
    is_several = len(answering.answers) > 1
    is_streamed = not as_json and not is_several
    marks = Marks(llm)
    try:
        with nullcontext() if is_streamed else waiting("answering"):
            for fragment in answering:
                if is_streamed:
                    sys.stdout.write(marks.underlined(fragment) if show_drafts else fragment.text)
                    sys.stdout.flush()
    except KeyboardInterrupt:
        answering.close()
        is_finished = False
    for number, answer in enumerate(answering.answers, 1):
        if as_json:
            print(json.dumps(answer.as_dict()))
        else:
            print(f"[{number}] {answer.text}" if is_several else "")
    if show_drafts:
        _print_summary(answering)
    return is_finished


def _print_summary(answering: "Answering") -> None:
    from headstart.engine.stats import Stats

    answers = answering.answers
    stats = Stats.total(answer.stats for answer in answers)
    accepted = sum(sum(answer.guessed) for answer in answers)
    lossy = ", lossy: not the text of plain decoding" if answers[0].is_lossy else ""
    summary = (
        f"{stats.tokens} tokens in {stats.row_rounds} rounds: tau {stats.tau:.2f}, {accepted} tokens were accepted drafts{lossy}"
    )
    print(summary, file=sys.stderr)


class Marks:
    """Underlines the characters of a stream that came from accepted drafts.

    A second detokenizer, one token at a time, tells which token each character came with; its pieces join to the same text. The
    stream may hold characters back (they may become a stop string), so they are held back here as well.
    """

    def __init__(self, llm: "LLM") -> None:
        from headstart.text.detokenizer import Detokenizer

        self._detokenizer = Detokenizer(llm.tokenizer)
        self._pending: list[tuple[str, bool]] = []  # characters that the stream holds back

    def underlined(self, fragment: "Fragment") -> str:
        """The fragment's text, with accepted drafts underlined."""
        for token, is_draft in zip(fragment.token_ids, fragment.guessed, strict=True):
            self._pending += [(character, is_draft) for character in self._detokenizer.push([token])]
        size = len(fragment.text)
        characters, self._pending = self._pending[:size], self._pending[size:]
        characters += [(character, False) for character in fragment.text[len(characters) :]]  # incomplete at the end: flushed
        text, is_on = "", False
        for character, is_draft in characters:
            text += (UNDERLINE if is_draft else PLAIN) if is_draft != is_on else ""
            text, is_on = text + character, is_draft
        return text + (PLAIN if is_on else "")
