"""Write docs/cli.md from the commands themselves, so that the reference cannot drift from `--help`."""

from pathlib import Path

import typer
from typer.cli import get_docs_for_click

CLI_PAGE = Path(__file__).parent / "cli.md"
HEADER = "<!-- Written by `make docs` from headstart/cli.py; edit the help texts there. -->\n\n"


def reference(app: typer.Typer) -> str:
    """The whole command-line reference of `app`, as Markdown."""
    command = typer.main.get_command(app)
    page = get_docs_for_click(obj=command, ctx=typer.Context(command), name="headstart")
    return HEADER + page.strip() + "\n"


if __name__ == "__main__":
    from headstart.cli import app

    CLI_PAGE.write_text(reference(app))
