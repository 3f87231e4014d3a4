"""How many bytes the weights of a drafter take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from headstart.drafters import Drafter
from headstart.target.target import Target


def weight_bytes(drafter: Drafter | None, target: Target) -> int:
    """Bytes of a drafter's parameters, buffers and packed weights, without those that are the target's own.

    drafter: heads, a drafter that has a module or a model as an attribute, or None.
    """
    owned = {id(module) for module in target.model.modules()}
    modules = {id(module): module for module in _modules(drafter) if id(module) not in owned}
    foreign = {tensor.data_ptr() for tensor in target.model.parameters()}
    tensors = (tensor for module in modules.values() for tensor in (*module.parameters(False), *module.buffers(False)))
    by_address = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    packs: dict[int, Any] = {id(module.pack): module.pack for module in modules.values() if hasattr(module, "pack")}
    sizes = (size for address, size in by_address.items() if address not in foreign)
    return sum(sizes) + sum(int(pack.nbytes) for pack in packs.values())


def _modules(drafter: Any) -> Iterator[nn.Module]:
    """The modules of a drafter, and those of the modules, models and drafters among its attributes."""
    attributes = [drafter] if isinstance(drafter, nn.Module) else list(getattr(drafter, "__dict__", {}).values())
    for value in [item for some in attributes for item in (some if isinstance(some, list | tuple) else [some])]:
        if isinstance(value, Target):
            yield from value.model.modules()
        elif isinstance(value, nn.Module):
            yield from value.modules()
        elif isinstance(value, Drafter) and value is not drafter:
            yield from _modules(value)
