"""The command line: parse, call, print. What a user did wrong is one sentence on standard error and exit code 2."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from headstart.cli import answer, begin, bring, calibrate, learn, look, measure, teach
from headstart.cli.settings import expanded

INTERRUPTED = 130


class Commands(TyperGroup):
    """All commands, and the one place where an error becomes a sentence."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command and leave with its exit code."""
        extra["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **extra) or 0)
        except ValueError as error:
            _leave(str(error), 2)
        except (KeyboardInterrupt, typer.Abort):
            _leave("interrupted", INTERRUPTED)
        except Exception as error:
            if not hasattr(error, "format_message"):  # the parser's own errors, whichever package they come from
                raise
            _leave(error.format_message(), 2)


def _leave(sentence: str, code: int) -> None:
    print("headstart:", " ".join(sentence.split()), file=sys.stderr)
    sys.exit(code)


app = typer.Typer(
    name="headstart",
    cls=Commands,
    help="The same text from a language model, sooner: exact speculative decoding for any Hugging Face causal LM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        import headstart

        print(headstart.__version__)
        raise typer.Exit


for command in (
    measure.demo,
    answer.generate,
    answer.chat,
    teach.distill,
    learn.train,
    begin.pretrain,
    calibrate.calibrate,
    look.inspect,
    measure.bench,
):
    app.command()(expanded(command))
app.command("import")(expanded(bring.bring))  # a word that Python keeps for itself


def main() -> None:
    """The entry point of the `headstart` script."""
    app()
