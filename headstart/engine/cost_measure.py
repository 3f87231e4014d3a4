"""Measures what rounds cost on this machine: rounds of a real engine on a text of random tokens, interleaved, medians.

Must not import the module of any one drafter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from headstart.drafters import Drafter
from headstart.engine.timed_rounds import Sample, Setting, TimedRounds
from headstart.speculation.cost import CostModel, DraftCost, monotone
from headstart.target.flat_rows import node_bucket
from headstart.target.graphs import MAX_NODES
from headstart.target.target import Target

SIZES = (1, 16, 64, 4, 32, 2, 8, 128)  # nodes of a forest, in the order in which they are measured while there is time
GRAPH_SIZES = tuple(size for size in range(1, MAX_NODES + 1) if node_bucket(size) == size)  # that graphs are captured for
_FOREST_DEPTH = 8  # levels of the forests of a measured forward
_DEPTH = 3  # levels drafted to measure one level's cost
_ROWS = 4  # texts at once, where the cost of further rows is measured
_WIDTH = 8  # drafts verified of the first level, and of the second, where drafting is measured
_SHORT = 16  # tokens of a prompt
_LONG = 512  # tokens of a long one
_SHORTEST = 16  # tokens of a context in which rounds can be measured
TOO_SHORT = CostModel((1, 16), (1.0, 1.0), draft=DraftCost(0.1, (1,), (0.1,)))  # assumed of shorter ones: drafting pays
_REPEATS = 8
_IN_TURN = 3
_FEW = 8  # clean samples below which the lower quartile stands for the median
_GROWTH = 96  # tokens that a text grows by before it begins anew: a long text would cost more, and be counted twice


def _forest(nodes: int, rows: int = 1) -> Setting:
    """A forest of so many nodes, in chains."""
    return Setting(nodes, _FOREST_DEPTH if nodes > rows else 0)


def _interleaved(pairs: Sequence[tuple[TimedRounds, Setting]], until: float) -> list[Sample]:
    """The usual round of each setting, in order.

    A setting runs several rounds in turn, of which the first is not counted: rounds of one size find their memory in the caches.
    """
    samples: list[list[Sample]] = [[] for _ in pairs]
    for _ in range(_REPEATS):
        for own, (rounds, setting) in zip(samples, pairs, strict=True):
            own += [rounds.sample(setting) for _ in range(_IN_TURN)][1:]
        if time.perf_counter() > until:
            break
    return [_median(some) for some in samples]


def _usual(rounds: TimedRounds, settings: Sequence[Setting], until: float) -> dict[Setting, Sample]:
    """The usual round of each setting."""
    return dict(zip(settings, _interleaved([(rounds, setting) for setting in settings], until), strict=True))


def _median(samples: Sequence[Sample]) -> Sample:
    """The median of the clean samples, or of all where none is clean.

    Of few samples it is the lower quartile, which one disturbed round does not move: what disturbs a round only makes it longer.
    """
    kept = [sample for sample in samples if sample.is_clean] or list(samples)
    index = (len(kept) - 1) // (2 if len(kept) >= _FEW else 4)
    phases = ([getattr(sample, phase) for sample in kept] for phase in ("forward", "draft", "host"))
    forward, draft, host = (sorted(values)[index] for values in phases)
    return Sample(forward, draft, host, sum(sample.context for sample in kept) / len(kept), kept[0].is_clean)


def _rounds(target: Target, drafter: Drafter | None, rows: int, prompt: int, nodes: int) -> TimedRounds:
    # With a drafter one draft is kept at every depth, so that levels differ by what they cost, not by what is read after them.
    return TimedRounds(target, drafter, rows, prompt, _GROWTH, nodes, kept=2 if drafter is None else 1)


def _sizes(target: Target, seconds: float) -> Iterator[int]:
    """Sizes of forests that can be measured in the time; a machine that needs seconds for a pass gets three."""
    rounds = _rounds(target, None, 1, min(_SHORT, target.context // 2), 16)
    rounds.sample(Setting(1))
    first = rounds.sample(Setting(1))
    cost = first.forward + first.host
    room = min(target.context // 2, MAX_NODES if target.pad_rows else 128)
    order = [*SIZES, *(size for size in GRAPH_SIZES if size not in SIZES and target.pad_rows)]
    sizes = [size for size in order if size <= max(1, room)]
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
    base = base or _forward_cost(target, prompt, 0.6 * seconds)
    return base if drafter is None else replace(base, draft=_draft_cost(target, drafter, base, prompt, 0.4 * seconds))


def _forward_cost(target: Target, prompt: int, seconds: float) -> CostModel:
    """The cost of rounds without drafting."""
    began = time.perf_counter()
    sizes = sorted(_sizes(target, seconds))
    forwards = _usual(_rounds(target, None, 1, prompt, max(sizes)), [_forest(size) for size in sizes], began + 0.7 * seconds)
    measured = {setting.nodes: sample for setting, sample in forwards.items()}
    reading, more_reading = _context_seconds(target, sizes, prompt, began + 0.85 * seconds)
    nodes = tuple(sorted(measured))
    passes = monotone([_alone(measured[size], size, reading, more_reading) for size in nodes])
    least, most = measured[nodes[0]], measured[nodes[-1]]
    is_wide = _ROWS in measured
    row_seconds, host_row_seconds = _row_seconds(target, reading, prompt, began + seconds) if is_wide else (0.0, 0.0)
    graphs = target.pad_rows and target.flat_runner.captures
    return CostModel(
        *(_stepped(nodes, passes) if graphs else (nodes, passes)),
        context_seconds=reading,
        context_node_seconds=more_reading,
        row_seconds=row_seconds,
        host_seconds=least.host + least.draft,  # without drafts, a drafter is only told what was kept
        host_row_seconds=host_row_seconds,
        host_node_seconds=max(0.0, most.host - least.host) / max(1, nodes[-1] - nodes[0]),
    )


def _alone(sample: Sample, nodes: int, reading: float, more_reading: float) -> float:
    """Seconds of a forward of one row without a context. reading, more_reading: as `_context_seconds` gives them."""
    return max(0.0, sample.forward - sample.context * (reading + (nodes - 1) * more_reading))


def _stepped(nodes: Sequence[int], seconds: Sequence[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Sizes and seconds where a forward is padded to the next size of a graph: one node more than a size costs as much as the next.

    Sizes between which some were not measured stay apart.
    """
    points = dict(zip(nodes, seconds, strict=True))
    for size, following in pairwise(nodes):
        if node_bucket(size + 1) == following:
            points[size + 1] = points[following]
    return tuple(sorted(points)), tuple(points[size] for size in sorted(points))


