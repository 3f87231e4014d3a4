"""What to expect of exported heads: how long chains should be, and how many drafts are kept, from the `plan.json` beside the heads.

Other engines draft chains, not trees. Must not import an exporter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path

from headstart.formats.exports.engine_options import ranges
from headstart.speculation.chains import chain_lengths
from headstart.speculation.heads_plan import load_plan

DEFAULT = 3  # drafts per round where nothing was measured: what vLLM's and SGLang's pages show
LARGEST_BATCH = 32  # for which lengths are given
CONTEXT = 512  # tokens of a text while it is answered, for which rounds are priced


@dataclass(frozen=True)
class ChainPlan:
    """Chains for another engine.

    length: drafts per round, the most of any batch size.
    by_batch: (first batch size, last, length); empty where one length is best for all, or nothing was measured.
    source: where the lengths are from, one sentence.
    acceptance: by position, the share of rounds at T = 0 in which the draft there and all before it are kept; None: not measured.
    acceptance_source: where it is from, or how to measure it, one sentence.
    """

    length: int
    by_batch: tuple[tuple[int, int, int], ...]
    source: str
    acceptance: tuple[float, ...] | None
    acceptance_source: str


def plan_chains(folder: Path, depth: int, tune: str) -> ChainPlan:
    """The chains for the heads in a folder.

    depth: the deepest guess of the heads.
    tune: the command that measures them, for the sentences.
    Raises ValueError for a `plan.json` that cannot be used.
    """
    plan = load_plan(folder)
    if plan is None:
        return ChainPlan(
            min(DEFAULT, depth),
            (),
            f"a default, since nothing was measured; `{tune}` measures",
            None,
            f"not measured; `{tune}` measures it",
        )
    levels = min(depth, len(plan.calibration.ranks[0]))
    table = plan.calibration.table(0.0, levels, 1)
    kept = tuple(round(share, 4) for share in accumulate((row[0] for row in table), mul))
    measured = "the products of the acceptance rates by depth that `headstart tune` measured at T = 0, on its prompts"
    if not plan.costs:
        return ChainPlan(
            min(DEFAULT, depth), (), f"a default, since the cost of rounds was not measured; `{tune}` does", kept, measured
        )
    machine = plan.costs[-1]
    lengths = chain_lengths(table, machine.cost, LARGEST_BATCH, CONTEXT)
    return _measured(
        lengths, f"measured with headstart on {_short(machine.machine)}; another engine or machine may differ", kept, measured
    )


def _measured(lengths: Sequence[int], source: str, kept: tuple[float, ...], measured: str) -> ChainPlan:
    if not any(lengths):
        return ChainPlan(1, (), f"the shortest, since no chain pays: {source}", kept, measured)
    by_batch = tuple(ranges(lengths)) if len({*lengths}) > 1 else ()
    return ChainPlan(max(lengths), by_batch, source, kept, measured)


def _short(machine: object) -> str:
    """The parts of a machine's key that a person wants to read."""
    assert isinstance(machine, dict)
    return (
        ", ".join(str(machine[name]) for name in ("device", "dtype") if name in machine)
        + f", {machine.get('threads', '?')} threads"
    )
