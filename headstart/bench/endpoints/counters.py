"""What an engine publishes about its speculation: the counters of vLLM and SGLang at /metrics, and their differences.

vLLM counts the drafts behind the end of an answer too, so its acceptance length is a little larger than tokens per forward.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from urllib.request import Request, urlopen

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_POSITION = re.compile(r'\bposition="(\d+)"')
_TIMEOUT = 10.0  # seconds
_SETTLED, _PATIENCE = 0.1, 3.0  # seconds between two readings that must agree, and before giving up

VLLM, SGLANG = "vllm:", "sglang:"
_GENERATED = "generation_tokens_total"
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"

Counters = Mapping[str, float]  # by name, summed over labels; `NAME/3` is the one of position 3


@dataclass(frozen=True)
class Speculation:
    """Speculation over a measurement, by the engine's own count.

    tau: acceptance length: tokens per target forward of a request.
    acceptance: acceptance rate by depth, of the forwards with drafts; empty where the engine does not publish it.
    source: where the figures are from, in words.
    """

    tau: float
    acceptance: tuple[float, ...]
    source: str


def read_counters(url: str, api_key: str | None = None) -> dict[str, float]:
    """What a server publishes; empty where it publishes nothing.

    url: of its endpoint, with or without /v1.
    """
    address = url.rstrip("/").removesuffix("/v1") + "/metrics"
    request = Request(address, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urlopen(request, timeout=_TIMEOUT) as answer:
            return parse_counters(answer.read().decode("utf-8", "replace"))
    except (OSError, HTTPException, ValueError):  # the figures are an extra: a server without them can be measured
        return {}


def settled_counters(url: str, api_key: str | None = None) -> dict[str, float]:
    """What a server publishes once it has counted all its answers: two readings in turn agree."""
    end, before = time.monotonic() + _PATIENCE, read_counters(url, api_key)
    while before and time.monotonic() < end:
        time.sleep(_SETTLED)
        after = read_counters(url, api_key)
        if _counts(after) == _counts(before):
            return after
        before = after
    return before


def _counts(counters: Counters) -> dict[str, float]:
    """Those of tokens and drafts; others change without requests."""
    return {name: value for name, value in counters.items() if _GENERATED in name or "spec_" in name}


def parse_counters(text: str) -> dict[str, float]:
    """The values of a page in Prometheus' format, summed over labels; those by position one by one."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        name, position = match[1], _POSITION.search(match[2] or "")
        name = f"{name}/{position[1]}" if position else name
        try:
            values[name] = values.get(name, 0.0) + float(match[3])
        except ValueError:
            continue
    return values


def generated(before: Counters, after: Counters) -> int | None:
    """How many tokens the server has generated between two readings, for anybody; None where it does not say."""
    for prefix in (VLLM, SGLANG):
        if (name := prefix + _GENERATED) in after:
            return round(after[name] - before.get(name, 0.0))
    return None


def speculation_between(before: Counters, after: Counters) -> Speculation | None:
    """The speculation between two readings; None where the server publishes none or did not speculate."""
    more = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return _of_vllm(more) or _of_sglang(more, after)


def _of_vllm(more: Counters) -> Speculation | None:
    drafts = more.get("vllm:spec_decode_num_drafts_total", 0.0)
    if drafts <= 0:
        return None
    kept = more.get("vllm:spec_decode_num_accepted_tokens_total", 0.0)
    positions = sorted(int(name.rpartition("/")[2]) for name in more if name.startswith(_PER_POSITION + "/"))
    acceptance = tuple(more[f"{_PER_POSITION}/{position}"] / drafts for position in positions)
    return Speculation(1 + kept / drafts, acceptance, "vLLM's counters at /metrics")


def _of_sglang(more: Counters, after: Counters) -> Speculation | None:
    forwards = more.get("sglang:spec_verify_calls_total", 0.0)
    if forwards > 0:
        return Speculation(more.get(SGLANG + _GENERATED, 0.0) / forwards, (), "SGLang's counters at /metrics")
    length = after.get("sglang:spec_accept_length", 0.0)
    return Speculation(length, (), "SGLang's gauge of its last rounds at /metrics") if length > 0 else None


def of_histograms(histograms: Iterable[Iterable[int]]) -> Speculation | None:
    """The speculation of requests that report it one by one.

    histograms: of each request, how many forwards kept 0 drafts, 1 draft, and so on.
    """
    rounds: list[int] = []
    for histogram in histograms:
        for kept, count in enumerate(histogram):
            rounds += [0] * (kept + 1 - len(rounds))
            rounds[kept] += count
    total = sum(rounds)
    if not total:
        return None
    acceptance = tuple(sum(rounds[depth:]) / total for depth in range(1, len(rounds)))
    return Speculation(1 + sum(kept * count for kept, count in enumerate(rounds)) / total, acceptance, "the figures of each answer")
