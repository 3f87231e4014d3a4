"""Compare every drafter with plain decoding, long: the cells of tests/engine/test_engine_identity.py from the command line.

    python benchmarks/identity.py --tokens 5000 --model talk13M --model tiny --dtype bfloat16

Targets have the kernels that they have by default. Prints a line per drafter, distribution and number of rows, and counts near
ties; exits
with 1 at a difference that is none, and at any difference of a target that is exact to the bit.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cells import DRAFTERS, LAWS, cells, samplings


def main() -> int:
    there = samplings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(there), help="which model, again for more; all by default")
    parser.add_argument("--distribution", action="append", choices=list(LAWS), help="how tokens are sampled; all by default")
    parser.add_argument("--drafter", action="append", choices=list(DRAFTERS), help="which drafter; all by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all but the tiny one")
    parser.add_argument("--tokens", type=int, default=500, help="tokens per cell")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.tokens} tokens per cell")
    wrong = total = ties = 0
    began = time.perf_counter()
    for name in arguments.model or there:
        sampling = samplings(getattr(torch, arguments.dtype))[name]()
        print(f"\n{sampling.target}")
        for distribution in arguments.distribution or LAWS:
            for cell in cells(sampling, distribution, arguments.tokens, arguments.drafter or list(DRAFTERS)):
                print(cell, flush=True)
                total += cell.tokens
                near = 0 if sampling.target.is_exact else sum(split.is_near_tie for split in cell.splits)
                ties, wrong = ties + near, wrong + len(cell.splits) - near
    print(f"\n{total} tokens in {time.perf_counter() - began:.0f} s: {ties} near ties, {wrong} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
