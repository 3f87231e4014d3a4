"""Sequoia's tree against a chain, a full tree and Medusa's tree of as many drafts: tau (acceptance length) at several sizes.

    python benchmarks/sequoia_trees.py --drafter mtp --drafter HEADS [--model MODEL] [--temperature 0.7] [--sizes 8,32,128,512]

All trees are made from the acceptance rates by depth and rank in the heads' `plan.json`. The expected tau is under those rates, as
if the depths were independent. The replayed tau is from the ranks of the decided tokens in answers to other prompts than those
of the plan (`--prompts`), for trees no deeper than the heads draft; `--no-replay` leaves it out, and loads no model.

full: every node of a level has as many children; the best widths. Medusa: the most probable paths. Sequoia by rank: the paper's
programme, from one vector, the mean over depths. Sequoia: from rates by depth and rank. deep: as if the heads drafted `--depth`
levels, the deeper ones with the rates of their last. The last line of the output is JSON.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table as Lines
from torch import Tensor

from headstart.engine.drafter_loading import folder_of
from headstart.speculation.calibration import Ranks, Table, expected_tau, sparse_tree, walk
from headstart.speculation.heads_plan import load_plan
from headstart.speculation.planner import StaticTree
from headstart.speculation.sequoia import Sequoia


@dataclass(frozen=True)
class Result:
    """One tree.

    nodes: its budget of drafts; drafts: how many it has.
    depth: its levels.
    expected: tau under the measured acceptance rates.
    replayed: tau on recorded answers; None for a tree deeper than what was recorded.
    """

    drafter: str
    nodes: int
    shape: str
    drafts: int
    depth: int
    expected: float
    replayed: float | None


def chain(depth: int) -> tuple[Ranks, ...]:
    """The chain of first children."""
    return tuple((0,) * level for level in range(1, depth + 1))


def full_widths(nodes: int, depth: int, width: int, level: int = 1) -> Iterator[tuple[int, ...]]:
    """Children per level, none more than in the level above, of full trees with at most so many drafts.

    level: number of nodes in the level above.
    """
    yield ()
    for children in range(1, width + 1 if depth else 1):
        if level * children <= nodes:
            for deeper in full_widths(nodes - level * children, depth - 1, children, level * children):
                yield (children, *deeper)


def full_tree(table: Table, nodes: int) -> tuple[Ranks, ...]:
    """The full tree with the largest expected tau."""
    trees = (StaticTree.full(*widths).paths for widths in full_widths(nodes, len(table), len(table[0])) if widths)
    return max(trees, key=lambda paths: expected_tau(paths, table))


def extended(table: Table, depth: int) -> list[Sequence[float]]:
    """The table down to a depth: deeper levels have the rates of its last one."""
    return [table[min(level, len(table) - 1)] for level in range(depth)]


def shapes(table: Table, nodes: int, deep: int) -> dict[str, Callable[[], tuple[Ranks, ...]]]:
    """What makes the tree of each shape with at most `nodes` drafts. deep: levels of the deep ones."""
    depth, means = len(table), [list(map(fmean, zip(*table, strict=True)))]
    return {
        "chain": lambda: chain(min(nodes, depth)),
        "full": lambda: full_tree(table, nodes),
        "Medusa": lambda: sparse_tree(table, nodes),
        "Sequoia by rank": lambda: programme(as_key(means), nodes, depth).tree(nodes, depth),
        "Sequoia": lambda: programme(as_key(table), nodes, depth).tree(nodes, depth),
        "chain, deep": lambda: chain(min(nodes, deep)),
        "Sequoia, deep": lambda: programme(as_key(table), nodes, deep).tree(nodes, deep),
    }


def as_key(table: Table) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, table))


programme = cache(Sequoia)


def results_of(drafter: str, table: Table, sizes: Sequence[int], deep: int, texts: Sequence[Tensor]) -> list[Result]:
    """The result of every shape at every size. texts: ranks as `walk` takes them; none: nothing is replayed."""
    results = []
    for nodes in sizes:
        for shape, make in shapes(table, nodes, deep).items():
            paths = make()
            depth = max(map(len, paths))
            replayed = walk(texts, paths) if texts and depth <= len(table) else None
            tau = expected_tau(paths, extended(table, depth))
            results.append(Result(drafter, nodes, shape, len(paths), depth, tau, replayed))
    return results


def table_of(folder: Path, temperature: float) -> Table:
    """Acceptance rates by depth and rank, measured at exactly that temperature. Raises ValueError where there are none."""
    plan = load_plan(folder)
    measured = plan.calibration.temperatures if plan else ()
    if plan is None or temperature not in measured:
        there = ", ".join(f"{one:g}" for one in measured) or "none"
        raise ValueError(f"{folder} has no acceptance rates at temperature {temperature:g}, but at: {there}")
    return plan.calibration.ranks[measured.index(temperature)]


def recorded_ranks(arguments: argparse.Namespace, folders: Sequence[Path]) -> list[list[Tensor]]:
    """Per folder of heads, the ranks of the decided tokens in each answer."""
    import headstart
    from headstart.bench.calibrate import DecodeTrial, clone_for, observe_answers
    from headstart.bench.suites import load_cases
    from headstart.bench.tasks import encode_tasks
    from headstart.engine.drafter_loading import heads_in

    llm = headstart.load(arguments.model, dtype=arguments.dtype, drafter=None, max_rows=1)
    target = llm.engine.target
    tasks, _ = encode_tasks(llm, load_cases(arguments.prompts, arguments.limit), arguments.max_tokens)
    trial = DecodeTrial(target, tuple(task.prompt for task in tasks), arguments.max_tokens, arguments.seed, llm.stop_ids)
    texts = []
    for folder in folders:
        drafter = heads_in(folder, target)
        observations, _ = observe_answers(trial, drafter, clone_for(drafter, target), arguments.temperature, lambda: None)
        texts.append([one.ranks for one in observations])
    return texts


def show(results: Sequence[Result], temperature: float) -> None:
    """Print a line per drafter, size and shape."""
    lines = Lines(title=f"tau (acceptance length) of static trees, temperature {temperature:g}", title_justify="left")
    for name in ("drafter", "budget", "shape", "drafts", "depth", "tau, expected", "tau, replayed"):
        lines.add_column(name, justify="left" if name in ("drafter", "shape") else "right")
    last: tuple[str, int] | None = None
    for one in results:
        is_first, last = (one.drafter, one.nodes) != last, (one.drafter, one.nodes)
        names = (one.drafter, str(one.nodes)) if is_first else ("", "")
        replayed = "" if one.replayed is None else f"{one.replayed:.3f}"
        lines.add_row(*names, one.shape, str(one.drafts), str(one.depth), f"{one.expected:.3f}", replayed)
    Console(width=120).print(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--drafter", action="append", required=True, help="a folder of heads with a plan, or a method; may be repeated"
    )
    parser.add_argument("--model", help="folder or hub id; default: the embedded model")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--sizes", type=lambda text: list(map(int, text.split(","))), default=[8, 32, 128, 512])
    parser.add_argument("--depth", type=int, default=24, help="levels of the deep shapes")
    parser.add_argument("--prompts", default="questions", help="a JSONL file or a built-in suite, for the replay")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--replay", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    try:
        results = run(arguments)
    except ValueError as error:
        parser.error(str(error))
    show(results, arguments.temperature)
    print(json.dumps({"arguments": vars(arguments), "results": [asdict(one) for one in results]}))


def run(arguments: argparse.Namespace) -> list[Result]:
    """All results. Raises ValueError for heads without a plan before a model is loaded."""
    folders = [folder_of(spec, arguments.model) for spec in arguments.drafter]
    if None in folders:
        raise ValueError(f"{arguments.drafter[folders.index(None)]} is no folder of heads, and no method of the embedded model")
    tables = [table_of(folder, arguments.temperature) for folder in folders if folder]
    texts = recorded_ranks(arguments, [folder for folder in folders if folder]) if arguments.replay else [[] for _ in folders]
    return [
        result
        for spec, table, ranks in zip(arguments.drafter, tables, texts, strict=True)
        for result in results_of(spec, table, arguments.sizes, arguments.depth, ranks)
    ]


if __name__ == "__main__":
    main()
