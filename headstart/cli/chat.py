"""`chat`: a conversation, line by line."""

import sys

import typer

from headstart.cli.answering import ShowDrafts, System, check_output, encode_messages, fit_to_context, print_answers
from headstart.cli.options import DraftingOptions, Json, ModelOptions, SamplingOptions, decoded


def chat(
    model: ModelOptions,
    drafting: DraftingOptions,
    sampling: SamplingOptions,
    system: System = None,
    show_drafts: ShowDrafts = False,
    json: Json = False,
) -> None:
    """Chat with a model.

    Each line of input is a message. Ctrl-C ends an answer, Ctrl-D the conversation.

    Example: headstart chat --model ./talk13M --drafter lookup --temperature 0.7 --show-drafts
    """
    check_output(show_drafts, json, None)
    params = sampling.params()
    settings = drafting.settings(model.model, params.temperature)
    llm = model.load(**settings)
    if llm.tokenizer.chat_template is None:
        raise ValueError(f"{llm.engine.target.name} has no chat template, so it cannot chat; use headstart generate")
    messages = [] if system is None else [{"role": "system", "content": system}]
    while (line := _read_line()) is not None:
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        ids = encode_messages(llm, messages)
        answering = llm.start([ids], fit_to_context(params, sampling, llm, ids))
        if not print_answers(llm, answering, show_drafts, json) and not sys.stdin.isatty():
            raise typer.Exit(130)
        messages.append({"role": "assistant", "content": answering.answers[0].text})


def _read_line() -> str | None:
    """The next line of the user, None at the end."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
    line = sys.stdin.buffer.readline()
    return decoded(line).strip() if line else None
