"""The options that commands share: which model and how it decodes, how it drafts, and how answers are sampled.

A command takes these dataclasses as parameters; `expanded` turns their fields into command-line options. Must not import torch or
transformers at the top, so that `--help` is instant.
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
    from transformers import PreTrainedTokenizerBase

    from headstart.engine.llm import LLM
    from headstart.speculation.params import SamplingParams
    from headstart.target.target import Target

_MODEL, _SAMPLING, MEASURING = "Model and decoding", "Sampling", "Measuring"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

TRUST = "Run Python files in the model's folder, without asking."
Trust = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line, to standard output.")]
Raw = Annotated[
    bool | None,
    typer.Option(
        "--raw/--chat",
        help="Encode prompts as they are, or with the chat template. Default: with the template, except beginnings of stories.",
        show_default=False,
        rich_help_panel=MEASURING,
    ),
]


@dataclass(frozen=True)
class TargetOptions:
    """Which model, on which device, and with which kernels."""

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
        typer.Option(help="Data type of the weights; auto: as stored.", rich_help_panel=_MODEL),
    ] = "auto"
    weights: Annotated[
        Literal["stored", "int8"],
        typer.Option(
            help="Weights of the linears: as stored, or rounded to int8: faster, with slightly other answers (bf16 on a CPU).",
            rich_help_panel=_MODEL,
        ),
    ] = "stored"
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, ...", rich_help_panel=_MODEL)] = "auto"
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Require results that equal plain decoding to the bit, or do not. Default: on a CPU, wherever possible.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's", rich_help_panel=_MODEL)] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help=TRUST, rich_help_panel=_MODEL),
    ] = False

    def load_target(self) -> "tuple[Target, PreTrainedTokenizerBase]":
        """The target and its tokenizer, with a spinner while they load."""
        with waiting(f"loading {self.model or 'the embedded model'}"):
            from headstart.target.loading import check_folder, embedded
            from headstart.target.target import Target
            from headstart.target.tokenizer_loading import load_tokenizer

            quieten()
            self.use_threads()
            source = embedded("target") if self.model is None else self.model
            check_folder(source)
            tokenizer = load_tokenizer(source, self.trust_remote_code)
            target = Target.load(
                source, dtype=self.dtype, device=self.device, exact=self.promise, trust_remote_code=self.trust_remote_code,
                weights=self.weights,
            )  # fmt: skip
        self.warn_of_ties(target)
        return target, tokenizer

    @property
    def promise(self) -> bool | str:
        """Whether exactness is required, as `headstart.load` takes it."""
        return "auto" if self.exact is None else self.exact

    def warn_of_ties(self, target: "Target") -> None:
        """Say on standard error why the text is not that of plain decoding to the bit, if the user did not ask for that."""
        kernel_choice = target.kernel_choice
        if self.exact is None and kernel_choice is not None and not kernel_choice.is_exact:
            print(f"headstart: equal to plain decoding up to near ties, not to the bit: {kernel_choice.why_not}", file=sys.stderr)

    def use_threads(self) -> None:
        """Give torch as many threads as asked for."""
        if self.threads is None:
            return
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")
        import torch

        torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class ModelOptions(TargetOptions):
    """Which model, on which device, and how exactly its text is kept."""

    accept: Annotated[
        str,
        typer.Option(
            help="Acceptance rule. coupled: the text of plain decoding; rejection: its distribution; typical or typical:0.09,0.3: "
            "another distribution (lossy).",
            rich_help_panel=_MODEL,
        ),
    ] = "coupled"

    def load(self, **settings: Any) -> "LLM":
        """The loaded model, with a spinner while it loads. settings: further arguments of `headstart.load`."""
        with waiting(f"loading {self.model or 'the embedded model'}"):
            import headstart
            from headstart.speculation.rules import parse_rule

            parse_rule(self.accept)  # refused before anything is loaded
            quieten()
            self.use_threads()
            settings |= {"accept": self.accept, "weights": self.weights, "trust_remote_code": self.trust_remote_code}
            llm = headstart.load(self.model, device=self.device, dtype=self.dtype, exact=self.promise, **settings)
        self.warn_of_ties(llm.engine.target)
        return llm


@dataclass(frozen=True)
class DraftingOptions:
    """Which drafter, how many drafts, and how much memory the KV cache has."""

    drafter: Annotated[
        str,
        typer.Option(
            help="Drafter: auto, lookup, model:PATH, a method, a folder or hub id of heads, an installed name, or none.",
            rich_help_panel=_MODEL,
            autocompletion=complete.drafters,
        ),
    ] = "auto"
    planner: Annotated[
        str | None,
        typer.Option(
            help="How much to draft: auto (by measured cost), chain:5, full:3,2,1, best:nodes=15,depth=6,width=4,beam=4; tree:32.",
            show_default="auto with --accept coupled, else the drafter's",
            rich_help_panel=_MODEL,
            autocompletion=complete.planners,
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for the KV cache, such as 512M or 2G.", show_default="by context", rich_help_panel=_MODEL),
    ] = None

    def settings(self, model: str | None, temperature: float) -> dict[str, Any]:
        """Arguments of `headstart.load`, checked before anything is loaded.

        model: that will be loaded; None: the embedded one.
        temperature: of the answers; calibrated trees depend on it.
        Raises ValueError for a planner or an amount of memory that cannot be read.
        """
        from headstart.engine.drafter_loading import resolve_planner
        from headstart.speculation.planner import parse

        if self.planner and self.drafter == "none":
            raise ValueError("--planner shapes the draft, but --drafter none drafts nothing; leave one of them out")
        return {
            "drafter": None if self.drafter == "none" else self.drafter,
            "planner": resolve_planner(parse(self.planner), self.drafter, temperature, model) if self.planner else None,
            "memory": None if self.memory is None else read_bytes(self.memory),
        }


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are sampled and when they end."""

    max_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum number of tokens of an answer.", show_default="256, or what fits", rich_help_panel=_SAMPLING),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 is greedy.", show_default="0", rich_help_panel=_SAMPLING)
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens only.", rich_help_panel=_SAMPLING)] = (
        None
    )
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most probable tokens that make up this probability.", rich_help_panel=_SAMPLING),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample from tokens with at least this fraction of the highest probability.", rich_help_panel=_SAMPLING),
    ] = None
    repetition_penalty: Annotated[
        float, typer.Option(help="As in Hugging Face transformers, over prompt and answer.", rich_help_panel=_SAMPLING)
    ] = 1.0
    presence_penalty: Annotated[float, typer.Option(help="As in the OpenAI API, over the answer.", rich_help_panel=_SAMPLING)] = 0.0
    frequency_penalty: Annotated[float, typer.Option(help="As in the OpenAI API, over the answer.", rich_help_panel=_SAMPLING)] = (
        0.0
    )
    seed: Annotated[
        int | None, typer.Option(help="Seed of the answers. Default: random; --json prints it.", rich_help_panel=_SAMPLING)
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop string: the answer ends before it; may be repeated.", rich_help_panel=_SAMPLING)
    ] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after stop tokens.", rich_help_panel=_SAMPLING)] = False

    def params(self, **more: Any) -> "SamplingParams":
        """The sampling parameters, checked before anything is loaded. more: fields that only one command has."""
        from headstart.speculation.params import SamplingParams

        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        settings["max_tokens"] = 256 if self.max_tokens is None else self.max_tokens
        settings["temperature"] = self.temperature or 0.0
        for stop in self.stop or ():
            checked(stop, "a stop string")
        return SamplingParams(**{**settings, **more, "stop": tuple(self.stop or ())})


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a dataclass of options replaced by its fields, as typer expects them."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _fields(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        grouped = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**grouped, **values)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _fields(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(group)]


