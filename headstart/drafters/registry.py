"""The methods whose drafters are trained and kept in a folder, by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.drafters.parts.heads import Heads


# Methods whose drafters are trained and kept in a folder: where their class is, which has a `config_type` and is made of
# (config, hidden, vocab).
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
    """The class of a method that is trained. Raises ValueError for a name that nobody knows."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; there are {', '.join(METHODS)}")
    module, _, kind = METHODS[name].partition(":")
    found: type[Heads] = getattr(import_module(module), kind)
    return found
