"""Measures what rounds cost on this machine: rounds of a real engine on a text of random tokens, interleaved, lower quartiles.

Must not import the module of any one drafter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from headstart.drafters import Drafter
from headstart.engine.engine import Engine
from headstart.engine.memory import headroom_slots, slot_bytes
from headstart.engine.waiting import waiting_seconds
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
    """Seconds of one round, by phase. is_clean: whether the process hardly waited for a processor."""

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
        before, waited, began = self.engine.stats.copy(), waiting_seconds(), time.perf_counter()
        self.engine.step()
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        seconds, waited_now = time.perf_counter() - began, waiting_seconds()
        spent = self.engine.stats.since(before).seconds
        delay = 0.0 if waited is None or waited_now is None else (waited_now - waited) / seconds
        forward = spent["score"]
        if self.target.device.type == "cuda":  # kernels run on after the host has launched them
            forward = seconds - spent["draft"]
            return Sample(forward, spent["draft"], 0.0, delay <= _CLEAN)
        return Sample(forward, spent["draft"], seconds - forward - spent["draft"], delay <= _CLEAN)


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


def measure_cost(target: Target, drafter: Drafter | None = None, seconds: float = 3.0) -> CostModel:
    """The cost of rounds on this machine.

    drafter: not attached yet, or to be attached anew afterwards: measuring attaches it to engines of its own.
    seconds: about how long it may take; more where three passes take longer.
    """
    if target.context < _SHORTEST:
        return TOO_SHORT
    began = time.perf_counter()
    prompt = max(1, min(_SHORT, target.context // 4))
    sizes = sorted(_sizes(target, seconds))
    forwards = _usual(_Bench(target, None, 1, prompt, max(sizes)), [_forest(size) for size in sizes], began + seconds / 2)
    measured = {setting.nodes: sample for setting, sample in forwards.items()}
    nodes = tuple(sorted(measured))
    passes = monotone([measured[size].forward for size in nodes])
    least, most = measured[nodes[0]].host, measured[nodes[-1]].host
    host_node_seconds = max(0.0, most - least) / max(1, nodes[-1] - nodes[0])
    row_seconds, host_row_seconds = _row_seconds(target, measured, passes, prompt, began + 0.7 * seconds)
    middle = nodes[min(2, len(nodes) - 1)]
    return CostModel(
        nodes=nodes,
        seconds=passes,
        context_seconds=_context_seconds(target, measured[middle].forward, middle, prompt, began + 0.6 * seconds),
        row_seconds=row_seconds,
        draft=_draft_cost(target, drafter, prompt, began + seconds) if drafter is not None else None,
        host_seconds=least,
        host_row_seconds=host_row_seconds,
        host_node_seconds=host_node_seconds,
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


def _draft_cost(target: Target, drafter: Drafter, prompt: int, until: float) -> DraftCost:
    """What drafting costs: one level, and what further levels add, by the nodes that run at once."""
    beams = (1, 4, 8)
    settings = [Setting(1, 1), *(Setting(1, _DEPTH, beam) for beam in beams)]
    samples = _usual(_Bench(target, drafter, 1, prompt, 8 + 64 * _DEPTH), settings, until)
    first = samples[settings[0]].draft
    levels = monotone([max(0.0, (samples[setting].draft - first) / (_DEPTH - 1)) for setting in settings[1:]])
    shallow, deep = Setting(4, 1), Setting(4, _DEPTH, 2)
    several = _usual(_Bench(target, drafter, 4, prompt, 4 * 8 * _DEPTH), [shallow, deep], until)
    row_seconds = max(0.0, (several[shallow].draft - first) / 3)
    level = (several[deep].draft - several[shallow].draft) / (_DEPTH - 1)
    return DraftCost(first, beams, levels, row_seconds, max(0.0, (level - levels[-1]) / 3))
