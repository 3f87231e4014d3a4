"""Rewrites heads trained on a copy of the embedded target for the target in the package: same weights, its name and digest.

python -m recipes.embedded.adopt WORK/second/mtp-parallel headstart/embedded/mtp-parallel
"""

import argparse
from pathlib import Path

from headstart.formats import describe, describe_target, load, save
from headstart.target.loading import embedded, load_model
from headstart.target.tokenizer_loading import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", type=Path, help="folder of heads")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    target = embedded("target")
    model = load_model(target)
    heads = load(args.heads).to(model.dtype)
    save(args.out, heads, describe_target(model, load_tokenizer(target)), describe(args.heads).training)


if __name__ == "__main__":
    main()
