"""Heads on disk: the native format, and the formats in which others publish heads."""

from headstart.formats.detect import Detected, detect, inside, modules_lost, published_in
from headstart.formats.native import describe, load, save, write_card_section
from headstart.formats.target_info import TargetInfo, describe_target

__all__ = [
    "Detected",
    "TargetInfo",
    "describe",
    "describe_target",
    "detect",
    "inside",
    "load",
    "modules_lost",
    "published_in",
    "save",
    "write_card_section",
]
