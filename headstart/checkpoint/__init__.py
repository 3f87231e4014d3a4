"""Heads on disk: the native format, and what others publish."""

from headstart.checkpoint.facts import TargetFacts, facts_of
from headstart.checkpoint.native import describe, load, save, tell
from headstart.checkpoint.recognise import Recognised, inside, modules_lost, published_in, recognise

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
