"""The planner that decides each round's speculation by measured cost and estimated chances.

A draft is verified where its chance (acceptance probability) is worth more than its share of the forward: where it beats the tokens
that the same time gives otherwise. Must not import models or drafters.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from headstart.speculation.calibration import UNFITTED, Calibration, Table
from headstart.speculation.cost import CostModel
from headstart.speculation.outcome import Load, Outcome
from headstart.speculation.planner import NO_DRAFTS, Plan
from headstart.speculation.shape import Floats, Limits, Shape, best_shape, fastest_shape, round_seconds
from headstart.speculation.tree import Drafts

MOST_NODES = 512  # drafts per row, at most
_MEMORY = 32.0  # rounds that an average remembers
_FORECAST = 4.0  # rounds that the forecast from calibration and cost counts for
_PATIENCE = 4.0  # rounds of a row that must have shown a loss before drafting pauses
_TOLERANCE = 0.005  # a loss of so many tokens per row and round is none
_LOST = 0.02  # share of the time that drafting may lose by being tried where it does not pay
_FORECAST_PAUSE = 2  # rounds before the first try where the forecast sees no gain
_LONGEST_PAUSE = 64  # rounds without drafting, at most
_BELIEVED = 0.25  # how much of a round's gain is what was expected, which varies less; the rest is what was kept
_MOST_TABLES = 64  # temperatures whose tables are kept
_CONFIRMED = 64  # rounds after which a shape is chosen anew, since costs move


@dataclass
class _Average:
    """An exponential average that begins as a plain one."""

    value: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        self.weight = min(self.weight + 1, _MEMORY)
        self.value += (value - self.value) / self.weight


@dataclass
class _Regime:
    """What was seen with one number of rows.

    tokens: expected tokens per row and round.
    seconds: of a round, as a ratio to those of plain decoding.
    profit: tokens per row and round by which drafting beat plain decoding in the same time.
    lost: such tokens that drafting lost and has not won back since.
    pause: rounds left without drafting.
    """

    tokens: _Average
    seconds: _Average
    profit: _Average
    lost: float = 0.0
    pause: int = 0

    @property
    def speed_up(self) -> float:
        """Tokens per second, as a ratio to plain decoding's; at least 1, which is always to be had."""
        return max(1.0, self.tokens.value / self.seconds.value)


