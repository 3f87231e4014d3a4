"""Several drafters in one: each proposes, and their drafts are joined into one tree per row, without duplicates.

Each drafter's chances (acceptance probabilities) are corrected by its own record in each request. Must not import another drafter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from headstart.drafters import Drafter, Restorable
from headstart.speculation.calibration import UNFITTED, Calibration
from headstart.speculation.checks import require
from headstart.speculation.fuse import Proposal, Union
from headstart.speculation.planner import Best, Plan, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts, Kept
from headstart.speculation.trust import Trust

if TYPE_CHECKING:
    from headstart.target.cache import Seating
    from headstart.target.target import Target


@dataclass(frozen=True)
class _Proposed:
    """What was proposed for a seat in the last round.

    row: of that round.
    root_position: of that row.
    proposals: per drafter, those of all rows.
    """

    row: int
    root_position: int
    proposals: Sequence[Proposal]


class Fused:
    """Drafts with several drafters at once.

    `Drafts.sources` numbers the drafters in the order of `parts`. Drafts are on the CPU: where a part drafts on a GPU, a round has
    one more host synchronisation. Each part drafts as its own planner says, but no deeper and wider than the round's plan.

    parts: at least two drafters, the cheapest first. A part with taps must be `Restorable`.
    enough: kept tokens that earlier parts must promise for a row, so that the later ones do not draft for it in this round.

    Raises ValueError for fewer parts, for two of one name, for a part that has taps and is not `Restorable`, and unless `enough` is
    positive.
    """

    corrects_chances = True  # by records of its own, part by part
    refused_noise = "fresh"  # where the chances of drawn children depend on another source's, their selection is not exact

    def __init__(self, parts: Sequence[Drafter], enough: float = 2.0) -> None:
        names = [part.name for part in parts]
        if len(parts) < 2 or len({*names}) < len(names):
            raise ValueError(f"drafters {' and '.join(names) or 'none'} cannot be joined; name at least two, each once")
        for part in parts:
            if part.taps and not isinstance(part, Restorable):
                raise ValueError(
                    f"drafter {part.name} reads the target's hidden states and cannot return to an earlier state, so it cannot be "
                    "joined with others; give it the methods snapshot and restore"
                )
        require(enough > 0, "enough", enough, "positive")
        self.parts = tuple(parts)
        self.enough = enough
        self.name = "+".join(names)
        self.taps: tuple[int, ...] = tuple(dict.fromkeys(tap for part in parts for tap in part.taps))
        self.planner: Planner = _planner([part.planner.plan([1]) for part in parts])
        self.calibration: Calibration = next((part.calibration for part in parts if hasattr(part, "calibration")), UNFITTED)
        self._trusts = [Trust() for _ in parts]
        self._proposed: dict[int, _Proposed] = {}  # by seat
        # Parts that cannot return to an earlier state get their texts again.
        self._forgetful = [part for part in parts if not isinstance(part, Restorable)]
        self._texts: dict[int, list[int]] = {}  # by seat; empty where no part is forgetful
        self._untold: set[int] = set()  # seats whose text the forgetful parts must get again

    @property
    def slot_bytes(self) -> int:
        """The sum of all parts'."""
        return sum(part.slot_bytes for part in self.parts)

    def attach(self, target: Target, seating: Seating) -> None:
        """Attach all parts, and forget everything."""
        for part in self.parts:
            part.attach(target, seating)
        self._trusts = [Trust() for _ in self.parts]
        self._proposed, self._texts, self._untold = {}, {}, set()

    def odds(self, seat: int) -> tuple[float, ...]:
        """Per part, the odds ratio that corrects its chances for a seat."""
        return tuple(trust.odds(seat) for trust in self._trusts)

    # -- rounds --

    def extend(self, kept: Kept) -> None:
        """Compare the kept tokens with what each part proposed, then pass them on, to each part with the features that it taps."""
        self._learn(kept)
        self._tell_again(kept)
        if self._forgetful:
            self._append(kept)
        for part in self.parts:
            part.extend(self._view(kept, part))

    def propose(self, rows: Rows) -> Drafts:
        """The parts' drafts, joined, on the CPU."""
        self._tell_again(None)
        union, proposals = Union(), []
        for source, (part, trust) in enumerate(zip(self.parts, self._trusts, strict=True)):
            open_rows = _without(rows, union.expected(len(rows)), self.enough) if source else rows
            proposals.append(self._propose_part(part, open_rows))
            union.add(source, proposals[-1], [trust.odds(seat) for seat in rows.seats])
        for row in rows.drafting:
            self._proposed[rows.seats[row]] = _Proposed(row, rows.root_positions[row], proposals)
        return union.drafts(rows.plan.width, _most_drafts(rows.plan))

    def _propose_part(self, part: Drafter, rows: Rows) -> Proposal:
        if not rows.drafting:
            return Proposal.of(Drafts.none())
        plan = _plan_of(part, rows)
        drafts = part.propose(replace(rows, depths=tuple(min(depth, plan.depth) for depth in rows.depths), plan=plan))
        # A static tree is pruned by ranks, not by chances.
        return Proposal.of(drafts, len(rows), None if rows.plan.parents else rows.plan.nodes)

    def _learn(self, kept: Kept) -> None:
        for seat, text, start in zip(kept.seats, kept.texts, kept.starts, strict=True):
            proposed = self._proposed.pop(seat, None)
            if proposed is None:
                continue
            after_root = text[proposed.root_position - start + 1 :]
            for trust, proposal in zip(self._trusts, proposed.proposals, strict=True):
                predicted, happened = proposal.compare(proposed.row, after_root)
                if predicted:
                    trust.learn(seat, predicted, happened)

    def _view(self, kept: Kept, part: Drafter) -> Kept:
        """What a part sees of the kept tokens: the features that it taps."""
        if kept.features is None or part.taps == self.taps:
            return kept
        if not part.taps:
            return replace(kept, features=None)
        features = kept.features.unflatten(-1, (len(self.taps), -1))
        chosen = [features[:, self.taps.index(tap)] for tap in part.taps]
        return replace(kept, features=torch.cat(chosen, -1))

    # -- seats --

    def fork(self, source: int, seat: int, length: int) -> None:
        """Copy what all parts know, and what was learned of them."""
        self._tell_again(None)
        for part in self.parts:
            part.fork(source, seat, length)
        for trust in self._trusts:
            trust.fork(source, seat)
        self._proposed.pop(seat, None)
        if source in self._texts:
            self._texts[seat] = self._texts[source][:length]

    def free(self, seat: int) -> None:
        """Forget a seat."""
        for part in self.parts:
            part.free(seat)
        for trust in self._trusts:
            trust.free(seat)
        self._proposed.pop(seat, None)
        self._texts.pop(seat, None)
        self._untold.discard(seat)

    # -- returning to an earlier state --

    def snapshot(self) -> Any:
        """The parts' snapshots, what was learned of them, and the lengths of the texts."""
        lengths = {seat: len(text) for seat, text in self._texts.items()}
        texts = dict(self._texts)  # a seat that is freed and taken again in the round gets a new list
        parts = [part.snapshot() if isinstance(part, Restorable) else None for part in self.parts]
        return parts, [trust.snapshot() for trust in self._trusts], lengths, texts, set(self._untold)

    def restore(self, snapshot: Any) -> None:
        """Return to a snapshot. Parts that cannot will get their texts again before they are asked next."""
        parts, trusts, lengths, texts, untold = snapshot
        if self._forgetful:
            self._untold = {*self._untold, *untold, *self._texts, *texts}
        self._texts = dict(texts)
        for seat, length in lengths.items():
            del self._texts[seat][length:]
        self._proposed = {}
        for trust, known in zip(self._trusts, trusts, strict=True):
            trust.restore(known)
        for part, known in zip(self.parts, parts, strict=True):
            if isinstance(part, Restorable):
                part.restore(known)

    def _append(self, kept: Kept) -> None:
        for seat, tokens, start in zip(kept.seats, kept.texts, kept.starts, strict=True):
            text = self._texts.setdefault(seat, [])
            text += tokens[len(text) - start :]

    def _tell_again(self, kept: Kept | None) -> None:
        """Give the parts that could not be restored their texts again. kept: None, or of the call that comes next."""
        device = torch.device("cpu") if kept is None else kept.device
        for seat in sorted(self._untold):
            text = self._texts.get(seat, [])
            for part in self._forgetful:
                part.free(seat)
                if text:
                    part.extend(Kept((seat,), (tuple(text),), (0,), (0,), (0,), None, device))
            self._untold.discard(seat)


