"""What `weights="int8"` gives and costs: the speed of products, the perplexity of answers, and the acceptance length of heads.

    python benchmarks/int8.py [--model FOLDER] [--drafter mtp] [--limit 12] [--tokens 96]

Needs the compiled kernels. Products: microseconds for weights that do not fit in the caches, packed bf16 and int8 in turn, medians.
Perplexity: of the model in fp32, in bf16 and with int8 weights on the answers that it gave in fp32 at T = 1. Acceptance: of its own
answers each.
"""

import argparse
import math
import time
from functools import reduce
from operator import add
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import headstart
from headstart.bench.suites import load_cases
from headstart.speculation.tree import Drafts, merge
from headstart.target.cache import Seating
from headstart.target.kernels.compiled import CompiledPack
from headstart.target.kernels.library import library
from headstart.target.row_mask import row_masks
from headstart.target.target import Target

SHAPES = ((5632, 2048), (2048, 5632), (2816, 1024), (1024, 1024))  # outputs, inputs
ROWS = (1, 4, 8, 16)
WEIGHT_BYTES = 600e6  # of the packed bf16 weights that are multiplied one after the other: more than caches hold
SETTINGS = {"fp32": ("float32", "stored"), "bf16": ("bfloat16", "stored"), "int8": ("bfloat16", "int8")}


def products(repeat: int) -> None:
    """A line per shape."""
    lib = library()
    assert lib is not None, "there are no compiled kernels for this processor, or no compiler"
    print(f"products, {lib.level}, {torch.get_num_threads()} threads: microseconds in bf16 and int8, and their ratio")
    for num_out, num_in in SHAPES:
        weight = torch.randn(num_out, num_in).bfloat16()
        count = int(WEIGHT_BYTES / weight.nbytes)
        packs = {name: [CompiledPack([weight], [None]) for _ in range(count)] for name in ("bf16", "int8")}
        for pack in packs["int8"]:
            pack.quantise()
        cells = []
        for rows in ROWS:
            x = torch.randn(rows, num_in).bfloat16()
            times = {name: [] for name in packs}
            with lib.working():
                for _ in range(repeat):
                    for name, several in packs.items():
                        times[name].append(seconds(several, x) / count)
            stored, rounded = (1e6 * median(times[name]) for name in packs)
            cells.append(f"{rows} rows {stored:.0f} {rounded:.0f} {stored / rounded:.2f}x")
        print(f"  {num_out} x {num_in}: " + ", ".join(cells))


def seconds(packs: list[CompiledPack], x: Tensor) -> float:
    """The time of all products with one input."""
    began = time.perf_counter()
    for pack in packs:
        pack(x)
    return time.perf_counter() - began


def log_probabilities(target: Target, tokens: list[int]) -> Tensor:
    """[tokens - 1] natural logarithm of the probability of each token after the first, given those before it."""
    seating = Seating(1, len(tokens) + target.min_nodes)
    seat = seating.take(len(tokens))
    assert seat is not None
    cache = target.new_cache(seating)
    forest = merge([tokens[:-1]], [0], [True], Drafts.none(target.device), target.min_nodes, target.device)
    masks, every = row_masks(forest, cache, [seat]), torch.arange(len(tokens) - 1)
    logits = target.forward(forest.tokens, forest.positions, masks, cache, every).logits
    return logits.float().log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def tau(llm: headstart.LLM, prompts: list[str], temperature: float, tokens: int) -> float:
    """Acceptance length over all answers."""
    answers = llm.generate(prompts, max_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True)
    return reduce(add, [answer.stats for answer in answers]).tau


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder; default: the embedded model")
    parser.add_argument("--drafter", default="mtp", help="heads, as for `headstart generate`")
    parser.add_argument("--prompts", default="stories", help="a built-in suite, or a JSONL file")
    parser.add_argument("--limit", type=int, default=12, help="only the first N prompts")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--repeat", type=int, default=5, help="samples of each product")
    arguments = parser.parse_args()
    products(arguments.repeat)
    prompts = [case.prompt for case in load_cases(arguments.prompts, arguments.limit)]
    texts: list[list[int]] = []
    print(
        f"{arguments.model or 'the embedded model'}, {len(prompts)} prompts of {arguments.prompts}, {arguments.tokens} tokens each"
    )
    for name, (dtype, weights) in SETTINGS.items():
        llm = headstart.load(arguments.model, drafter=arguments.drafter, dtype=dtype, weights=weights, device="cpu")
        if not texts:
            answers = llm.generate(prompts, max_tokens=arguments.tokens, temperature=1.0, seed=1)
            texts = [[*llm.tokenizer(text)["input_ids"], *answer.token_ids] for text, answer in zip(prompts, answers, strict=True)]
        logs = torch.cat([log_probabilities(llm.engine.target, text) for text in texts])
        taus = [f"{tau(llm, prompts, temperature, arguments.tokens):.2f} at T = {temperature:g}" for temperature in (0.0, 0.7)]
        print(f"  {name}: perplexity {math.exp(-float(logs.mean())):.4f} on {len(logs)} tokens, tau {', '.join(taus)}")


if __name__ == "__main__":
    main()
