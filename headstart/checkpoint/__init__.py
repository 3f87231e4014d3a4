"""Heads on disk: the native format, and what others publish."""

from headstart.checkpoint.facts import TargetFacts, facts_of
from headstart.checkpoint.native import describe, load, save

__all__ = ["TargetFacts", "describe", "facts_of", "load", "save"]
