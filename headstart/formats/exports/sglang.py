"""Heads for sglang."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from headstart.formats.exports.base import Placed, Subject


class Sglang:
    """Not written yet."""

    name: ClassVar[str] = "sglang"
    reader: ClassVar[str] = "sglang"
    methods: ClassVar[tuple[str, ...]] = tuple(["eagle", "eagle3"])
    instead: ClassVar[Mapping[str, str]] = {}

    def check(self, subject: Subject) -> None:
        raise NotImplementedError

    def write(self, subject: Subject, staged: Path) -> list[Placed]:
        raise NotImplementedError
