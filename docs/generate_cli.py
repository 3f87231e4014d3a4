"""Write docs/cli.md from the commands themselves, so that the reference cannot drift from `--help`."""

from html import unescape
from pathlib import Path

import typer
from typer.cli import get_docs_for_click
from typer.core import MARKUP_MODE_KEY

CLI_PAGE = Path(__file__).parent / "cli.md"
HEADER = "<!-- Written by `make docs` from headstart/cli/; edit the help texts there. -->\n\n"


def reference(app: typer.Typer) -> str:
    """The whole command-line reference of `app`, as Markdown."""
    command = typer.main.get_command(app)
    context = typer.Context(command, obj={MARKUP_MODE_KEY: app.rich_markup_mode})
    page = get_docs_for_click(obj=command, ctx=context, name="headstart")
    return HEADER + unescape(page).strip() + "\n"


if __name__ == "__main__":
    from headstart.cli import app

    CLI_PAGE.write_text(reference(app))
