"""The plots of one temperature each. They take numbers and series, and know nothing of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import log2
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from headstart.bench.html.series import Series
from headstart.bench.html.svg import INK, MUTED, PAPER, PARTS, new_figure, only_lines_across, only_lines_up
from headstart.bench.html.values import factor, percent

MAX_LENGTH = 12  # of the histograms; longer ones are counted in the last bar
LABEL = 12  # size of names, in pixels


# -- one dot per run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """A ratio with its interval. group: the prompt set, or None where there is only one."""

    series: Series
    value: float
    ends: tuple[float, float] | None = None
    group: str | None = None


def limits(dots: Sequence[Dot]) -> tuple[float, float]:
    """The ends of an axis that shows these dots with their intervals, and 1."""
    ends = [end for dot in dots for end in (dot.value, *(dot.ends or ()))]
    low, high = min([*ends, 1.0]), max([*ends, 1.0])
    room = 0.06 * (high - low or 1.0)
    return low - room, high + room


def speed_ups(dots: Sequence[Dot], ends: tuple[float, float]) -> Figure:
    """Dots with intervals, from top to bottom: under the name of their prompt set, or each under the name of its run.

    ends: of the horizontal axis.
    """
    headings, heights, bottom = _rows(dots)
    is_alone = all(dot.group is None for dot in dots)
    figure, axes = new_figure(bottom + 52)
    axes = axes[0, 0]
    only_lines_up(axes)
    for text, y in headings:
        _heading(axes, text, y, "normal" if is_alone else "bold")
    for dot, y in zip(dots, heights, strict=True):
        _dot(axes, dot, y)
    axes.axvline(1.0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set(xlim=ends, ylim=(bottom, 0), xlabel="speed-up over plain decoding (×)")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return figure


def _rows(dots: Sequence[Dot]) -> tuple[list[tuple[str, float]], list[float], float]:
    """The headings with their heights, the height of each dot, and the bottom, in pixels from the top."""
    headings: list[tuple[str, float]] = []
    heights: list[float] = []
    y, group = 0.0, None
    for dot in dots:
        if dot.group is None or dot.group != group:
            y += 16 if heights else 6
            headings.append((dot.group or dot.series.label, y + 4))
            y += 5 if dot.group is None else 6
            group = dot.group
        y += 16
        heights.append(y)
    return headings, heights, y + 12


def _dot(axes: Axes, dot: Dot, y: float) -> None:
    look = dot.series
    if dot.ends is not None:
        axes.plot(dot.ends, (y, y), color=look.color, linewidth=2.4, solid_capstyle="round", alpha=0.55, gid=look.css_class)
    look.plot(axes, [dot.value], [y], linestyle="none", markersize=7.5)
    axes.text(
        1.02, y, factor(dot.value), transform=axes.get_yaxis_transform(), va="center", fontsize=LABEL, color=INK, gid=look.css_class
    )


def _heading(axes: Axes, text: str, y: float, weight: str) -> None:
    """A name at the left, over the grid. y: from the top, in pixels."""
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "in_layout": False}
    ground = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
    axes.text(0, y, _cut(text, 52), fontsize=LABEL, color=INK, fontweight=weight, bbox=ground, **place)


def _cut(name: str, longest: int) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


# -- bars --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """The time of a run relative to plain decoding's, and the shares of it that the target's forward and drafting take."""

    series: Series
    time: float
    forward: float
    draft: float


def times(bars: Sequence[Bar]) -> Figure:
    """One bar per run under its name: the target's forward, drafting in the color of the run, and the rest."""
    figure, axes = new_figure(38 * len(bars) + 54)
    axes = axes[0, 0]
    only_lines_up(axes)
    for index, bar in enumerate(bars):
        y, left = 38 * index + 8, 0.0
        _heading(axes, bar.series.label, y, "normal")
        rest = max(0.0, 1 - bar.forward - bar.draft)
        for share, color in ((bar.forward, PARTS[0]), (bar.draft, bar.series.color), (rest, PARTS[1])):
            width = share * bar.time
            axes.barh(y + 16, width, height=12, left=left, color=color, gid=bar.series.css_class)
            left += width
    axes.axvline(1.0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set(xlim=(0, 1.04 * max(1.0, *(bar.time for bar in bars))), ylim=(38 * len(bars), 0))
    axes.set_xlabel("time per token, plain decoding = 1")
    return figure


def lengths(counts: Sequence[tuple[Series, Sequence[float], float | None]]) -> Figure:
    """A histogram for each run: of the tokens per forward, as a share of the forwards, with the mean where it is known."""
    rows = (len(counts) + 1) // 2
    figure, axes = new_figure(118 * rows + 32, rows, 2, sharex=True, sharey=True)
    longest = min(MAX_LENGTH, max(len(numbers) for _, numbers, _ in counts))
    for axis, (look, numbers, mean) in zip(axes.flat, counts, strict=False):
        shares = _shares(numbers, longest)
        face = PAPER if look.is_peer else look.color
        for length, share in enumerate(shares, 1):
            axis.bar(length, share, width=0.78, color=face, edgecolor=look.color, linewidth=1.0, gid=look.css_class)
        axis.set_title(_cut(look.label, 25), fontsize=LABEL, loc="left", color=INK, pad=4)
        if mean is not None:
            axis.text(1, 0.97, f"mean {mean:.2f}", transform=axis.transAxes, ha="right", va="top", fontsize=LABEL, color=MUTED)
        only_lines_across(axis)
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(counts) :]:
        axis.set_visible(False)
    axes[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda share, _: percent(share)))
    axes[0, 0].yaxis.set_major_locator(MaxNLocator(3))
    _length_ticks(axes[0, 0], longest, any(len(numbers) > longest for _, numbers, _ in counts))
    figure.supxlabel("tokens per forward of the target", fontsize=13, color=MUTED)
    return figure


