"""What an engine learns from its rounds: what they cost, and how far the drafter's chances can be trusted in each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headstart.engine.scheduler import Request, Turn
from headstart.speculation.outcome import LearningPlanner, Load, Outcome
from headstart.speculation.planner import Planner
from headstart.speculation.rows import Rows
from headstart.speculation.tree import Drafts
from headstart.speculation.trust import CALIBRATED, Trust
from headstart.speculation.verify import Verdict


class Learning:
    """Tells a planner that learns of the rounds, and corrects the chances (acceptance probabilities) of each row.

    With any other planner no method does anything. What was learned in a round that fails stays: it changes speeds only.

    planner: of the engine.
    corrects: whether chances are corrected; not those of a drafter that does so itself.
    """

    def __init__(self, planner: Planner | None, corrects: bool) -> None:
        self._planner: LearningPlanner | None = planner if isinstance(planner, LearningPlanner) else None
        self._corrects = corrects and self._planner is not None
        self._trust = Trust(prior=CALIBRATED)

    def start(self, request: Request) -> None:
        """Begin with a request that has just got its seat."""
        if self._planner is not None and request.seat is not None:
            self._trust.free(request.seat)
            self._planner.restart()

    def see(self, turns: Sequence[Turn]) -> None:
        """Tell the planner of the next round's rows."""
        if self._planner is not None:
            load = Load(
                stems=tuple(len(turn.stem) for turn in turns),
                contexts=tuple(turn.request.scored for turn in turns),
                temperature=sum(turn.request.params.temperature for turn in turns) / len(turns),
            )
            self._planner.see(load)

    def odds(self, seats: Sequence[int]) -> tuple[float, ...]:
        """Per row, the factor that corrects the odds of its chances; () where none is corrected."""
        odds = tuple(self._trust.odds(seat) for seat in seats) if self._corrects else ()
        return odds if any(factor != 1 for factor in odds) else ()

    def learn(self, rows: Rows, drafts: Drafts, verdict: Verdict, seconds: Mapping[str, float]) -> None:
        """Learn from a round. drafts: those verified. seconds: of the round, by phase."""
        if self._planner is None:
            return
        for row, (predicted, kept) in enumerate(zip(verdict.predicted, verdict.kept, strict=True)):
            self._trust.learn_path(rows.seats[row], predicted, len(kept), rows.odds[row] if rows.odds else 1.0)
        outcome = Outcome(
            num_drafting=len(rows.drafting),
            depth=drafts.max_depth,
            num_drafts=len(drafts),
            gain=verdict.gain,
            num_kept=sum(map(len, verdict.kept)),
            draft_seconds=seconds["draft"],
            forward_seconds=seconds["score"],
        )
        self._planner.learn(outcome)
