"""The adaptive planner against every static setting, on recorded rounds.

    python benchmarks/planner_sweep.py --drafter mtp --drafter eagle3
    python benchmarks/planner_sweep.py --drafter mtp=PADDED_HEADS --cost-of PADDED_TARGET

A drafter proposes large trees behind every token of the answers; each setting then prunes them as it would have, and its time is
that of the measured cost of rounds. With `--cost-of`, the recordings are those of the small target, whose logits a padded one has,
and the cost is the padded one's. Prints the ratio of the adaptive planner to the best static setting of each cell and to plain
decoding, and of each setting to the best ones over all cells.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import headstart
from headstart.bench.played import play
from headstart.bench.recorded import Recording, record
from headstart.bench.suites import load_cases
from headstart.bench.tasks import encode_tasks
from headstart.engine.cost_measure import measure_cost
from headstart.engine.drafter_loading import make
from headstart.engine.planning import adaptive
from headstart.speculation.cost import CostModel
from headstart.speculation.heads_plan import load_plan
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain, Plan, Planner, StaticTree
from headstart.target.target import Target

SIZES = (2, 4, 8, 16, 32, 64)


class Plain:
    """A planner that never drafts."""

    def headroom(self, max_rows: int) -> int:
        return 1

    def plan(self, depths: list[int]) -> Plan:
        return Plan(0, 0, 0, 0)


def static_settings(drafter: object, folder: Path | None, temperature: float) -> Iterator[tuple[str, Planner]]:
    """Every static setting of a drafter, by name."""
    usual = drafter.planner.plan([2**20])
    depth = int(getattr(drafter, "depth", 2 * usual.depth))
    yield "plain", Plain()
    for length in range(1, min(8, depth) + 1):
        yield f"chain:{length}", Chain(length)
    for nodes in SIZES:
        yield f"best:{nodes}", Best(nodes=nodes, depth=depth, width=usual.width, beam=usual.beam)
    plan = load_plan(folder) if folder else None
    for nodes in sorted(min(plan.trees.values(), key=len)) if plan else ():
        yield f"tree:{nodes}", StaticTree(plan.static_tree(nodes, temperature).paths)


def recordings_of(args: argparse.Namespace, llm: headstart.LLM, name: str) -> dict[tuple[str, float], list[Recording]]:
    """By kind of prompt and temperature."""
    target = llm.engine.target
    result = {}
    for kind in args.prompts:
        tasks, _ = encode_tasks(llm, load_cases(kind), args.tokens)
        prompts = [task.prompt for task in tasks]
        prompts = (prompts * (-(-args.texts // len(prompts))))[: args.texts]
        for temperature in args.temperatures:
            params = SamplingParams(max_tokens=args.tokens, temperature=temperature, seed=1, ignore_eos=True)
            drafter = make(name, target)
            usual = drafter.planner.plan([2**20])
            depth = int(getattr(drafter, "depth", 2 * usual.depth))
            grown = Plan(depth, 8, args.beam, 2**20)
            result[kind, temperature] = record(target, drafter, prompts, params, grown, llm.stop_ids)
    return result


def cost_for(args: argparse.Namespace, target: Target, name: str, heads: str | None) -> CostModel:
    """The cost of rounds, of the padded target where one is given."""
    if args.cost_of:
        target = Target.load(args.cost_of)
    cost = measure_cost(target, make(heads or name, target), args.seconds)
    sizes = {size: round(1000 * seconds, 2) for size, seconds in zip(cost.nodes, cost.seconds, strict=True)}
    print(f"forward ms by nodes {sizes}, {cost.draft}")
    return cost


def sweep(args: argparse.Namespace) -> list[dict]:
    """One dict per cell and setting: tokens per second."""
    llm = headstart.load(args.model, drafter=None)
    target = llm.engine.target
    lines = []
    for spec in args.drafter:
        name, _, heads = spec.partition("=")
        cost = cost_for(args, target, name, heads or None)
        folder = next((path for path in (Path(name), Path(target.name).with_name(name)) if (path / "plan.json").is_file()), None)
        for (kind, temperature), recordings in recordings_of(args, llm, name).items():
            drafter = make(name, target)
            for rows in args.rows:
                cell = {"drafter": name, "kind": kind, "temperature": temperature, "rows": rows}
                for setting, planner in [*static_settings(drafter, folder, temperature), ("auto", adaptive(target, drafter, cost))]:
                    played = play(recordings, planner, cost, rows)
                    lines.append(cell | {"setting": setting, "rate": played.rate, "tau": played.tokens / (played.rounds * rows)})
                report(lines, cell)
    return lines


def report(lines: list[dict], cell: dict) -> None:
    """Print one cell."""
    own = {line["setting"]: line for line in lines if cell.items() <= line.items()}
    static = {name: line["rate"] for name, line in own.items() if name != "auto"}
    best = max(static, key=static.get)
    auto = own["auto"]["rate"]
    where = f"{cell['drafter']:10} {cell['kind']:10} T {cell['temperature']:g} rows {cell['rows']:2}"
    print(
        f"{where}: best {best:8} {static[best] / static['plain']:.2f}x plain, auto {auto / static['plain']:.2f}x plain "
        f"(tau {own['auto']['tau']:.2f}), auto / best {auto / static[best]:.3f}",
        flush=True,
    )


def summary(lines: list[dict]) -> None:
    """Print each setting's mean and worst ratio to the best static setting of each cell."""
    cells: dict[tuple, dict[str, float]] = {}
    for line in lines:
        key = (line["drafter"], line["kind"], line["temperature"], line["rows"])
        cells.setdefault(key, {})[line["setting"]] = line["rate"]
    ratios: dict[str, list[float]] = {}
    for by_setting in cells.values():
        best = max(rate for name, rate in by_setting.items() if name != "auto")
        for name, rate in by_setting.items():
            ratios.setdefault(name, []).append(rate / best)
    for name, values in sorted(ratios.items(), key=lambda item: -sum(item[1]) / len(item[1])):
        if len(values) == len(cells):
            print(f"{name:10} mean {sum(values) / len(values):.3f} worst {min(values):.3f} of the best static setting of each cell")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="target; by default the embedded model")
    parser.add_argument("--drafter", action="append", required=True, help="NAME or NAME=HEADS, whose cost is measured")
    parser.add_argument("--cost-of", help="a padded target, whose cost is measured instead")
    parser.add_argument("--prompts", action="append", help="suites (stories, questions, edits)")
    parser.add_argument("--temperatures", type=lambda text: [float(part) for part in text.split(",")], default=[0.0, 1.0])
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--beam", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.prompts = args.prompts or ["stories", "questions", "edits"]
    lines = sweep(args)
    summary(lines)
    if args.out:
        args.out.write_text(json.dumps(lines))


if __name__ == "__main__":
    main()
