"""How each run looks: one color and one marker, the same in every plot, in the table and in the legends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from headstart.bench.html.svg import HUES, INK, NUM_HUES, PAPER, VARIABLES
from headstart.bench.report import short
from headstart.bench.runner import PLAIN

# matplotlib's markers, and the same shapes as paths in a box of 12 by 12.
MARKERS = {
    "o": "M6 1.5a4.5 4.5 0 1 0 0 9a4.5 4.5 0 1 0 0-9z",
    "s": "M2 2h8v8H2z",
    "D": "M6 .8L11.2 6 6 11.2 .8 6z",
    "^": "M6 1.2l5 9.2H1z",
    "v": "M6 10.8l-5-9.2h10z",
    "P": "M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z",
    "p": "M6 .8l5.2 3.8-2 6.1H2.8l-2-6.1z",
    "X": "M3.4 1L6 3.6 8.6 1 11 3.4 8.4 6 11 8.6 8.6 11 6 8.4 3.4 11 1 8.6 3.6 6 1 3.4z",
}


@dataclass(frozen=True)
class Series:
    """The look of one run.

    run: its name in the results.
    label: the name that is shown.
    number: counts the runs from 0; plain decoding is one of them.
    color: stand-in for a role, see `headstart.bench.html.svg`.
    marker: one of `MARKERS`.
    is_peer: another library's; drawn with hollow markers.
    is_dashed: its color is that of an earlier run, too.
    """

    run: str
    label: str
    number: int
    color: str
    marker: str
    is_peer: bool = False
    is_dashed: bool = False

    @property
    def css_class(self) -> str:
        """The class of everything that shows this run."""
        return f"series-{self.number}"

    @property
    def css_color(self) -> str:
        """Its color as a value of CSS."""
        return f"var({VARIABLES[self.color]})"

    @property
    def path(self) -> str:
        """Its marker as the path of an SVG of 12 by 12."""
        return MARKERS[self.marker]

    def plot(self, axes: Axes, x: Sequence[float], y: Sequence[float], **options: Any) -> Line2D:
        """Draw a line with markers."""
        face = PAPER if self.is_peer else self.color
        look: dict[str, Any] = {"color": self.color, "marker": self.marker, "markerfacecolor": face, "clip_on": False}
        look |= {"linestyle": (0, (5, 2)) if self.is_dashed else "-", "markeredgewidth": 1.4 if self.is_peer else 0}
        return axes.plot(x, y, gid=self.css_class, **(look | options))[0]


def all_series(result: Mapping[str, Any]) -> dict[str, Series]:
    """The look of every run that the results name, by its name; plain decoding first."""
    runs = {row["run"]: bool(row.get("is_peer")) for row in result["runs"]}
    others = [*(result.get("concurrency") or ()), *((result.get("cost") or {}).get("operating_points") or ())]
    names = [PLAIN, *(name for name in {**runs, **{row["run"]: False for row in others}} if name != PLAIN)]
    shown = Counter(map(short, names))
    markers = [marker for marker in MARKERS if marker != "o"]
    series = {PLAIN: Series(PLAIN, PLAIN, 0, INK, "o")}
    for index, name in enumerate(names[1:]):
        label = short(name) if shown[short(name)] == 1 else name
        marker = markers[(index + index // NUM_HUES) % len(markers)]
        series[name] = Series(name, label, index + 1, HUES[index % NUM_HUES], marker, runs.get(name, False), index >= NUM_HUES)
    return series
