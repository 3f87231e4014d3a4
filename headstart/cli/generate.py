"""`generate`: stream the answer to one prompt."""

from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli.answering import ShowDrafts, System, check_output, encode_messages, fit_to_context, print_answers
from headstart.cli.options import DraftingOptions, Json, ModelOptions, SamplingOptions, read_prompt

if TYPE_CHECKING:
    from headstart.engine.llm import LLM


def generate(
    model: ModelOptions,
    drafting: DraftingOptions,
    sampling: SamplingOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - or nothing: read it from standard input.", show_default=False)
    ] = None,
    n: Annotated[int, typer.Option(help="Number of answers.", rich_help_panel="Sampling")] = 1,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log-probability of each token, and of N alternatives.")] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
    show_drafts: ShowDrafts = False,
    json: Json = False,
) -> None:
    """Generate an answer to one prompt, streaming.

    Example: headstart generate "Once upon a time" --max-tokens 64 --temperature 0.8 --seed 7 --show-drafts
    """
    check_output(show_drafts, json, logprobs)
    params = sampling.params(n=n, logprobs=logprobs)
    settings = drafting.settings(params.temperature)
    text = read_prompt(prompt)
    if raw and system is not None:
        raise ValueError("--system needs the chat template, which --raw leaves out; drop one of them")
    llm = model.load(**settings)
    ids = _encode(llm, text, system, raw)
    answering = llm.start([ids], fit_to_context(params, sampling, llm, ids))
    if not print_answers(llm, answering, show_drafts, json):
        raise typer.Exit(130)


def _encode(llm: "LLM", text: str, system: str | None, raw: bool) -> list[int]:
    from headstart.text.tokenizer import encode_prompt

    if raw or (llm.tokenizer.chat_template is None and system is None):
        return encode_prompt(llm.tokenizer, text)
    if not text.strip():
        raise ValueError("the prompt is empty; give at least one character")
    messages = [] if system is None else [{"role": "system", "content": system}]
    return _encode_messages(llm, [*messages, {"role": "user", "content": text}])


def _encode_messages(llm: "LLM", messages: "Prompt") -> list[int]:
    from headstart.text.tokenizer import encode_prompt

    return encode_prompt(llm.tokenizer, messages)


def _fitted(params: "SamplingParams", sampling: Sampling, llm: "LLM", ids: Sequence[int]) -> "SamplingParams":
    """With no --max-tokens, the default shrinks to what the context leaves; a number that was asked for stays."""
    if sampling.max_tokens is not None:
        return params
    return replace(params, max_tokens=max(1, min(params.max_tokens, llm.engine.target.context - len(ids))))


# -- printing ---------------------------------------------------------------------------------------------------------------


def _print(llm: "LLM", answering: "Answering", show_drafts: bool, as_json: bool) -> bool:
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
        from headstart.text.detokenizer import Detokenizer

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
