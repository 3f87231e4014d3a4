"""The options that commands share, declared once: which model and how it decodes, and how an answer is sampled.

A command takes these dataclasses as parameters; `expanded` turns their fields into command-line options. This file knows names,
defaults and help texts. It imports nothing heavy, so that `--help` is instant.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from headstart.cli import completion as complete

if TYPE_CHECKING:
    from headstart.engine.llm import LLM
    from headstart.speculation.params import SamplingParams

_MODEL, _SAMPLING, MEASURING = "Model and decoding", "Sampling", "Measuring"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

TRUST = "Let Python files in the model's folder run; nothing is ever asked."
Trust = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output, for machines.")]
Raw = Annotated[
    bool | None,
    typer.Option(
        "--raw/--chat",
        help="Prompts as they stand, or through the chat template; left out: as suits them.",
        show_default=False,
        rich_help_panel=MEASURING,
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where, and how exactly."""

    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a causal language model.",
            show_default="embedded",
            rich_help_panel=_MODEL,
            autocompletion=complete.folders,
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        typer.Option(help="Precision of the weights; auto: as stored.", rich_help_panel=_MODEL),
    ] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_MODEL)] = "auto"
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Equality to the bit with plain decoding, demanded or switched off; left out: wherever it can be had on a CPU.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None
    accept: Annotated[
        str,
        typer.Option(
            help="coupled: the text of plain decoding; rejection: its law; typical or typical:0.09,0.3: lossy, another law.",
            rich_help_panel=_MODEL,
        ),
    ] = "coupled"
    threads: Annotated[
        int | None, typer.Option(help="Threads of the processor.", show_default="torch's", rich_help_panel=_MODEL)
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help=TRUST, rich_help_panel=_MODEL),
    ] = False

    def load(self, **settings: Any) -> "LLM":
        """The model, with a spinner while it loads. settings: of `headstart.load`."""
        with waiting(f"loading {self.model or 'the embedded model'}"):
            import headstart
            from headstart.speculation.rules import parse_rule

            parse_rule(self.accept)  # refused before anything is loaded
            quieten()
            self._use_threads()
            exact = "auto" if self.exact is None else self.exact
            settings |= {"accept": self.accept, "trust_remote_code": self.trust_remote_code}
            llm = headstart.load(self.model, device=self.device, dtype=self.dtype, exact=exact, **settings)
        kernel_choice = llm.engine.target.kernel_choice
        if self.exact is None and kernel_choice is not None and not kernel_choice.is_exact:
            print(f"headstart: equal to plain decoding up to near ties, not to the bit: {kernel_choice.why_not}", file=sys.stderr)
        return llm

    def _use_threads(self) -> None:
        if self.threads is None:
            return
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")
        import torch

        torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class DraftingOptions:
    """What guesses, how much, and in how much memory."""

    drafter: Annotated[
        str,
        typer.Option(
            help="What guesses: auto, lookup, model:PATH, a method, a folder or hub id of heads, an installed name, or none.",
            rich_help_panel=_MODEL,
            autocompletion=complete.drafters,
        ),
    ] = "auto"
    planner: Annotated[
        str | None,
        typer.Option(
            help="How much is guessed: chain:5, full:3,2,1, best:nodes=15,depth=6,width=4,beam=4 or, of calibrated heads, tree:32.",
            show_default="the drafter's",
            rich_help_panel=_MODEL,
            autocompletion=complete.planners,
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for keys and values, such as 512M or 2G.", show_default="by context", rich_help_panel=_MODEL),
    ] = None

    def settings(self, temperature: float = 0.0) -> dict[str, Any]:
        """For `headstart.load`; checked, before anything is loaded. temperature: of the answers, which measured trees go by."""
        from headstart.engine.drafter_loading import resolve_planner
        from headstart.speculation.planner import parse

        if self.planner and self.drafter == "none":
            raise ValueError("--planner says how much to guess, but --drafter none guesses nothing; leave one of them out")
        return {
            "drafter": None if self.drafter == "none" else self.drafter,
            "planner": resolve_planner(parse(self.planner), self.drafter, temperature) if self.planner else None,
            "memory": None if self.memory is None else read_bytes(self.memory),
        }


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is sampled and when it ends."""

    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of an answer at most.", show_default="256, or what fits", rich_help_panel=_SAMPLING),
    ] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="0", rich_help_panel=_SAMPLING)] = None
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.", rich_help_panel=_SAMPLING)] = None
    top_p: Annotated[
        float | None, typer.Option(help="Only the likeliest tokens that make up this share.", rich_help_panel=_SAMPLING)
    ] = None
    min_p: Annotated[
        float | None, typer.Option(help="Only tokens at least this share as likely as the best.", rich_help_panel=_SAMPLING)
    ] = None
    repetition_penalty: Annotated[
        float, typer.Option(help="Hugging Face's, over prompt and answer.", rich_help_panel=_SAMPLING)
    ] = 1.0
    presence_penalty: Annotated[float, typer.Option(help="OpenAI's, over the answer.", rich_help_panel=_SAMPLING)] = 0.0
    frequency_penalty: Annotated[float, typer.Option(help="OpenAI's, over the answer.", rich_help_panel=_SAMPLING)] = 0.0
    seed: Annotated[
        int | None, typer.Option(help="Repeats an answer; drawn, and told by --json, if left out.", rich_help_panel=_SAMPLING)
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(help="Text before which the answer ends; may be given again.", rich_help_panel=_SAMPLING)
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on where the model would stop.", rich_help_panel=_SAMPLING)
    ] = False

    def params(self, **more: Any) -> "SamplingParams":
        """Checked, before anything is loaded. more: fields that only one command has."""
        from headstart.speculation.params import SamplingParams

        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        settings["max_tokens"] = 256 if self.max_tokens is None else self.max_tokens
        settings["temperature"] = self.temperature or 0.0
        for stop in self.stop or ():
            checked(stop, "a stop string")
        return SamplingParams(**{**settings, **more, "stop": tuple(self.stop or ())})


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, with each parameter that is a dataclass of options replaced by its fields, as typer wants them."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _fields(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        grouped = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**grouped, **given)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _fields(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(group)]


def read_bytes(text: str) -> int:
    """`512M` is 536,870,912. Raises ValueError for what is no amount."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"memory is {text!r}; write a number of bytes with K, M or G, such as 512M or 2G")
    return int(float(found[1]) * UNITS[found[2].upper()])


def read_prompt(prompt: str | None) -> str:
    """The prompt argument, or standard input for `-` or nothing. Raises ValueError where that is not text."""
    if prompt is not None and prompt != "-":
        return checked(prompt, "the prompt")
    if prompt is None and sys.stdin.isatty():
        raise ValueError("there is no prompt; give one as an argument, or pipe it into standard input")
    return decoded(sys.stdin.buffer.read())


def checked(given: str, what: str) -> str:
    """A text that was given as an argument. Raises ValueError where its bytes are no text."""
    if any("\udc80" <= character <= "\udcff" for character in given):  # how the system hands over bytes that are no text
        raise ValueError(f"{what} is not valid UTF-8; convert it, for example with iconv -t utf-8")
    return given


def decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ValueError(
            f"standard input is not valid UTF-8 (byte 0x{byte:02x} at offset {error.start}); convert it, for example with iconv"
        ) from None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on standard error, if that is a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def quieten() -> None:
    """Keep other packages' progress bars, retries and advice out of the output."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    hub.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
