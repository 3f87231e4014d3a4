"""Heads on disk: the native format, and what others publish."""

from headstart.formats.detect import Recognised, inside, modules_lost, published_in, recognise
from headstart.formats.native import describe, load, save, tell
from headstart.formats.target_info import TargetFacts, facts_of

__all__ = [
    "Recognised",
    "TargetFacts",
    "describe",
    "facts_of",
    "inside",
    "load",
    "modules_lost",
    "published_in",
    "recognise",
    "save",
    "tell",
]
