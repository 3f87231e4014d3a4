"""Measures what rounds cost on this machine: rounds of a real engine on a text of random tokens, interleaved, lower quartiles.

Must not import the module of any one drafter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from headstart.drafters import Drafter
from headstart.engine.engine import Engine
from headstart.engine.memory import headroom_slots, slot_bytes
from headstart.engine.waiting import Watch
from headstart.speculation.cost import CostModel, DraftCost, monotone
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import NO_DRAFTS, Plan, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.tree import ROOT, Drafts, Kept
from headstart.target.cache import Seating
from headstart.target.target import Target

SIZES = (1, 16, 64, 4, 32, 2, 8, 128)  # nodes of a forest, in the order in which they are measured while there is time
_FOREST_DEPTH = 8  # levels of the forests of a measured forward
_DEPTH = 3  # levels drafted to measure one level's cost
_CLEAN = 0.05  # fraction of its time that a sample may have waited for a processor
_SHORT = 16  # tokens of a prompt
_SHORTEST = 16  # tokens of a context in which rounds can be measured
TOO_SHORT = CostModel((1, 16), (1.0, 1.0), draft=DraftCost(0.1, (1,), (0.1,)))  # assumed of shorter ones: drafting pays
_REPEATS = 5
_IN_TURN = 3
_ROUNDS = 4 * len(SIZES) * _REPEATS * _IN_TURN  # tokens that a text may grow by


@dataclass(frozen=True)
class Setting:
    """The size of a round to be measured. nodes: of the forest, over all rows. depth, beam: levels drafted; 0 for none."""

    nodes: int = 1
    depth: int = 0
    beam: int = 1


def _forest(nodes: int) -> Setting:
    """A forest of so many nodes, in chains."""
    return Setting(nodes, _FOREST_DEPTH if nodes > 1 else 0)


@dataclass
class _Scripted:
    """A planner that does what `setting` says."""

    setting: Setting = field(default_factory=Setting)
    most: int = 1

    def headroom(self, max_rows: int) -> int:
        return self.most

    def plan(self, depths: Sequence[int]) -> Plan:
        setting = self.setting
        if not setting.depth:
            return NO_DRAFTS
        return Plan(setting.depth, 8, setting.beam, self.most)

    def prune(self, drafts: Drafts, plan: Plan, num_rows: int) -> Drafts:
        wanted = max(0, self.setting.nodes - num_rows)
        if len(drafts) > wanted:
            drafts = drafts.take(torch.arange(wanted, device=drafts.tokens.device), num_rows)
        return drafts.by_row(num_rows)


class _Filler:
    """A drafter of tokens that are never right, as many as the planner's setting has."""

    name = "filler"
    taps: tuple[int, ...] = ()
    slot_bytes = 0

    def __init__(self, planner: _Scripted) -> None:
        self.planner: Planner = planner
        self._scripted = planner

    def attach(self, target: Target, seating: Seating) -> None:
        """Nothing to allocate."""
        self._device, self._vocab = target.device, target.vocab

    def extend(self, kept: Kept) -> None:
        """Nothing to learn."""

    def propose(self, rows: Rows) -> Drafts:
        """Chains of equal depth in every row that drafts."""
        wanted = max(0, self._scripted.setting.nodes - len(rows))
        tokens: list[int] = []
        parents: list[int] = []
        row_ids: list[int] = []
        depths: list[int] = []
        for number, row in enumerate(rows.drafting):
            first, size = len(tokens), (wanted + number) // len(rows.drafting)
            num_chains = -(-size // rows.depths[row])
            for node in range(size):
                tokens.append((7 * node) % self._vocab)
                parents.append(first + node - num_chains if node >= num_chains else ROOT)
                row_ids.append(row)
                depths.append(node // num_chains + 1)
        return Drafts.of(tokens, parents, row_ids, depths, [0.5**depth for depth in depths], device=self._device)

    def fork(self, source: int, seat: int, length: int) -> None:
        """Nothing is known."""

    def free(self, seat: int) -> None:
        """Nothing is known."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one round, by phase; on a GPU the whole round's as forward and as draft, of which differences are taken.

    is_clean: whether the process hardly waited for a processor.
    """

    forward: float
    draft: float
    host: float
    is_clean: bool


class _Bench:
    """An engine whose rounds are timed one by one."""

    def __init__(self, target: Target, drafter: Drafter | None, rows: int, prompt: int, nodes: int) -> None:
        self.planner = _Scripted(most=max(nodes, target.min_nodes) + 8)
        self.target = target
        guesser: Drafter = drafter if drafter is not None else _Filler(self.planner)
        num_tokens = prompt + _ROUNDS + headroom_slots(target, guesser, self.planner, rows)
        length = min(num_tokens, target.context) + self.planner.most
        self.engine = Engine(target, guesser, self.planner, max_rows=rows, memory=rows * length * slot_bytes(target, guesser))
        generator = torch.Generator().manual_seed(0)
        self.prompts = [torch.randint(target.vocab, (prompt,), generator=generator).tolist() for _ in range(rows)]
        self._start()

    def _start(self) -> None:
        """Begin the texts anew, and score their prompts."""
        self.planner.setting = Setting()
        most = min(self.target.context - len(self.prompts[0]), _ROUNDS)
        params = SamplingParams(max_tokens=most, ignore_eos=True, temperature=1.0)
        requests = [self.engine.add(tokens, params, seed=row) for row, tokens in enumerate(self.prompts)]
        while any(not request.output for request in requests):
            self.engine.step()

    def sample(self, setting: Setting) -> Sample:
        """One round. A text that is full begins anew."""
        if len(self.engine.scheduler.running) < len(self.prompts):
            for request in tuple(self.engine.scheduler.running):
                self.engine.abort(request)
            self._start()
        self.planner.setting = setting
        before, watch, began = self.engine.stats.copy(), Watch(), time.perf_counter()
        self.engine.step()
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        seconds = time.perf_counter() - began
        spent, is_clean = self.engine.stats.since(before).seconds, (watch.delay() or 0.0) <= _CLEAN
        if self.target.device.type == "cuda":  # kernels run on after the host has launched them: only the whole round is known
            return Sample(seconds, seconds, 0.0, is_clean)
        return Sample(spent["score"], spent["draft"], seconds - spent["score"] - spent["draft"], is_clean)


def _usual(bench: _Bench, settings: Sequence[Setting], until: float) -> dict[Setting, Sample]:
    """The usual round of each setting, interleaved.

    A setting runs several rounds in turn, of which the first is not counted: rounds of one size find their memory in the caches.
    """
    samples: dict[Setting, list[Sample]] = {}
    for _ in range(_REPEATS):
        for setting in settings:
            samples.setdefault(setting, []).extend([bench.sample(setting) for _ in range(_IN_TURN)][1:])
        if time.perf_counter() > until:
            break
    return {setting: _quartile(some) for setting, some in samples.items()}


def _quartile(samples: Sequence[Sample]) -> Sample:
    """The lower quartile of the clean samples, or of all where none is clean: what disturbs a round only makes it longer."""
    kept = [sample for sample in samples if sample.is_clean] or list(samples)
    index = (len(kept) - 1) // 4
    phases = ([getattr(sample, phase) for sample in kept] for phase in ("forward", "draft", "host"))
    forward, draft, host = (sorted(values)[index] for values in phases)
    return Sample(forward, draft, host, kept[0].is_clean)


def _sizes(target: Target, seconds: float) -> Iterator[int]:
    """Sizes of forests that can be measured in the time; a machine that needs seconds for a pass gets three."""
    bench = _Bench(target, None, 1, min(_SHORT, target.context // 2), 16)
    bench.sample(Setting(1))
    first = bench.sample(Setting(1))
    cost = first.forward + first.host
    room = min(target.context // 2, 128)
    sizes = [size for size in SIZES if size <= max(1, room)]
    most = max(3, int(seconds / max(cost, 1e-6) / 3))
    yield from sizes[:most]


def measure_cost(target: Target, drafter: Drafter | None = None, seconds: float = 3.0, base: CostModel | None = None) -> CostModel:
    """The cost of rounds on this machine.

    drafter: not attached yet, or to be attached anew afterwards: measuring attaches it to engines of its own.
    seconds: about how long it may take; more where three passes take longer.
    base: the cost without a drafter; None: it is measured, too.
    """
    if target.context < _SHORTEST:
        return TOO_SHORT
    prompt = max(1, min(_SHORT, target.context // 4))
    base = base or _forward_cost(target, prompt, 0.7 * seconds)
    return base if drafter is None else replace(base, draft=_draft_cost(target, drafter, prompt, 0.3 * seconds))


def _forward_cost(target: Target, prompt: int, seconds: float) -> CostModel:
    """The cost of rounds without drafting."""
    began = time.perf_counter()
    sizes = sorted(_sizes(target, seconds))
    forwards = _usual(_Bench(target, None, 1, prompt, max(sizes)), [_forest(size) for size in sizes], began + 0.7 * seconds)
    measured = {setting.nodes: sample for setting, sample in forwards.items()}
    nodes = tuple(sorted(measured))
    passes = monotone([measured[size].forward for size in nodes])
    least, most = measured[nodes[0]].host, measured[nodes[-1]].host
    middle = nodes[min(2, len(nodes) - 1)]
    context_seconds = _context_seconds(target, measured[middle].forward, middle, prompt, began + 0.85 * seconds)
    row_seconds, host_row_seconds = _row_seconds(target, measured, passes, prompt, began + seconds)
    return CostModel(
        nodes=nodes,
        seconds=passes,
        context_seconds=context_seconds,
        row_seconds=row_seconds,
        host_seconds=least,
        host_row_seconds=host_row_seconds,
        host_node_seconds=max(0.0, most - least) / max(1, nodes[-1] - nodes[0]),
    )


def _context_seconds(target: Target, short: float, nodes: int, prompt: int, until: float) -> float:
    """Seconds of a forward for each token of context. short: seconds of a forward of `nodes` behind `prompt` tokens."""
    longer = min(512, target.context // 2)
    if longer <= 2 * prompt:
        return 0.0
    long = _usual(_Bench(target, None, 1, longer, nodes), [_forest(nodes)], until)
    return max(0.0, (next(iter(long.values())).forward - short) / (longer - prompt))


def _row_seconds(
    target: Target, measured: Mapping[int, Sample], passes: Sequence[float], prompt: int, until: float
) -> tuple[float, float]:
    """Seconds of a forward, and of a round's remaining parts, for each row after the first, beyond those of its nodes.

    measured: rounds of one row, by nodes. passes: their forwards, monotone.
    """
    if 4 not in measured:
        return 0.0, 0.0
    several = next(iter(_usual(_Bench(target, None, 4, prompt, 4), [Setting(4)], until).values()))
    forward, host = passes[sorted(measured).index(4)], measured[4].host
    return max(0.0, (several.forward - forward) / 3), max(0.0, (several.host - host) / 3)


def _draft_cost(target: Target, drafter: Drafter, prompt: int, seconds: float) -> DraftCost:
    """What drafting costs: one level, and what further levels add, by the nodes that run at once."""
    until, beams = time.perf_counter() + seconds, (1, 4, 8)
    settings = [Setting(1), Setting(1, 1), *(Setting(1, _DEPTH, beam) for beam in beams)]
    plain, first, *deeper = (sample.draft for sample in _in_order(target, drafter, 1, prompt, 8 + 64 * _DEPTH, settings, until))
    levels = monotone([max(0.0, (draft - first) / (_DEPTH - 1)) for draft in deeper])
    settings = [Setting(4), Setting(4, 1), Setting(4, _DEPTH, 2)]
    several = _in_order(target, drafter, 4, prompt, 4 * 8 * _DEPTH, settings, until)
    plain_rows, first_rows, deep_rows = (sample.draft for sample in several)
    first, first_rows, level = first - plain, first_rows - plain_rows, (deep_rows - first_rows) / (_DEPTH - 1)
    return DraftCost(
        first=max(0.0, first),
        widths=beams,
        seconds=levels,
        row_seconds=max(0.0, (first_rows - first) / 3),
        level_row_seconds=max(0.0, (level - levels[-1]) / 3),
    )


def _in_order(
    target: Target, drafter: Drafter, rows: int, prompt: int, nodes: int, settings: Sequence[Setting], until: float
) -> list[Sample]:
    """The usual round of each setting with a drafter."""
    samples = _usual(_Bench(target, drafter, rows, prompt, nodes), settings, until)
    return [samples[setting] for setting in settings]
