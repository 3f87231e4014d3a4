"""Exports of heads: one file per engine, and the registry of them."""

from __future__ import annotations

from headstart.formats.exports.base import Exporter
from headstart.formats.exports.gguf import Gguf
from headstart.formats.exports.hf import HuggingFace
from headstart.formats.exports.sglang import Sglang
from headstart.formats.exports.speculators import Speculators
from headstart.formats.exports.tgi import Tgi
from headstart.formats.exports.vllm import Vllm

EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter for exporter in (Vllm(), Speculators(), Sglang(), Tgi(), Gguf(), HuggingFace())
}


def exporter_for(engine: str, method: str) -> Exporter:
    """The exporter of an engine. Raises ValueError for an engine that is unknown or does not take the method."""
    if engine not in EXPORTERS:
        raise ValueError(f"--to is {engine!r}; heads can be exported to {', '.join(EXPORTERS)}")
    exporter = EXPORTERS[engine]
    if method in exporter.methods:
        return exporter
    if method in exporter.instead:
        raise ValueError(exporter.instead[method])
    others = [name for name, other in EXPORTERS.items() if method in other.methods]
    way = (
        f"export them with --to {' or --to '.join(others)}"
        if others
        else "no engine that heads can be exported to does; headstart itself runs them"
    )
    raise ValueError(f"{engine} does not run {method} heads; {way}")
