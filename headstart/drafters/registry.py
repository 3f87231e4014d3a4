"""The methods whose drafters are trained and saved in a folder, by name. Imports their modules only when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.drafters.parts.heads import Heads


# Method -> module and class. The class is a subclass of `Heads`, made of (config, hidden, vocab).
METHODS: dict[str, str] = {
    "eagle": "headstart.drafters.eagle:Eagle",
    "eagle3": "headstart.drafters.eagle3:Eagle3",
    "hydra": "headstart.drafters.hydra:Hydra",
    "hydra++": "headstart.drafters.hydra:HydraPlus",
    "medusa": "headstart.drafters.medusa:Medusa",
    "mtp": "headstart.drafters.mtp:Mtp",
    "mtp-parallel": "headstart.drafters.mtp_parallel:ParallelMtp",
}


def method(name: str) -> type[Heads]:
    """The class of a trainable method. Raises ValueError for a name that is not in `METHODS`."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; there are {', '.join(METHODS)}")
    module, _, class_name = METHODS[name].partition(":")
    heads: type[Heads] = getattr(import_module(module), class_name)
    return heads
