"""docs/cli.md is written from the commands; this fails where it is behind them."""

import runpy
from pathlib import Path

from headstart.cli import app

DOCS = Path(__file__).parents[2] / "docs"


def test_the_command_line_page_says_what_help_says():
    generator = runpy.run_path(str(DOCS / "generate_cli.py"))
    assert (DOCS / "cli.md").read_text() == generator["reference"](app), "docs/cli.md is out of date: run `make docs`"
