"""Trunks trained with and without heads, seed by seed: the paired differences of their held-out losses and accuracies.

python -m recipes.mtp_quality.quality --work WORK --out OUT --tokens 2000000 --seeds 0,1,2

A run that has ended is not repeated, and one that was killed is resumed. WORK: see `recipes.embedded.prepare`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headstart.target.tokenizer_loading import load_tokenizer
from recipes.mtp_quality.arms import ARMS, PLAIN, Experiment, run
from recipes.mtp_quality.measure import by_document
from recipes.mtp_quality.paired import over_documents, over_seeds
from recipes.mtp_quality.texts import held_out

HELD_OUT = 100_000  # tokens
SUMS = "held_out.npy"


def measured(experiment: Experiment, arm: str, seed: int, documents: Sequence[np.ndarray]) -> np.ndarray:
    """The sums of one trunk, [documents, 3], as `by_document` returns them; stored in its folder."""
    stored = experiment.folder(arm, seed) / SUMS
    if not stored.exists():
        np.save(stored, by_document(experiment.trunk(arm, seed), documents, experiment.length))
    return np.load(stored)


def table(sums: dict[str, np.ndarray]) -> list[str]:
    """The table of results, as lines of Markdown. sums: by arm, [seeds, documents, 3]."""
    lines = [
        "| arm | loss by seed | top-1 by seed | loss minus plain: mean [95 %, seeds] | [95 %, documents] "
        "| top-1 minus plain: mean [95 %, seeds] | [95 %, documents] |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, of_arm in sums.items():
        loss, top1 = ((of_arm[..., column].sum(1) / of_arm[..., 2].sum(1)).tolist() for column in (0, 1))
        cells = [arm, " ".join(f"{value:.4f}" for value in loss), " ".join(f"{value:.4f}" for value in top1)]
        if arm != PLAIN:
            cells += [cell for column in (0, 1) for cell in differences(of_arm, sums[PLAIN], column)]
        lines.append("| " + " | ".join(cells + [""] * (7 - len(cells))) + " |")
    return lines


def differences(of_arm: np.ndarray, plain: np.ndarray, column: int) -> list[str]:
    """The paired difference per token, with the interval over seeds and that over documents.

    of_arm, plain: sums, [seeds, documents, 3].
    column: 0 for loss, 1 for top-1.
    """
    difference, counts = of_arm[..., column] - plain[..., column], of_arm[..., 2]
    seeds = over_seeds((difference.sum(1) / counts.sum(1)).tolist())
    documents = over_documents(difference.sum(0), counts.sum(0))
    return [str(seeds), f"[{documents.low:+.4f}, {documents.high:+.4f}]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that recipes.embedded.prepare filled")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens that each run reads (default 2000000)")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas (default 0,1,2)")
    args = parser.parse_args()
    experiment, seeds = Experiment(args.work, args.out, args.tokens), [int(seed) for seed in args.seeds.split(",")]
    documents = held_out(args.work, HELD_OUT, load_tokenizer(experiment.tokenizer).eos_token_id)
    print(f"{len(documents)} held-out documents of {sum(map(len, documents)):,} tokens", flush=True)
    sums: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            run(experiment, arm, seed)
            sums[arm].append(measured(experiment, arm, seed, documents))
            loss, hits, count = sums[arm][-1].sum(0)
            print(f"{arm}, seed {seed}: loss {loss / count:.4f}, top-1 {hits / count:.4f}", flush=True)
    if len(seeds) > 1:
        print(*table({arm: np.stack(of_arm) for arm, of_arm in sums.items()}), sep="\n")


if __name__ == "__main__":
    main()
