"""Compare every drafter with plain decoding on long texts: the cells of tests/engine/test_engine_identity.py.

    python benchmarks/identity.py --tokens 5000 --model talk13M --model tiny --dtype bfloat16

Targets have their default kernels. Prints a line per drafter, distribution and number of rows, and counts near ties. The exit code
is 1 where a difference is not a near tie, and at any difference of a target that is exact to the bit.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cells import DISTRIBUTIONS, DRAFTERS, cells, sampling_cases


def main() -> int:
    models = sampling_cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(models), help="model; may be repeated; default: all")
    parser.add_argument(
        "--distribution", action="append", choices=list(DISTRIBUTIONS), help="sampling settings; may be repeated; default: all"
    )
    parser.add_argument("--drafter", action="append", choices=list(DRAFTERS), help="drafter; may be repeated; default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all models but the tiny one")
    parser.add_argument("--tokens", type=int, default=500, help="tokens per cell")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.tokens} tokens per cell")
    wrong = total = ties = 0
    began = time.perf_counter()
    for name in arguments.model or models:
        sampling = sampling_cases(getattr(torch, arguments.dtype))[name]()
        print(f"\n{sampling.target}")
        for distribution in arguments.distribution or DISTRIBUTIONS:
            for cell in cells(sampling, distribution, arguments.tokens, arguments.drafter or list(DRAFTERS)):
                print(cell, flush=True)
                total += cell.tokens
                near = 0 if sampling.target.is_exact else sum(split.is_near_tie for split in cell.splits)
                ties, wrong = ties + near, wrong + len(cell.splits) - near
    print(f"\n{total} tokens in {time.perf_counter() - began:.0f} s: {ties} near ties, {wrong} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
