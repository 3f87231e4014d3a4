"""How far a drafter's chances can be trusted in one request, learned from what was drafted there. Must not import torch.

An odds ratio per seat corrects chances (acceptance probabilities): a chance p has the odds p / (1 - p), and the corrected chance
has `ratio` times these odds. The logarithm of the ratio is the bias of a logistic regression on the drafter's own log-odds, found
by Newton steps in which earlier rounds count less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_SURE = 0.999  # the summed chances of siblings, each corrected by itself, may exceed 1
CALIBRATED = 4.0  # a prior for chances that are calibrated: what a few rounds of one request seem to show is mostly noise
MAX_ODDS = 20.0  # odds ratios are within [1 / MAX_ODDS, MAX_ODDS]


def correct(chance: float, odds: float) -> float:
    """The chance with `odds` times its odds: p -> p r / (1 - p + p r)."""
    weighted = chance * odds
    total = 1 - chance + weighted
    return weighted / total if total > 0 else chance


class Trust:
    """Per seat, the odds ratio that corrects the chances of one drafter.

    discount: weight of a round one round later; 0.95: about the last twenty rounds count.
    prior: information of the belief that the chances are right, in the unit of p (1 - p) per observed chance. The larger, the more
        observations are needed to move the ratio away from 1.
    """

    def __init__(self, discount: float = 0.95, prior: float = 1.0) -> None:
        self._discount = discount
        self._prior = prior
        self._seats: dict[int, tuple[float, float]] = {}  # seat -> log of the odds ratio, information of earlier rounds

    def odds(self, seat: int) -> float:
        """The odds ratio of a seat; 1 for a seat of which nothing was learned."""
        return math.exp(self._seats[seat][0]) if seat in self._seats else 1.0

    def learn(self, seat: int, predicted: Sequence[float], happened: Sequence[bool]) -> None:
        """Learn from one round of a seat.

        predicted: chances as the drafter gave them, not corrected. Each is the probability that one of the proposed children of a
            node is the next token, given that the node was kept.
        happened: for each, whether one of these children was the next token.
        """
        ratio, known = self._seats.get(seat, (0.0, 0.0))
        corrected = [correct(chance, math.exp(ratio)) for chance in predicted]
        surprise = sum(outcome - chance for outcome, chance in zip(happened, corrected, strict=True))
        known = self._discount * known + sum(chance * (1 - chance) for chance in corrected)
        # At the last optimum, the gradients of all earlier rounds sum to prior * ratio. Their discount leaves this much of the pull
        # towards a ratio of 1, so the pull does not grow with the number of rounds.
        pull = (1 - self._discount) * self._prior * ratio
        ratio += (surprise - pull) / (known + self._prior)
        limit = math.log(MAX_ODDS)
        self._seats[seat] = min(limit, max(-limit, ratio)), known

    def learn_path(self, seat: int, corrected: Sequence[float], num_kept: int, odds: float) -> None:
        """Learn from a round of a seat whose chances were corrected already; nothing verified is a round of rest.

        corrected: per level of the kept path, the summed chances of its verified children, as in `Verdict.predicted`.
        num_kept: kept drafts. odds: the ratio by which the chances were corrected.
        """
        if not corrected:
            self.rest(seat)
            return
        chances = [correct(min(chance, _SURE), 1 / odds) for chance in corrected]
        self.learn(seat, chances, [level < num_kept for level in range(len(chances))])

    def rest(self, seat: int) -> None:
        """Note a round of a seat in which nothing was learned: its ratio moves towards 1, slowly at first."""
        ratio, known = self._seats.get(seat, (0.0, 0.0))
        if ratio:
            known *= self._discount
            ratio -= (1 - self._discount) * self._prior * ratio / (known + self._prior)
            self._seats[seat] = (ratio if abs(ratio) > 1e-3 else 0.0), known

    def free(self, seat: int) -> None:
        """Forget a seat."""
        self._seats.pop(seat, None)

    def fork(self, source: int, seat: int) -> None:
        """Copy what was learned of seat `source` to another seat."""
        self.free(seat)
        if source in self._seats:
            self._seats[seat] = self._seats[source]

    def snapshot(self) -> dict[int, tuple[float, float]]:
        """What was learned of all seats."""
        return dict(self._seats)

    def restore(self, snapshot: dict[int, tuple[float, float]]) -> None:
        """Return to a snapshot. May be called again with the same one."""
        self._seats = dict(snapshot)
