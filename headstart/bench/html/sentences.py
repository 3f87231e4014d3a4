"""What the page says in words: the title, what was measured, the finding, the labels, the conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.bench.html.series import Series
from headstart.bench.html.values import count, digits, factor, interval, number, percent, span
from headstart.bench.runner import PLAIN

LABELS = {
    "exact": "The target's numbers are equal to the bit, however many tokens it scores at once.",
    "replay": "The target runs at full cost, but the prompts' reference answers are emitted.",
    "padded": "The target is widened with zeros: the text of a small model at the cost of a large one.",
    "lossy": "The acceptance rule changes the distribution of the text: it is not the target's alone.",
    "peers": "Runs marked “peer” are another library's decoding, with the same weights and prompts.",
}
TERMS = (
    (
        "plain decoding",
        "one token per forward of the target, by the same engine in the same process; every run is compared with it",
    ),
    ("speed-up", "tokens per second of a run over those of plain decoding"),
    (
        "interval",
        "95 % confidence interval: where the speed-up would lie for other prompts of the same kind, found by resampling them",
    ),
    ("tau, acceptance length", "tokens that one forward of the target gives, on average"),
    ("acceptance rate by depth", "how often a draft is accepted, where the draft before it was; the first draft has depth 1"),
    ("verification cost", "time of a forward that scores all drafts over the time of a forward of plain decoding"),
    ("P50, P90, P99", "the time that 50, 90 or 99 of 100 tokens take at most"),
    ("near-tie", "two tokens are equally good up to rounding, so that the text may go on in either way"),
)


@dataclass(frozen=True)
class Tile:
    """A number that stands out. title: what it is. value: the number. note: what to compare it with."""

    title: str
    value: str
    note: str


def model_name(name: str) -> str:
    """The name of a model without the folders above it."""
    if Path(name).parts[-3:] == ("headstart", "embedded", "target"):
        return "the embedded model"
    return Path(name).name or name


def subtitle(result: Mapping[str, Any]) -> str:
    """What was measured, in one sentence."""
    settings, runs = result.get("settings") or {}, {row["run"] for row in result["runs"]}
    num_prompts, max_tokens, repeat = (number(settings, name) for name in ("num_prompts", "max_tokens", "repeat"))
    parts = [count(len(runs - {PLAIN}), "run") + " and plain decoding"]
    if num_prompts is not None:
        parts.append(f"on {count(num_prompts, 'prompt')}{_sources(settings)}")
    if max_tokens is not None:
        parts.append(f"with up to {count(max_tokens, 'token')} each")
    parts.append(f"at temperature {_list([f'{value:g}' for value in _temperatures(result)])}")
    return " ".join(parts) + (f", measured {count(repeat, 'time')}." if repeat is not None else ".")


def _sources(settings: Mapping[str, Any]) -> str:
    sources = settings.get("prompts") or ()
    return f" of {_list([Path(str(source)).name for source in sources])}" if sources else ""


def _temperatures(result: Mapping[str, Any]) -> list[float]:
    return list(dict.fromkeys(row["temperature"] for row in result["runs"]))


def _list(words: Sequence[str]) -> str:
    """Words with commas, and `and` before the last one."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def finding(result: Mapping[str, Any], looks: Mapping[str, Series]) -> str:
    """The outcome in one or two sentences."""
    best = _best(result)
    if best is None:
        return ""
    name, speed_up, ends = looks[best["run"]].label + _where(result, best), best["speed_up"], interval(best)
    if speed_up <= 1:
        return f"No run is faster than plain decoding; the closest is {name} with {factor(speed_up)}. {_advice(best)}"
    sentence = f"{name} is {factor(speed_up)} as fast as plain decoding"
    if ends is not None and ends[0] <= 1:
        return f"{sentence}, but its interval, {span(ends)}, contains 1: it takes more prompts to tell."
    rivals = [row for row in _drafted(result) if row["temperature"] == best["temperature"]]
    slower = sum(1 for row in rivals if (number(row, "speed_up") or 1) < 1)
    rest = f" {count(slower, 'run')} {'is' if slower == 1 else 'are'} slower than plain decoding." if slower else ""
    return f"{sentence}{f' (interval {span(ends)})' if ends else ''}.{rest}"