def _shares(numbers: Sequence[float], longest: int) -> list[float]:
    total = sum(numbers) or 1.0
    kept = [*numbers[: longest - 1], sum(numbers[longest - 1 :])]
    return [number / total for number in kept]


def _length_ticks(axis: Axes, longest: int, is_cut: bool) -> None:
    step = 1 if longest <= 6 else 2
    ticks = range(longest, 0, -step) if is_cut else range(1, longest + 1, step)
    axis.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}+" if is_cut and x == longest else f"{x:.0f}"))


# -- lines -------------------------------------------------------------------------------------------------------------------


Points = Sequence[tuple[float, float]]


def acceptance(lines: Mapping[Series, Sequence[float]]) -> Figure:
    """The acceptance rate by depth, from depth 1, one line per run."""
    figure, axes = _lines({look: [*enumerate(shares, 1)] for look, shares in lines.items()}, 300)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: percent(share)))
    axes.set(ylim=(0, 1.02), xlabel="depth of the draft", ylabel="acceptance rate")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    return figure


def reliability(lines: Mapping[Series, Points]) -> Figure:
    """The share of drafts that was kept by the chance that they were given, one line per run, and the diagonal of true chances."""
    figure, axes = new_figure(320)
    axes = axes[0, 0]
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for look, points in lines.items():
        look.plot(axes, [x for x, _ in points], [y for _, y in points])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda share, _: percent(share)))
        axis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="predicted chance", ylabel="share that was kept")
    return figure


def cost(curve: Points, points: Sequence[tuple[float, float, Series]]) -> Figure:
    """The time of a forward by its number of nodes.

    points: nodes and time of each run's forwards. Those that would hide each other are drawn above each other.
    """
    figure, axes = new_figure(300)
    axes = axes[0, 0]
    only_lines_across(axes)
    axes.plot(*zip(*curve, strict=True), color=MUTED, marker="o", markersize=4)
    _doubling(axes, [x for x, _ in curve] + [x for x, _, _ in points])
    for (x, y, look), level in zip(points, _levels([log2(x) for x, _, _ in points], axes), strict=True):
        above = ScaledTranslation(0, 13 * level / 72, figure.dpi_scale_trans)
        look.plot(axes, [x], [y], transform=axes.transData + above, linestyle="none", markersize=9, zorder=3)
    axes.set(xlabel="nodes in one forward", ylabel="time of the forward (ms)")
    axes.set_ylim(bottom=0)
    return figure


def _levels(places: Sequence[float], axes: Axes) -> list[int]:
    """For each point, how many points it has to be lifted over. places: logarithms of the horizontal coordinates."""
    low, high = axes.get_xlim()
    apart = 0.035 * (log2(high) - log2(low))
    levels: list[int] = []
    for index, place in enumerate(places):
        taken = {level for other, level in zip(places[:index], levels, strict=True) if abs(place - other) < apart}
        levels.append(next(level for level in count() if level not in taken))
    return levels


def by_rows(lines: Mapping[Series, Points], unit: str) -> Figure:
    """A quantity by the number of rows that are decoded together, one line per run. unit: what it is and its unit."""
    figure, axes = _lines(lines, 280)
    _doubling(axes, [x for points in lines.values() for x, _ in points])
    axes.set(xlabel="rows decoded together", ylabel=unit)
    axes.set_ylim(bottom=0)
    return figure


@dataclass(frozen=True)
class Curve:
    """The acceptance length over a training: on training texts by tokens, and on held-out texts."""

    series: Series
    training: Points
    held_out: Points


def training(curves: Sequence[Curve]) -> Figure:
    """Thin lines: on the training texts; markers: on held-out texts."""
    figure, axes = _lines({curve.series: curve.held_out for curve in curves if curve.held_out}, 300)
    for curve in curves:
        if curve.training:
            x, y = zip(*curve.training, strict=True)
            axes.plot(x, y, color=curve.series.color, linewidth=1.1, alpha=0.65, gid=curve.series.css_class)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _thousands(tokens)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set(xlabel="training tokens", ylabel="acceptance length (tokens)")
    axes.set_ylim(bottom=1.0)
    return figure


def _lines(lines: Mapping[Series, Points], height: float) -> tuple[Figure, Axes]:
    figure, axes = new_figure(height)
    axes = axes[0, 0]
    only_lines_across(axes)
    for look, points in lines.items():
        look.plot(axes, [x for x, _ in points], [y for _, y in points])
    return figure, axes


def _doubling(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic horizontal axis with a tick at every power of two, or every second one."""
    low, high = min(values), max(values)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.15, high * 1.15)
    powers = [2**power for power in range(0, 24) if low <= 2**power <= high] or [low]
    axes.xaxis.set_major_locator(FixedLocator(powers if len(powers) < 8 else powers[::2]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _thousands(tokens: float) -> str:
    if tokens >= 1e6:
        return f"{tokens / 1e6:g} M"
    return f"{tokens / 1e3:g} k" if tokens >= 1e3 else f"{tokens:g}"
