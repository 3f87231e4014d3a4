"""What results depend on, and all of it as JSON: machine, versions, model, prompts, sampling, command, labels."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import headstart
from headstart.bench.results import Row, rows
from headstart.bench.runner import AnyRun, Run
from headstart.bench.samples import Sample, Setup
from headstart.bench.tables import short, table, table_by_kind
from headstart.engine.machine import cpu_name
from headstart.speculation.cost import CostModel
from headstart.speculation.rules import parse_rule
from headstart.target.target import Target

__all__ = [
    "Row", "as_json", "clean_share", "cpu_name", "is_padded", "labels", "machine", "reliability", "rows", "short", "table",
    "table_by_kind",
]  # fmt: skip


def machine(target: Target) -> dict[str, Any]:
    """Hardware, versions and the command."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else "cpu",
        "kernels": target.instructions or "torch",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "headstart": headstart.__version__,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def labels(setup: Setup) -> list[str]:
    """What qualifies the numbers: equality to the bit, replay, a padded target, a rule that changes the distribution."""
    applies_by_label = {
        "exact": setup.target.is_exact,
        "replay": setup.is_replay,
        "padded": is_padded(setup.target),
        "lossy": parse_rule(setup.accept).is_lossy,
    }
    return [label for label, applies in applies_by_label.items() if applies]


def is_padded(target: Target) -> bool:
    """Whether the target is widened with zeros: the text of a small model at the cost of a large one."""
    weight: torch.Tensor = target.model.get_input_embeddings().weight  # type: ignore[assignment]
    return not bool(weight[:, -1].any())


def clean_share(samples: Sequence[Sample]) -> float | None:
    """The fraction of samples that hardly waited for a processor; None where the system does not count it."""
    known = [sample.is_clean for sample in samples if sample.delay is not None]
    return sum(known) / len(known) if known else None


def as_json(setup: Setup, samples: Sequence[Sample], results: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """All results and what they depend on. settings: of the command, added to the setup's."""
    target = setup.target
    return {
        "model": {
            "name": target.name,
            "dtype": str(target.dtype).removeprefix("torch."),
            "context": target.context,
            "exact": target.is_exact,
            "why_not_exact": target.kernel_choice.why_not if target.kernel_choice else None,
        },
        "machine": machine(target),
        "settings": settings | {"accept": setup.accept, "num_prompts": len(setup.tasks)},
        "labels": labels(setup),
        "num_samples": len(samples),
        "clean_share": clean_share(samples),
        "runs": [vars(row) | {"identical": row.identical} for row in results],
    }


def cost_curve(cost: CostModel | None, rows: Sequence[Row]) -> dict[str, Any]:
    """What a target forward costs by its nodes, in milliseconds, and the nodes that each run scored on average; for JSON."""
    if cost is None:
        return {}
    points = [{"run": row.run, "nodes": row.nodes, "ms": 1000 * cost.forward(round(row.nodes))} for row in rows if not row.is_peer]
    return {"nodes": list(cost.nodes), "ms": [1000 * seconds for seconds in cost.seconds], "operating_points": points}


def reliability(runs: Sequence[AnyRun], temperature: float) -> list[dict[str, Any]]:
    """How reliable the chances of each run's drafter were, and of each drafter of a joined one, for JSON."""
    records = [(run.name, name, record) for run in runs if isinstance(run, Run) for name, record in run.reliability.items()]
    return [{"run": run, "temperature": temperature, "drafter": name, **record.as_dict()} for run, name, record in records]
