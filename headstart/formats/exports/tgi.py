"""Heads for tgi."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from headstart.formats.exports.base import Placed, Subject


class Tgi:
    """Not written yet."""

    name: ClassVar[str] = "tgi"
    reader: ClassVar[str] = "tgi"
    methods: ClassVar[tuple[str, ...]] = tuple(["medusa"])
    instead: ClassVar[Mapping[str, str]] = {}

    def check(self, subject: Subject) -> None:
        raise NotImplementedError

    def write(self, subject: Subject, staged: Path) -> list[Placed]:
        raise NotImplementedError
