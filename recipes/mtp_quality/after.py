"""Heads trained with their trunk against heads trained afterwards, on the frozen plain trunk, with the same blocks.

python -m recipes.mtp_quality.after --work WORK --out OUT --tokens 2000000 --seed 0

OUT: the folder of `recipes.mtp_quality.quality`, which trains the trunks. All are trained on the tokens of the texts (hard loss).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headstart.bench.report import Row
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.training.packing import read_packed
from headstart.training.run_config import TrainConfig
from headstart.training.train import train
from recipes.mtp_quality.arms import ARMS, PLAIN, Experiment, run
from recipes.mtp_quality.measure import by_depth, decoded
from recipes.mtp_quality.quality import HELD_OUT
from recipes.mtp_quality.texts import held_out, write_lines

JOINT = {arm: settings["heads"][arm] for arm, settings in ARMS.items() if arm != PLAIN}
AFTER: dict[str, dict[str, Any]] = {**JOINT, "medusa": {"num_heads": 3}, "hydra++": {"num_heads": 3}}
KEYS: dict[str, Any] = {
    "loss": {"hard": 1.0}, "learning_rate": 0.003, "warmup": 0.05, "floor": 0.1, "rows": 8, "precision": "bf16", "held_out": 0.0,
    "save_every": 100, "log_every": 50, "device": "cpu", "threads": 1, "epochs": 1,
}  # fmt: skip
TEMPERATURES = (0.0, 0.7, 1.0)
CHAINS = (2, 3)  # depths that all heads can draft, and all but the modules of depth 2


@dataclass(frozen=True)
class Member:
    """Heads to measure.

    method: of the heads.
    learned: when they were trained, for the table.
    trunk, folder: of the model and of the heads.
    """

    method: str
    learned: str
    trunk: Path
    folder: Path

    def run(self, depth: int) -> str:
        """The run with a chain of this depth, in the notation of `headstart bench`."""
        return f"{self.folder}@chain:{depth}"


def learned_after(experiment: Experiment, method: str, seed: int) -> Member:
    """Heads trained on the frozen plain trunk; a killed run is resumed, and one that has ended is not repeated."""
    folder, trunk = experiment.out / f"after-{seed}" / method, experiment.trunk(PLAIN, seed)
    if not (folder / "model.safetensors").exists():
        config = TrainConfig(
            method=method, settings=AFTER[method], target=str(trunk), data=(lines(experiment, seed),), out=folder, seed=seed,
            dtype="float32", **KEYS | experiment.keys | {"length": experiment.length},
        )  # fmt: skip
        train(config, resume=True)
    return Member(method, "after", trunk, folder)


def lines(experiment: Experiment, seed: int) -> Path:
    """The file of the blocks that the trunks were trained on."""
    path, config = experiment.out / "texts.jsonl", experiment.config(PLAIN, seed)
    if not path.exists():
        vocab = experiment.shape["vocab_size"]
        tokenizer = load_tokenizer(experiment.tokenizer)
        packed, _ = read_packed(config.data, tokenizer, length=experiment.length, vocab=vocab, times=config.times)
        write_lines(packed, path)
    return path


def learned_together(experiment: Experiment, method: str, seed: int) -> Member:
    """Heads that were trained with their trunk."""
    run(experiment, method, seed)
    return Member(method, "with the trunk", experiment.trunk(method, seed), experiment.folder(method, seed) / method)


def table(members: Sequence[Member], documents: Sequence[np.ndarray], length: int, max_tokens: int) -> list[str]:
    """The table of results, as lines of Markdown."""
    rows: dict[str, list[Row]] = {}
    for trunk in dict.fromkeys(one.trunk for one in members):
        runs = [one.run(depth) for one in members if one.trunk == trunk for depth in CHAINS]
        rows |= decoded(trunk, runs, TEMPERATURES, max_tokens)
    temperatures = ", ".join(f"{temperature:g}" for temperature in TEMPERATURES)
    chains = " | ".join(f"decoded tau, chain:{depth}, T = {temperatures}" for depth in CHAINS)
    lines = [
        f"| heads | learned | parameters | top-1 by depth | tau down to each depth | {chains} |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in members:
        values = by_depth(one.trunk, one.folder, documents, length)
        cells = [one.method, one.learned, f"{values['parameters']:,}", numbers(values["top1"], 3), numbers(values["tau"], 2)]
        cells += [numbers([row.tau for row in rows[one.run(depth)]], 2) for depth in CHAINS]
        lines.append("| " + " | ".join(cells) + " |")
    loops = {trunk.parent.name: [row.loops for row in rows[one.run(2)]] for one in members for trunk in [one.trunk]}
    return [*lines, *(f"loops in the answers of {name}: {numbers(shares, 2)}" for name, shares in loops.items())]


def numbers(values: Sequence[float], digits: int) -> str:
    """Numbers with so many digits, separated by spaces."""
    return " ".join(f"{value:.{digits}f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that recipes.embedded.prepare filled")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens that each run reads (default 2000000)")
    parser.add_argument("--seed", type=int, default=0, help="of the trunks (default 0)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each decoded answer (default 64)")
    args = parser.parse_args()
    experiment = Experiment(args.work, args.out, args.tokens)
    documents = held_out(args.work, HELD_OUT, load_tokenizer(experiment.tokenizer).eos_token_id)
    run(experiment, PLAIN, args.seed)
    members = [learned_together(experiment, method, args.seed) for method in JOINT]
    members += [learned_after(experiment, method, args.seed) for method in AFTER]
    print(*table(members, documents, experiment.length, args.max_tokens), sep="\n")


if __name__ == "__main__":
    main()