def _without(rows: Rows, expected: Sequence[float], enough: float) -> Rows:
    """The rows, of which those do not draft that expect enough kept tokens already."""
    if max(expected) < enough:
        return rows
    return replace(rows, depths=tuple(0 if count >= enough else depth for depth, count in zip(rows.depths, expected, strict=True)))


def _plan_of(part: Drafter, rows: Rows) -> Plan:
    """What a part drafts in a round: as its own planner says, within the round's plan; a static tree is the same for all parts."""
    if rows.plan.parents:
        return rows.plan
    own, plan = part.planner.plan(rows.depths), rows.plan
    if own.parents:
        return replace(own, depth=min(own.depth, plan.depth))
    return Plan(
        depth=min(own.depth, plan.depth),
        width=min(own.width, plan.width),
        beam=min(own.beam, plan.beam),
        nodes=min(own.nodes, plan.nodes),
        min_gain=own.min_gain if not plan.level_prices else 0.0,
        level_prices=plan.level_prices,
    )


def _most_drafts(plan: Plan) -> int:
    """Drafts of one row: no more than one drafter would propose within the plan, so that the slots suffice."""
    return min(plan.nodes, plan.width * (1 + (plan.depth - 1) * plan.beam))


def _planner(plans: Sequence[Plan]) -> Best:
    """A planner within which each part can draft as it would alone. plans: the parts' own, for one row."""
    return Best(
        nodes=max(plan.nodes for plan in plans),
        depth=max(plan.depth for plan in plans),
        width=max(plan.width for plan in plans),
        beam=max(plan.beam for plan in plans),
    )
