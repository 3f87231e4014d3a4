"""What `generate` and `chat` share: their options, their prompts, and how answers are printed."""

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
    from headstart.speculation.sampling import SamplingParams
    from headstart.text.tokenizer import Prompt

System = Annotated[str | None, typer.Option(help="A system message for the chat template.")]
ShowDrafts = Annotated[bool, typer.Option("--show-drafts", help="Underline what a drafter had guessed; a summary at the end.")]
UNDERLINE, PLAIN = "\x1b[4m", "\x1b[24m"


def check_output(show_drafts: bool, as_json: bool, logprobs: int | None) -> None:
    if show_drafts and as_json:
        raise ValueError("--show-drafts marks streamed text, and --json lists the guessed tokens anyway; drop one of them")
    if logprobs is not None and not as_json:
        raise ValueError("--logprobs are shown by --json only; add --json")


def encode_messages(llm: "LLM", messages: "Prompt") -> list[int]:
    from headstart.text.tokenizer import encode_prompt

    return encode_prompt(llm.tokenizer, messages)


def fit_to_context(params: "SamplingParams", sampling: SamplingOptions, llm: "LLM", ids: Sequence[int]) -> "SamplingParams":
    """With no --max-tokens, the default shrinks to what the context leaves; a number that was asked for stays."""
    if sampling.max_tokens is not None:
        return params
    return replace(params, max_tokens=max(1, min(params.max_tokens, llm.engine.target.context - len(ids))))


# -- printing ---------------------------------------------------------------------------------------------------------------


def print_answers(llm: "LLM", answering: "Answering", show_drafts: bool, as_json: bool) -> bool:
    """Print answers as they come. Returns False if the user interrupted; what was there is printed all the same."""
    is_whole = True
    several = len(answering.answers) > 1
    marks = Marks(llm)
    is_streamed = not as_json and not several
    try:
        with nullcontext() if is_streamed else waiting("answering"):
            for fragment in answering:
                if is_streamed:
                    sys.stdout.write(marks.underlined(fragment) if show_drafts else fragment.text)
                    sys.stdout.flush()
    except KeyboardInterrupt:
        answering.abort()
        is_whole = False
    for place, done in enumerate(answering.answers, 1):
        if as_json:
            print(json.dumps(done.as_dict()))
        else:
            print(f"[{place}] {done.text}" if several else "")
    if show_drafts:
        _print_summary(answering)
    return is_whole


def _print_summary(answering: "Answering") -> None:
    from headstart.engine.stats import Stats

    done = answering.answers
    stats, guessed = Stats.total(answer.stats for answer in done), sum(sum(answer.guessed) for answer in done)
    lossy = ", lossy: not the text of plain decoding" if done[0].is_lossy else ""
    print(f"{stats.tokens} tokens in {stats.row_rounds} rounds: tau {stats.tau:.2f}, {guessed} guessed{lossy}", file=sys.stderr)


class Marks:
    """Which characters of a stream came from guessed tokens.

    A second detokenizer, one token at a time, says which token each character came with; its pieces join to the same text. The
    stream may hold characters back (they may become a stop string), so these wait here as well.
    """

    def __init__(self, llm: "LLM") -> None:
        from headstart.text.tokenizer import Detokenizer

        self._detokenizer = Detokenizer(llm.tokenizer)
        self._waiting: list[tuple[str, bool]] = []  # characters that are not out yet

    def underlined(self, fragment: "Fragment") -> str:
        """The fragment's text, with what was guessed underlined."""
        for token, is_guessed in zip(fragment.token_ids, fragment.guessed, strict=True):
            self._waiting += [(character, is_guessed) for character in self._detokenizer.push([token])]
        size = len(fragment.text)
        out, self._waiting = self._waiting[:size], self._waiting[size:]
        out += [(character, False) for character in fragment.text[len(out) :]]  # incomplete to the end: flushed by the stream
        text, is_on = "", False
        for character, is_guessed in out:
            text += (UNDERLINE if is_guessed else PLAIN) if is_guessed != is_on else ""
            text, is_on = text + character, is_guessed
        return text + (PLAIN if is_on else "")
