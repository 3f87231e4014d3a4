"""Figures as SVG that serves a light and a dark page: colours are CSS variables of the page, text stays text.

Every plot is drawn with a stand-in color for each role, which `to_svg` replaces by the role's CSS variable.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 440  # of every plot, in CSS pixels
NUM_HUES = 8
NUM_PARTS = 2

# Stand-ins: #0aRRNN, where RR is the kind of role and NN its number.
INK, MUTED, GRID, PAPER = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
HUES = tuple(f"#0a01{index:02x}" for index in range(NUM_HUES))
PARTS = tuple(f"#0a02{index:02x}" for index in range(NUM_PARTS))
VARIABLES = {
    **{INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card"},
    **{color: f"--hue-{index}" for index, color in enumerate(HUES)},
    **{color: f"--part-{index}" for index, color in enumerate(PARTS)},
}

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text can be selected and takes the page's font
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": ["DejaVu Sans"],  # for the layout; wider than the fonts of most pages
    "font.size": 13,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 13,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "axes.unicode_minus": True,
}


@contextmanager
def drawing() -> Iterator[None]:
    """A context in which figures have the report's look; the settings of other figures do not change."""
    settings: Any = {**matplotlib.rcParamsDefault} | SETTINGS
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page's fonts have it
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        yield


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of the usual width, and an array of its axes, [rows, columns]. height: in CSS pixels."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    figure.get_layout_engine().set(w_pad=2 / 72, h_pad=2 / 72, wspace=0.04, hspace=0.08)  # type: ignore[union-attr, call-arg]
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def only_lines_across(axes: Axes) -> None:
    """Leave the horizontal grid lines and the horizontal axis."""
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def only_lines_up(axes: Axes) -> None:
    """Leave the vertical grid lines and the horizontal axis, without ticks at the side."""
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])


def to_svg(figure: Figure, name: str) -> str:
    """An `<svg>` element. name: differs between the figures of a page, so that their ids do.

    A group whose id is `series-N` gets the classes `series` and `series-N` instead.
    """
    buffer = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", text, count=1)
    text = re.sub(r'<g id="(series-\d+)"', r'<g class="series \1"', text)
    text = re.sub(r'<g id="\w+_\d+"', "<g", text)  # matplotlib's own numbers, the same in every figure
    text = text.replace("'DejaVu Sans'", "var(--font)")
    return re.sub("#0a[0-9a-f]{4}", lambda match: f"var({VARIABLES[match[0]]})", text)