def _advice(row: Mapping[str, Any]) -> str:
    """Why a run is slow."""
    draft, forward, tau = number(row, "shares", "draft") or 0, number(row, "forward") or 1, number(row, "tau")
    if draft > 0.3:
        return f"Drafting takes {percent(draft)} of its time: fewer drafts or a smaller drafter would help."
    if tau is not None and tau < 1.5:
        return f"A forward gives {tau:.2f} tokens: heads that are trained for this model, or text that repeats more, would help."
    return f"A forward costs {factor(forward)} of plain decoding's: fewer nodes would help."


def _drafted(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in result["runs"] if row["run"] != PLAIN and not row.get("is_peer")]


def _best(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row with the highest speed-up that is neither plain decoding nor a peer."""
    known = [row for row in _drafted(result) if number(row, "speed_up") is not None]
    return max(known, key=lambda row: float(row["speed_up"]), default=None)


def _where(result: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """At which temperature, where there are several."""
    return f" at temperature {row['temperature']:g}" if len(_temperatures(result)) > 1 else ""


def tiles(result: Mapping[str, Any], looks: Mapping[str, Series]) -> list[Tile]:
    """The numbers of the fastest run beside those of plain decoding."""
    best = _best(result)
    if best is None:
        return []
    plain: Mapping[str, Any] = next(
        (row for row in result["runs"] if row["run"] == PLAIN and row["temperature"] == best["temperature"]), {}
    )
    known = [Tile("speed-up", factor(best["speed_up"]), looks[best["run"]].label + _where(result, best))]
    pairs = (
        ("tokens per second", number(best, "tokens_per_second"), number(plain, "tokens_per_second"), ""),
        ("tokens per forward", number(best, "tau"), number(plain, "tau"), ""),
        ("P99 per token", number(best, "token_ms", "p99"), number(plain, "token_ms", "p99"), " ms"),
    )
    for title, value, reference, unit in pairs:
        if value is not None:
            note = "" if reference is None else f"plain decoding: {digits(reference)}{unit}"
            known.append(Tile(title, f"{digits(value)}{unit}", note))
    return known


def labels(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The labels with what they mean."""
    names = [str(label) for label in result.get("labels") or ()]
    if any(row.get("is_lossy") for row in result["runs"]):
        names.append("lossy")
    if any(row.get("is_peer") for row in result["runs"]):
        names.append("peers")
    return [(name, LABELS.get(name, "")) for name in dict.fromkeys(names)]


def conditions(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything that the numbers depend on: titles, each with names and values."""
    known = [("model", result.get("model")), ("machine", result.get("machine")), ("settings", result.get("settings"))]
    lists = [(title, [(_words(name), _value(value)) for name, value in (values or {}).items()]) for title, values in known]
    return [(title, [pair for pair in pairs if pair[1] and pair[0] != "command"]) for title, pairs in lists if pairs]


def _words(name: str) -> str:
    return name.replace("_", " ").replace("num ", "number of ")


def _value(value: object) -> str:
    """A setting in words; empty for one that is not set."""
    if value is None or value in ([], {}, ()):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return _list([_value(one) for one in value]) if isinstance(value, list | tuple) else str(value)


def cleanness(result: Mapping[str, Any]) -> str:
    """How disturbed the measurements were, in one sentence."""
    share, samples = number(result, "clean_share"), number(result, "num_samples")
    if share is None:
        return "How long samples waited for a processor is unknown on this system."
    among = f" {count(samples, 'sample')}" if samples is not None else " the samples"
    return (
        f"{percent(share)} of{among} waited at most 2 % of their time for a processor; medians are of these where there are some."
    )