def _context_seconds(target: Target, sizes: Sequence[int], prompt: int, until: float) -> tuple[float, float]:
    """Seconds of a forward for each token of context with one node, and more for each further node.

    sizes: nodes that were measured behind `prompt` tokens.
    """
    longer = min(_LONG, target.context // 2)
    if longer <= 2 * prompt + _GROWTH:
        return 0.0, 0.0
    few, many = 1, max(size for size in sizes if size <= 16)
    short, long = (_rounds(target, None, 1, length, many) for length in (prompt, longer))
    samples = _interleaved([(rounds, _forest(size)) for size in (few, many) for rounds in (short, long)], until)
    slopes = [max(0.0, (y.forward - x.forward) / (y.context - x.context)) for x, y in (samples[:2], samples[2:])]
    return slopes[0], max(0.0, slopes[1] - slopes[0]) / max(1, many - few)


def _row_seconds(target: Target, reading: float, prompt: int, until: float) -> tuple[float, float]:
    """Seconds of a forward, and of a round's remaining parts, for each row after the first, beyond those of its nodes.

    reading: seconds for each token of context.
    """
    rounds = [_rounds(target, None, rows, prompt, _ROWS) for rows in (1, _ROWS)]
    least, one, several = _interleaved([(rounds[0], Setting(1)), (rounds[0], _forest(_ROWS)), (rounds[1], Setting(_ROWS))], until)
    more = several.forward - one.forward - (several.context - one.context) * reading
    return max(0.0, more / (_ROWS - 1)), max(0.0, (several.host - least.host) / (_ROWS - 1))


def _draft_cost(target: Target, drafter: Drafter, base: CostModel, prompt: int, seconds: float) -> DraftCost:
    """What drafting costs: one level, and what further levels add, by the nodes that run at once.

    Some drafts of every round are kept, so that the drafter has several tokens to read, as where drafting pays. To the first level
    belongs by what a forward takes longer with a drafter, which reads hidden states, and whose own weights are in the caches.
    base: the cost without a drafter. Where the machine has another speed now, drafting is given in the time of then.
    """
    began, beams, nodes = time.perf_counter(), (1, _ROWS, 8), 1 + 2 * _WIDTH
    alone, none, one, *deeper = _with_drafter(target, drafter, 1, prompt, beams, began + 0.6 * seconds)
    first, slower = max(0.0, one.draft - none.draft), min(sample.forward for sample in deeper) - alone.forward
    levels = monotone([max(0.0, (sample.draft - one.draft) / (_DEPTH - 1)) for sample in deeper])
    _, none_rows, one_rows, deep_rows = _with_drafter(target, drafter, _ROWS, prompt, (1,), began + seconds)
    level_rows = (deep_rows.draft - one_rows.draft) / (_DEPTH - 1)
    now = DraftCost(
        first=first + max(0.0, slower),
        widths=beams,
        seconds=levels,
        row_seconds=max(0.0, (one_rows.draft - none_rows.draft - first) / (_ROWS - 1)),
        level_row_seconds=max(0.0, (level_rows - levels[1]) / (_ROWS - 1)),  # so many rows run as many nodes
    )
    return now.scaled(min(2.0, max(0.5, base.forward(nodes, 1, round(alone.context)) / max(1e-9, alone.forward))))


def _with_drafter(target: Target, drafter: Drafter, rows: int, prompt: int, beams: Sequence[int], until: float) -> list[Sample]:
    """Rounds without a drafter, and with one that drafts nothing, one level, and `_DEPTH` levels with each beam.

    The first and those of several levels have forests of one size.
    """
    verified = rows * (1 + 2 * _WIDTH)
    drafted = rows * _WIDTH * (1 + (_DEPTH - 1) * max(beams))
    alone, drafting = _rounds(target, None, rows, prompt, verified), _rounds(target, drafter, rows, prompt, drafted)
    settings = [Setting(rows), Setting(rows * (1 + _WIDTH), 1), *(Setting(verified, _DEPTH, beam) for beam in beams)]
    return _interleaved([(alone, _forest(verified, rows)), *((drafting, setting) for setting in settings)], until)
