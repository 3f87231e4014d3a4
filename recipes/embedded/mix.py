"""Adds the data to the settings of a pretraining run: each source is read as often as its share of the budget requires.

python -m recipes.embedded.mix recipes/embedded/target.yaml --work WORK --tokens 6000000 --out WORK/target.yaml

`tokens` is the number of tokens of one epoch. A source longer than its share is read in part, a shorter one several times.
"""

import argparse
import json
from pathlib import Path

import yaml


def mix(keys: dict, sources: dict[str, dict], folder: Path, tokens: int) -> dict:
    """The keys with `data`, `times` and a budget of one epoch.

    keys: other settings of the run.
    sources: content of `sources.json`.
    folder: of the token arrays.
    tokens: of the epoch.
    """
    total_share = sum(source["share"] for source in sources.values())
    times = {
        str(folder / f"{name}.train.npy"): round(tokens * source["share"] / total_share / source["train_tokens"], 4)
        for name, source in sources.items()
    }
    return {**keys, "data": list(times), "times": times, "epochs": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("keys", type=Path, help="YAML file of the other settings")
    parser.add_argument("--work", type=Path, required=True, help="folder that prepare filled")
    parser.add_argument("--tokens", type=int, required=True, help="tokens that the run reads")
    parser.add_argument("--out", type=Path, required=True, help="YAML file for `headstart pretrain --config`")
    args = parser.parse_args()
    work = args.work.absolute()
    keys = yaml.safe_load(args.keys.read_text().replace("WORK", str(work)))
    sources = json.loads((work / "sources.json").read_text())
    args.out.write_text(yaml.safe_dump(mix(keys, sources, work / "tokens", args.tokens), sort_keys=False))


if __name__ == "__main__":
    main()
