"""The machine that this process runs on, as far as the cost of rounds depends on it."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel

from headstart.drafters import Drafter
from headstart.target.loading import digest
from headstart.target.target import Target

Machine = Mapping[str, str | int]


def machine_key(target: Target, drafter: Drafter | None) -> dict[str, str | int]:
    """All that a measured cost depends on, by name. drafter: None for rounds without one."""
    device = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else cpu_name()
    return {
        "model": f"{digest(target.model)} {target.num_layers} layers",
        "drafter": _identity(drafter) if drafter else "none",
        "dtype": str(target.dtype).removeprefix("torch."),
        "weights": target.weights,
        "device": device,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "kernels": target.instructions or "torch",
    }


def _identity(drafter: Drafter) -> str:
    """What tells drafters of different cost apart, whether attached or not: name and configuration, or those of its parts."""
    parts, config, model = (getattr(drafter, name, None) for name in ("parts", "config", "model"))
    if isinstance(parts, tuple):
        return "+".join(map(_identity, parts))
    if isinstance(model, Target):
        return f"{drafter.name} {digest(model.model)} {model.num_layers} layers"
    if isinstance(config, BaseModel):
        return f"{drafter.name} {hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:8]}"
    return drafter.name


def cpu_name() -> str:
    """The processor's model name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def differences(one: Machine, other: Machine) -> Iterator[tuple[str, str | int, str | int]]:
    """(name, value in `one`, value in `other`) of what differs."""
    for name in dict.fromkeys((*one, *other)):
        if one.get(name, "unknown") != other.get(name, "unknown"):
            yield name, one.get(name, "unknown"), other.get(name, "unknown")
