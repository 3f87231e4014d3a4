"""The command line: parses, calls and prints. A user's mistake is one sentence on standard error and exit code 2.

Nothing outside this folder imports it.
"""

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperGroup

from headstart.cli import (
    bench,
    chat,
    demo,
    distill,
    export,
    features,
    generate,
    import_heads,
    inspect,
    pretrain,
    serve,
    train,
    tune,
    verify_export,
)
from headstart.cli.options import expanded

INTERRUPTED = 130
MAX_SHOWN = 200  # characters of a name, or of a library's message


class Commands(TyperGroup):
    """All commands, and the one place where an exception becomes a sentence."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command and leave with its exit code."""
        extra["standalone_mode"] = False
        try:
            with _told():
                code = super().main(*args, **extra) or 0
            sys.stdout.flush()  # raises where the output does not fit on the disk
            sys.exit(code)
        except BrokenPipeError:  # the reader of the output has closed it
            _silence()
            sys.exit(1)
        except (KeyboardInterrupt, typer.Abort):
            _leave("interrupted", INTERRUPTED)
        except Exception as error:
            if (sentence := _sentence(error)) is None:
                raise
            _leave(sentence, 2)


class _Lines(logging.Handler):
    """Prints what the package logs to standard error, if that is a terminal; each message once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._seen and sys.stderr.isatty():
            self._seen.add(message)
            print("headstart:", message, file=sys.stderr)


@contextmanager
def _told() -> Iterator[None]:
    """A context in which people are told what takes time."""
    log, lines = logging.getLogger("headstart"), _Lines()
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(lines)


def _sentence(error: Exception) -> str | None:
    """The message for an error of the input or of the machine; None for a bug of this package."""
    if isinstance(error, UnicodeError):
        return f"an argument or a file is not valid UTF-8 ({error}); convert it, for example with iconv"
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, RecursionError):
        return "an argument or a file is nested too deeply to be read"
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):
        return f"there is not enough memory: {_short(str(error)) or 'the system gives no more'}; a smaller model needs less"
    if hasattr(error, "format_message"):  # the parser's own errors, whichever package they come from
        return str(error.format_message())
    return None


def _of_system(error: OSError) -> str:
    """The message of an operating-system error, with the file that it is about."""
    if error.errno == errno.ENOSPC and error.filename is None:
        _silence()
        return "the output cannot be written: there is no space left on its disk; make room, or write elsewhere"
    file = "" if error.filename is None else f"{_short(str(error.filename))}: "
    return f"{file}{error.strerror or _short(str(error)) or type(error).__name__}"


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _silence() -> None:
    """Discard what standard output still buffers: it would raise again when the interpreter exits."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(sentence: str, code: int) -> None:
    print("headstart:", " ".join(sentence.split()), file=sys.stderr)
    sys.exit(code)


app = typer.Typer(
    name="headstart",
    cls=Commands,
    help="Exact speculative decoding for any Hugging Face causal LM: the same text, sooner.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        import headstart

        print(headstart.__version__)
        raise typer.Exit


for command in (
    demo.demo,
    generate.generate,
    chat.chat,
    distill.distill,
    features.features,
    train.train,
    pretrain.pretrain,
    tune.tune,
    inspect.inspect,
    bench.bench,
    serve.serve,
    export.export,
):
    app.command()(expanded(command))
app.command("import")(expanded(import_heads.bring))  # a keyword of Python, so no function has this name
app.command("verify-export")(expanded(verify_export.verify_export))


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    """One line, as for a mistake; where in the code a warning comes from helps nobody at a command line."""
    print("headstart: warning:", " ".join(str(message).split()), file=sys.stderr)


def main() -> None:
    """The entry point of the `headstart` script."""
    warnings.showwarning = _show_warning
    app()
