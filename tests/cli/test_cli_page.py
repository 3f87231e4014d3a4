"""docs/cli.md is generated from the commands and must be up to date."""

import runpy
from pathlib import Path

from headstart.cli import app

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_the_command_line_is_up_to_date():
    generator = runpy.run_path(str(DOCS / "generate_cli.py"))
    assert (DOCS / "cli.md").read_text() == generator["reference"](app), "docs/cli.md is out of date: run `make docs`"
