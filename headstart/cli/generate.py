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
    settings = drafting.settings(model.model, params.temperature)
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
    return encode_messages(llm, [*messages, {"role": "user", "content": text}])
