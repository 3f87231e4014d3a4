"""The results of a benchmark as one HTML page that needs no network: a table, plots, and what the numbers depend on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def check_html(path: Path) -> None:
    """Before anything is measured. Raises ValueError where the page cannot be drawn, or `path` is no file that can be written."""
    _environment()
    parent = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"--html {path} is a folder; name a file to write the page to")
    if not parent.is_dir():
        raise ValueError(f"--html {path} is in {path.parent}, which is no folder; name a file in a folder that exists")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise ValueError(f"--html {path} may not be written by this user; name a file in a folder of your own")


def write_html(path: Path, result: dict[str, Any]) -> None:
    """Write the page.

    path: of the file.
    result: as `headstart bench --json` prints it; a plot or a column whose numbers are missing is left out.
    Raises ValueError where matplotlib or jinja2 is missing, or the file cannot be written.
    """
    page = html_page(result)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--html {path} cannot be written: {error.strerror}; name a file that can") from None


def html_page(result: dict[str, Any]) -> str:
    """The text of the page. Raises ValueError where matplotlib or jinja2 is missing."""
    environment = _environment()
    from headstart.bench.html import run_table, sentences
    from headstart.bench.html.cards import all_cards, in_columns
    from headstart.bench.html.series import all_series
    from headstart.bench.html.svg import drawing

    looks = all_series(result)
    with drawing():
        columns = in_columns(all_cards(result, looks))
    return environment.get_template("page.html.jinja").render(
        result=result,
        looks=looks,
        columns=columns,
        table=run_table.run_table(result, looks),
        table_by_set=run_table.table_by_set(result, looks),
        heads=run_table.heads_rows(result),
        heads_columns=run_table.HEADS_COLUMNS,
        sentences=sentences,
    )


def _environment() -> Environment:
    """The templates of the page, which escape everything that is put into them."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--html needs {error.name}, which is not installed; pip install 'headstart[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("html")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["zip"] = zip
    return environment
