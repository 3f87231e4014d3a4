"""Which plots a page has: a card for each that the results have data for, with a panel for each temperature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from headstart.bench.html import plots
from headstart.bench.html.series import Series
from headstart.bench.html.svg import HUES, PARTS, VARIABLES, to_svg
from headstart.bench.html.values import interval, number
from headstart.bench.runner import PLAIN

Rows = Sequence[Mapping[str, Any]]
Looks = Mapping[str, Series]


@dataclass(frozen=True)
class Panel:
    """One plot of a card.

    svg: its element.
    height: in CSS pixels, where it is `svg.WIDTH` wide.
    caption: what distinguishes it from the other plots of the card, or empty.
    """

    svg: Markup
    height: float
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """Plots that belong together.

    name: for links.
    title: what is seen.
    text: how to read it, in one or two sentences.
    panels: at least one.
    legend: the runs whose names are not in the plots themselves.
    parts: names and CSS colors of what is no run.
    """

    name: str
    title: str
    text: str
    panels: Sequence[Panel]
    legend: Sequence[Series] = ()
    parts: Sequence[tuple[str, str]] = ()

    @property
    def height(self) -> float:
        """Roughly, in CSS pixels."""
        return 130 + 7 * len(self.legend) + sum(panel.height + 40 * bool(panel.caption) for panel in self.panels)


def all_cards(result: Mapping[str, Any], looks: Looks) -> list[Card]:
    """Every plot that there is data for, in the order of the page."""
    cards = (
        _speed_ups, _acceptance, _lengths, _times, _reliability, _reliability_by_drafter, _throughput, _latency, _cost, _training
    )  # fmt: skip
    return [card for make in cards if (card := make(result, looks)) is not None]


def in_columns(cards: Sequence[Card]) -> list[list[tuple[int, Card]]]:
    """The cards with their numbers, in two columns of about the same height; the first card is in the first column."""
    numbered, half = [*enumerate(cards)], sum(card.height for card in cards) / 2
    rest = (chosen for count in range(len(cards)) for chosen in combinations(numbered[1:], count))
    sides = [(*numbered[:1], *chosen) for chosen in rest]
    left = min(sides, key=lambda side: abs(half - sum(card.height for _, card in side)), default=())
    return [column for column in ([*left], [pair for pair in numbered if pair not in left]) if column]


# -- by temperature ----------------------------------------------------------------------------------------------------------


def _panels(name: str, rows: Rows, draw: Callable[[Rows], Figure | None]) -> list[Panel]:
    """A panel for each temperature that there is something to draw for."""
    temperatures = list(dict.fromkeys(row.get("temperature") for row in rows))
    panels = []
    for index, temperature in enumerate(temperatures):
        figure = draw([row for row in rows if row.get("temperature") == temperature])
        if figure is not None:
            panels.append(_panel(figure, f"{name}-{index}", f"temperature {temperature:g}" if len(temperatures) > 1 else ""))
    return panels


def _panel(figure: Figure, name: str, caption: str = "") -> Panel:
    return Panel(Markup(to_svg(figure, name)), 72 * figure.get_figheight(), caption)  # matplotlib escapes every text


def _legend(looks: Looks, rows: Iterable[Mapping[str, Any]]) -> list[Series]:
    """The series of the runs of these rows, in the order of the results."""
    shown = {row["run"] for row in rows}
    return [look for run, look in looks.items() if run in shown]


def _drafted(result: Mapping[str, Any]) -> Rows:
    return [row for row in result["runs"] if row["run"] != PLAIN]


def _speed_ups(result: Mapping[str, Any], looks: Looks) -> Card | None:
    rows = _drafted(result)
    sets = list(dict.fromkeys(kind for row in rows for kind in row.get("kinds") or ()))
    is_grouped = len(sets) > 1
    ends = plots.limits(_dots(rows, sets, looks))
    panels = _panels("speed-up", rows, lambda some: plots.speed_ups(dots, ends) if (dots := _dots(some, sets, looks)) else None)
    text = "Tokens per second of a run over those of plain decoding, on the same prompts. Right of the dashed line is faster."
    if any(interval(values) for row in rows for values in (row, *(row.get("kinds") or {}).values())):
        text += " The bar is the 95 % confidence interval over prompts."
    title, legend = ("Speed-up by prompt set", _legend(looks, rows)) if is_grouped else ("Speed-up", [])
    return Card("speed-up", title, text, panels, legend) if panels else None


def _dots(rows: Rows, sets: Sequence[str], looks: Looks) -> list[plots.Dot]:
    """A dot per row and prompt set, or per row where there are no several sets."""
    by_set = [(row, kind, (row.get("kinds") or {}).get(kind) or {}) for kind in sets for row in rows]
    known = by_set if len(sets) > 1 else [(row, None, row) for row in rows]
    return [
        plots.Dot(looks[row["run"]], value, interval(numbers), kind)
        for row, kind, numbers in known
        if (value := number(numbers, "speed_up")) is not None
    ]


def _acceptance(result: Mapping[str, Any], looks: Looks) -> Card | None:
    rows = [row for row in _drafted(result) if row.get("acceptance")]

    def draw(some: Rows) -> Figure:
        return plots.acceptance({looks[row["run"]]: row["acceptance"][: plots.MAX_LENGTH] for row in some})

    panels = _panels("acceptance", rows, draw)
    text = "How often a draft at this depth is accepted, where the draft before it was."
    return Card("acceptance", "Acceptance rate by depth", text, panels, _legend(looks, rows)) if panels else None


def _lengths(result: Mapping[str, Any], looks: Looks) -> Card | None:
    rows = [row for row in _drafted(result) if sum(row.get("lengths") or ())]
    panels = _panels(
        "lengths",
        rows,
        lambda some: plots.lengths([(looks[row["run"]], row["lengths"], number(row, "tau")) for row in some]),
    )
    text = "How many tokens one forward of the target gives, as shares of all forwards. The mean is tau, the acceptance length."
    return Card("lengths", "Acceptance lengths", text, panels) if panels else None


def _times(result: Mapping[str, Any], looks: Looks) -> Card | None:
    rows = [row for row in result["runs"] if sum((row.get("shares") or {}).values()) and number(row, "decode_speed_up")]
    hues = ", ".join(f"var({VARIABLES[color]})" for color in HUES[:4])
    parts = [
        ("forward of the target", f"var({VARIABLES[PARTS[0]]})"),
        ("drafting, in the color of the run", f"linear-gradient(90deg, {hues})"),
        ("verification and the rest", f"var({VARIABLES[PARTS[1]]})"),
    ]

    def draw(some: Rows) -> Figure:
        bars = [(row, 1 / row["decode_speed_up"], row["shares"]) for row in some]
        return plots.times([plots.Bar(looks[row["run"]], time, shares["score"], shares["draft"]) for row, time, shares in bars])

    text = (
        "Time per token after the first one, relative to plain decoding, and what it is spent on. "
        "A drafter pays where its bar ends left of the dashed line."
    )
    panels = _panels("times", rows, draw)
    return Card("times", "Where the time goes", text, panels, parts=parts) if panels else None


_FEWEST = 8  # drafts of a bin that is drawn


def _reliability(result: Mapping[str, Any], looks: Looks) -> Card | None:
    rows = [row for row in result.get("reliability") or () if row["drafter"] in ("all", _only_drafter(result, row))]

    def draw(some: Rows) -> Figure | None:
        lines = {looks[row["run"]]: _bins(row) for row in some if _bins(row)}
        return plots.reliability(lines) if lines else None

    text = (
        "How often drafts of a predicted chance were kept, where their parents were. On the dashed line chances are true. "
        "The error beside each name, by temperature, is the mean distance from it over all drafts (expected calibration error). "
        f"Points of fewer than {_FEWEST} drafts are left out."
    )
    legend = [_with_errors(look, [row for row in rows if row["run"] == look.run]) for look in _legend(looks, rows)]
    panels = _panels("reliability", rows, draw)
    return Card("reliability", "Reliability of the predicted chances", text, panels, legend) if panels else None


def _only_drafter(result: Mapping[str, Any], row: Mapping[str, Any]) -> str | None:
    """The drafter of a run that is not joined."""
    names = {other["drafter"] for other in result["reliability"] if other["run"] == row["run"]}
    return None if "all" in names else str(row["drafter"])


def _with_errors(look: Series, rows: Rows) -> Series:
    """The series with the errors of its chances beside its name, by temperature."""
    errors = [f"{error:.3f}" for row in rows if (error := number(row, "error")) is not None]
    return replace(look, label=f"{look.label}: {', '.join(errors)}") if errors else look


def _reliability_by_drafter(result: Mapping[str, Any], looks: Looks) -> Card | None:
    """The same for each drafter of those that are joined."""
    joined = {row["run"] for row in result.get("reliability") or () if row["drafter"] == "all"}
    rows = [row for row in result.get("reliability") or () if row["run"] in joined and row["drafter"] != "all" and _bins(row)]
    names = list(dict.fromkeys(row["drafter"] for row in rows))
    own = {
        name: Series(name, name, len(looks) + index, HUES[index % len(HUES)], "so"[index % 2]) for index, name in enumerate(names)
    }
    panels = []
    for index, key in enumerate(dict.fromkeys((row["run"], row.get("temperature")) for row in rows)):
        some = [row for row in rows if (row["run"], row.get("temperature")) == key]
        figure = plots.reliability({own[row["drafter"]]: _bins(row) for row in some})
        errors = ", ".join(_with_errors(own[row["drafter"]], [row]).label for row in some)
        panels.append(
            _panel(figure, f"reliability-by-drafter-{index}", f"{looks[key[0]].label} at temperature {key[1]:g}: {errors}")
        )
    text = "The same for each drafter of those that draft into one tree. A draft that several proposed counts for the surest."
    return Card("reliability-by-drafter", "Reliability by drafter", text, panels, [*own.values()]) if panels else None


def _bins(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    return [(one["chance"], one["kept"]) for one in row.get("bins") or () if one["count"] >= _FEWEST]


# -- by rows, nodes and tokens ---------------------------------------------------------------------------------------------


def _throughput(result: Mapping[str, Any], looks: Looks) -> Card | None:
    text = "Tokens per second of all rows together, where more rows are decoded at once."
    return _by_rows(result, looks, ("throughput", "Throughput by concurrency", text, "tokens per second"), ("tokens_per_second",))


def _latency(result: Mapping[str, Any], looks: Looks) -> Card | None:
    text = "The time that 99 of 100 tokens take at most. It says how evenly a row's text appears."
    names = ("latency", "P99 time per token by concurrency", text, "P99 per token (ms)")
    return _by_rows(result, looks, names, ("token_ms", "p99"))


def _by_rows(result: Mapping[str, Any], looks: Looks, names: tuple[str, str, str, str], field: tuple[str, ...]) -> Card | None:
    name, title, text, unit = names
    known = [row for row in result.get("concurrency") or () if number(row, *field) is not None and number(row, "rows")]

    def draw(some: Rows) -> Figure:
        points: dict[Series, list[tuple[float, float]]] = {}
        for row in sorted(some, key=lambda row: row["rows"]):
            points.setdefault(looks[row["run"]], []).append((row["rows"], number(row, *field) or 0.0))
        return plots.by_rows(points, unit)

    panels = _panels(name, known, draw)
    return Card(name, title, text, panels, _legend(looks, known)) if panels else None


def _cost(result: Mapping[str, Any], looks: Looks) -> Card | None:
    measured = result.get("cost") or {}
    curve = [pair for pair in zip(measured.get("nodes") or (), measured.get("ms") or (), strict=False) if pair[0] > 0]
    if not curve:
        return None
    known = [point for point in measured.get("operating_points") or () if number(point, "nodes") and number(point, "ms")]
    points = [(point["nodes"], point["ms"], looks[point["run"]]) for point in known]
    text = "Time of one forward of the target by the number of nodes that it scores."
    if points:
        text += " The markers on and above the line are what each run chose, on average."
    panels = [_panel(plots.cost(curve, points), "cost")]
    return Card("cost", "What a forward costs", text, panels, _legend(looks, known))


def _training(result: Mapping[str, Any], looks: Looks) -> Card | None:
    curves = []
    for heads in result.get("heads") or ():
        curve, look = heads.get("curve") or (), of_heads(heads, looks)
        training, held_out = _points(curve, "tau"), _points(curve, "held_out_tau")
        if look is not None and len(training) + len(held_out) > 1:
            curves.append(plots.Curve(look, training, held_out))
    if not curves:
        return None
    text = (
        "Tokens per forward that a chain of each heads' best drafts would give, over their training: "
        "thin lines on the training texts, markers on held-out texts."
    )
    panels = [_panel(plots.training(curves), "training")]
    return Card("training", "Acceptance length over training", text, panels, [curve.series for curve in curves])


def _points(curve: Rows, name: str) -> list[tuple[float, float]]:
    pairs = [(number(point, "tokens"), number(point, name)) for point in curve]
    return [(tokens, tau) for tokens, tau in pairs if tokens is not None and tau is not None]


def of_heads(heads: Mapping[str, Any], looks: Looks) -> Series | None:
    """The series of the first run that used these heads, or None. heads: an entry of the results' `heads`."""
    folder = str(heads.get("folder", ""))
    names = {folder, Path(folder).name}
    return next((look for run, look in looks.items() if run.partition("@")[0].rstrip("/") in names), None)