def read_bytes(text: str) -> int:
    """Number of bytes: `512M` is 536,870,912. Raises ValueError for what is no amount."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"memory is {text!r}; write a number of bytes with K, M or G, such as 512M or 2G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def read_prompt(prompt: str | None) -> str:
    """The prompt argument, or standard input for `-` or nothing. Raises ValueError where that is not text."""
    if prompt is not None and prompt != "-":
        return checked(prompt, "the prompt")
    if prompt is None and sys.stdin.isatty():
        raise ValueError("there is no prompt; give one as an argument, or pipe it into standard input")
    return decoded(sys.stdin.buffer.read())


def checked(text: str, name: str) -> str:
    """A command-line argument. Raises ValueError where its bytes are not UTF-8."""
    if any("\udc80" <= character <= "\udcff" for character in text):  # how Python decodes bytes that are not UTF-8
        raise ValueError(f"{name} is not valid UTF-8; convert it, for example with iconv -t utf-8")
    return text


def decoded(line: bytes) -> str:
    """Bytes of standard input as text. Raises ValueError where they are not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ValueError(
            f"standard input is not valid UTF-8 (byte 0x{byte:02x} at offset {error.start}); convert it, for example with iconv"
        ) from None


@contextmanager
def waiting(message: str) -> Iterator[None]:
    """A spinner on standard error, if that is a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


def quieten() -> None:
    """Silence the progress bars, retries and advice of transformers and huggingface_hub."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    hub.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
