"""What commands show while they measure: tables on standard output, a progress bar on standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def console() -> Any:
    """For tables on standard output: wide where that is a file or a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal; call what it gives after each of `total` steps."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        bar = shown.add_task("measuring", total=total)
        yield lambda: shown.advance(bar)