class Adaptive:
    """Chooses depth, beam and nodes of each round for the most expected tokens per second. Never drafts where it does not pay.

    Before drafting: whether to draft at all, and the beam, by what the drafter's ranks promise and by the profit of the last
    rounds. On a CPU, between levels: a row goes deeper where its best candidates promise more than a level costs, and after
    drafting the drafts are verified that are worth it. On a GPU, where this would cost a host synchronisation, depth and number
    of nodes are chosen before drafting.

    cost: of the machine and the target; refined by every round.
    limits: of the trees.
    calibration: acceptance rates by rank, for what is decided before drafting.
    is_on_host: whether drafts will be on a CPU.
    longest: seconds that a round may take; drafts that would make it longer are not verified.
    """

    def __init__(
        self,
        cost: CostModel,
        limits: Limits,
        calibration: Calibration = UNFITTED,
        is_on_host: bool = True,
        longest: float = math.inf,
    ) -> None:
        self.cost = cost
        self.longest = longest
        self._is_on_host = is_on_host
        self.calibration = calibration
        self.draft_scale = 1.0  # drafting's seconds now, as a ratio to the measured ones
        self.limits = limits
        self._tables: dict[float, Table] = {}
        wanted = fastest_shape(cost, self._table(0.0), replace(limits, nodes=MOST_NODES)).nodes
        self.limits = replace(limits, nodes=min(limits.nodes, max(16, 2 ** math.ceil(math.log2(max(1, 2 * wanted))))))
        self._load = Load((1,), (), 0.0)
        self._regimes: dict[int, _Regime] = {}
        self._shapes: dict[tuple[int, int, int], tuple[int, Shape]] = {}
        self._round = 0
        self._plan = NO_DRAFTS

    def __repr__(self) -> str:
        return f"Adaptive({self.limits})"

    # -- planning --

    def headroom(self, max_rows: int) -> int:
        drafted = self.limits.width * (1 + (self.limits.depth - 1) * self.limits.beam)
        most = self.limits.nodes if self._is_on_host else self.limits.nodes * max_rows  # see `_paying`
        return 1 + max(min(drafted, most), self.limits.beam * (self.limits.depth - 1))

    def see(self, load: Load) -> None:
        """Take notice of the next round's rows, before `plan`."""
        self._load = load
        self._round += 1

    def plan(self, depths: Sequence[int]) -> Plan:
        self._plan = self._next_plan(sum(depth > 0 for depth in depths))
        return self._plan

    def _next_plan(self, num_drafting: int) -> Plan:
        regime = self._regime
        if regime.pause:
            regime.pause -= 1
            return NO_DRAFTS
        shape = self._shape(num_drafting)
        beam = max(1, shape.beam)
        depth = self._depth_in_time(self.limits.depth if self._is_on_host else shape.depth, beam, num_drafting)
        if not depth:
            return NO_DRAFTS
        if self._is_on_host:  # the forecast may err: whether drafting pays, the rounds show
            nodes, prices = self.limits.nodes * num_drafting, self._level_prices(beam, num_drafting)
            return Plan(depth, self.limits.width, beam, nodes, level_prices=prices)
        nodes = 1 << max(0, shape.nodes * num_drafting - 1).bit_length()
        while nodes > 1 and self._seconds(nodes) + self._drafting(depth, beam, num_drafting) > self.longest:
            nodes //= 2
        return Plan(depth, self.limits.width, beam, nodes)

    def _depth_in_time(self, depth: int, beam: int, num_drafting: int) -> int:
        """The levels that can be drafted, and a draft per row verified, within `longest`; 0: none."""
        if self.longest == math.inf:
            return depth
        least = self._seconds(num_drafting)
        return next((d for d in range(depth, 0, -1) if least + self._drafting(d, beam, num_drafting) <= self.longest), 0)

    def _drafting(self, depth: int, beam: int, num_drafting: int) -> float:
        return self.cost.drafting(depth, beam, num_drafting) * self.draft_scale

    def _seconds(self, count: int) -> float:
        """Seconds of the next round with so many drafts, without drafting them."""
        load = self._load
        num_rows, nodes = len(load.stems), load.num_stems + count
        return self.cost.forward(nodes, num_rows, load.context) + self.cost.host(nodes, num_rows)

    def _level_prices(self, beam: int, num_drafting: int) -> tuple[float, ...]:
        """What another level must promise, for one, two, ... rows: kept tokens of its parents, not of their children."""
        draft = self.cost.draft
        if draft is None:
            return ()
        rate, node_seconds, scale = self.rate, self._node_seconds, self.draft_scale
        counts = range(1, num_drafting + 1)
        return tuple(rate * (draft.level(beam * count, count) * scale + count * node_seconds) for count in counts)

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        # No child has a higher chance than its parent, and a stable sort keeps the order of equals: no parent is missing.
        if not len(drafts):
            return drafts
        if self._is_on_host:
            most = self._count_in_time(min(plan.nodes, len(drafts)), drafts.max_depth, plan.beam, num_rows)
            return drafts.take(self._paying(drafts, most), num_rows)
        order = torch.sort(drafts.chances, descending=True, stable=True).indices[: plan.nodes]
        drafts = drafts.take(order.sort().values, num_rows) if plan.nodes < len(drafts) else drafts
        return drafts.by_row(num_rows)

    def _count_in_time(self, count: int, depth: int, beam: int, num_rows: int) -> int:
        """How many of `count` drafts can be verified within `longest`."""
        if self.longest == math.inf:
            return count
        left = self.longest - self._drafting(depth, beam, num_rows)
        return bisect_right(range(count + 1), left, key=self._seconds) - 1 if self._seconds(0) <= left else 0

    def _paying(self, drafts: Drafts, most: int) -> Tensor:
        """The drafts that are together worth most, by row: at most `most`, and as many of each row as there are slots."""
        chances, rows = drafts.chances.numpy(), drafts.rows.numpy()
        order = np.argsort(-chances, kind="stable")[:most]
        if not len(order):
            return torch.empty(0, dtype=torch.int64)
        values = np.cumsum(chances[order], dtype=np.float64) - self._prices(len(order))
        best = int(values.argmax())
        order = order[: best + 1 if values[best] > 0 else 0]
        order = order[np.argsort(rows[order], kind="stable")]
        place = np.arange(len(order)) - np.searchsorted(rows[order], rows[order])  # in its row, the best is 0
        order = order[place < self.limits.nodes]
        return torch.from_numpy(order[np.lexsort((order, rows[order]))])

    def _prices(self, count: int) -> Floats:
        """[count] tokens that the time of one, two, ... more nodes would give otherwise."""
        load = self._load
        seconds = round_seconds(self.cost, load.num_stems, 1, count, len(load.stems), load.context)
        prices: Floats = (seconds[1:] - seconds[0]) * self.rate
        return prices

    # -- what is known --

    @property
    def _regime(self) -> _Regime:
        """What was seen with about as many rows: 1, 2, 3 to 4, 5 to 8, ..."""
        num_rows, load = len(self._load.stems), self._load
        size = (num_rows - 1).bit_length()
        if size not in self._regimes:
            shape = fastest_shape(self.cost, self._table(load.temperature), self.limits, num_rows, load.context)
            seconds = shape.seconds / self.cost.plain(num_rows, load.context)
            profit = 1 + shape.gain - seconds
            regime = _Regime(_Average(1 + shape.gain, _FORECAST), _Average(seconds, _FORECAST), _Average(profit, _FORECAST))
            regime.pause = 0 if shape.depth else _FORECAST_PAUSE
            self._regimes[size] = regime
        return self._regimes[size]

    @property
    def rate(self) -> float:
        """Tokens per second that this number of rows gives now, over all rows; at least plain decoding's."""
        num_rows = len(self._load.stems)
        return self._regime.speed_up * num_rows / self.cost.plain(num_rows, self._load.context)

    @property
    def _node_seconds(self) -> float:
        """Seconds of one more node in a forest with one draft per row."""
        rows, context = len(self._load.stems), self._load.context
        nodes = self._load.num_stems + rows
        more = self.cost.forward(nodes + 1, rows, context) - self.cost.forward(nodes, rows, context)
        return more + self.cost.host_node_seconds

    @property
    def _scaled_cost(self) -> CostModel:
        draft = self.cost.draft
        if draft is None or self.draft_scale == 1.0:
            return self.cost
        return replace(self.cost, draft=draft.scaled(self.draft_scale))

    def _table(self, temperature: float) -> Table:
        """[depth][rank] acceptance rates at a sampling temperature."""
        if temperature not in self._tables:
            if len(self._tables) > _MOST_TABLES:
                self._tables.clear()
            self._tables[temperature] = self.calibration.table(temperature, self.limits.depth, self.limits.width)
        return self._tables[temperature]

    def _shape(self, num_drafting: int) -> Shape:
        """The shape to draft; kept for some rounds, since choosing takes milliseconds."""
        load = self._load
        key = (num_drafting, round(10 * load.temperature), round(2 * math.log2(1 + load.context)))
        kept = self._shapes.get(key)
        if kept is None or self._round - kept[0] > _CONFIRMED:
            shape = best_shape(
                self._scaled_cost, self._table(load.temperature), self.limits, max(1, num_drafting), load.context, self.rate
            )
            kept = self._shapes[key] = self._round, shape
        return kept[1]

    # -- learning --

    def learn(self, outcome: Outcome) -> None:
        """Take notice of the round that `see` announced."""
        load, cost = self._load, self.cost
        num_rows = len(load.stems)
        if self._is_on_host and outcome.forward_seconds:
            self.cost = cost.refined(load.num_stems + outcome.num_drafts, num_rows, load.context, outcome.forward_seconds)
        if load.num_stems > num_rows:  # prompts: not a round of decoding
            return
        drafting = self._draft_seconds(outcome)
        base, num_nodes = cost.plain(num_rows, load.context), load.num_stems + outcome.num_drafts
        more = cost.forward(num_nodes, num_rows, load.context) + cost.host(num_nodes, num_rows) - base + drafting
        regime, gain = self._regime, _BELIEVED * outcome.gain + (1 - _BELIEVED) * outcome.num_kept
        if outcome.num_drafting:
            self._judge(regime, gain / num_rows - more / base)
        regime.tokens.add(1 + gain / num_rows)
        regime.seconds.add(1 + more / base)

    def _draft_seconds(self, outcome: Outcome) -> float:
        """What the drafting of a round costs, by the model, which takes notice of what it did cost."""
        expected = self.cost.drafting(outcome.depth, self._plan.beam, outcome.num_drafting) if outcome.num_drafting else 0.0
        # On a GPU the host's clock sees launches only.
        if self._is_on_host and expected and outcome.draft_seconds < 3 * expected * self.draft_scale:
            self.draft_scale += 0.05 * (outcome.draft_seconds / expected - self.draft_scale)
        return expected * self.draft_scale

    def _judge(self, regime: _Regime, profit: float) -> None:
        """Pause where the last rounds lost by drafting: for so long that what it has not won back since is `_LOST` of the time."""
        num_rows = len(self._load.stems)
        regime.profit.add(profit)
        regime.lost = max(0.0, regime.lost - profit)
        if regime.profit.value < -_TOLERANCE and regime.profit.weight * num_rows >= _PATIENCE:
            regime.pause = min(math.ceil(regime.lost / _LOST), _LONGEST_PAUSE)
            regime.profit.weight = _PATIENCE / num_rows - 1 if num_rows < _PATIENCE else 0.0  # one round will tell
            self._shapes.clear()

    def restart(self) -> None:
        regime = self._regimes.get(0)  # among several rows, one more says little about the others
        if regime is not None:
            regime.pause, regime.lost = 0, 0.0
